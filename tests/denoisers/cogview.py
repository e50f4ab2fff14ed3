"""CogView, CogVideoX and ConsisID, transformers of text and image tokens in one sequence."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from .base import Inputs, Noise, add

VIDEO = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 8,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 7,
    "use_rotary_positional_embeddings": True,
}
IMAGE = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "out_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 4,
}


def _video(noise: Noise) -> Inputs:
    """Latents and those of an image as further channels, after the frames."""
    return {
        "hidden_states": noise(2, 3, 8, 8, 12),
        "encoder_hidden_states": noise(2, 7, 16),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            embed_dim=16, crops_coords=((0, 0), (4, 6)), grid_size=(4, 6), temporal_size=3
        ),
        "attention_kwargs": None,
    }


def _cogvideox(noise: Noise) -> Inputs:
    return {**_video(noise), "ofs": torch.tensor([2.0])}


def _consisid(noise: Noise) -> Inputs:
    # One face for both rows.
    return {
        **_video(noise),
        "id_vit_hidden": [noise(1, 5, 16), noise(1, 5, 16)],
        "id_cond": noise(1, 20),
    }


def _image(noise: Noise, timestep: torch.Tensor) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, 7, 16),
        "timestep": timestep,
        "original_size": torch.tensor([[64.0, 96.0]] * 2),
        "target_size": torch.tensor([[64.0, 96.0]] * 2),
        "crop_coords": torch.tensor([[0.0, 0.0]] * 2),
    }


add("CogVideoXTransformer3DModel", {**VIDEO, "num_layers": 2, "ofs_embed_dim": 16}, _cogvideox)

add(
    "ConsisIDTransformer3DModel",
    {
        **VIDEO,
        # The face enters after every second block.
        "num_layers": 4,
        "cross_attn_interval": 2,
        "is_train_face": True,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 20,
        "LFE_vit_dim": 16,
        "LFE_depth": 4,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 2,
        "LFE_num_querie": 3,
        # Two thirds of the width.
        "LFE_output_dim": 32,
        "LFE_ff_mult": 2,
        "LFE_num_scale": 2,
    },
    _consisid,
)

add(
    "CogView3PlusTransformer2DModel",
    {**IMAGE, "pos_embed_max_size": 8, "sample_size": 8},
    lambda noise: _image(noise, torch.tensor([500, 500])),
)

add(
    "CogView4Transformer2DModel",
    IMAGE,
    lambda noise: {**_image(noise, torch.tensor([500.0, 500.0])), "attention_kwargs": None},
)
