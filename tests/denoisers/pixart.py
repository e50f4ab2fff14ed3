"""Transformers of the PixArt family: labels or captions by adaptive norms, images and videos."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from .base import Inputs, Noise, add
from .prompts import prompt_mask

COMMON = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
LABELS = {**COMMON, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero"}
CAPTIONS = {
    **COMMON,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
}


def _labels(noise: Noise) -> Inputs:
    return {
        # These classes take their tokens for a square.
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        # The class and the label of no class.
        "class_labels": torch.tensor([3, 10]),
    }


def _captions(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, 7, 16),
        "encoder_attention_mask": prompt_mask(),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 96.0]] * 2),
            "aspect_ratio": torch.tensor([[64 / 96]] * 2),
        },
    }


def _latte(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "encoder_hidden_states": noise(2, 7, 16),
        "timestep": torch.tensor([500, 500]),
        "enable_temporal_attentions": True,
    }


def _allegro(noise: Noise) -> Inputs:
    freqs_t, freqs_h, freqs_w, *grids = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (4, 6)),
        grid_size=(4, 6),
        temporal_size=3,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    places = torch.cartesian_prod(*(grid.long() for grid in grids))
    return {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "encoder_hidden_states": noise(2, 7, 16),
        "encoder_attention_mask": prompt_mask(),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": ((freqs_t, freqs_h, freqs_w), tuple(places.T[:, None])),
    }


add("DiTTransformer2DModel", LABELS, _labels)

add("Transformer2DModel", LABELS, _labels)

add("PixArtTransformer2DModel", {**CAPTIONS, "use_additional_conditions": True}, _captions)

add("LatteTransformer3DModel", {**CAPTIONS, "video_length": 3}, _latte)

add(
    "AllegroTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 3,
        "caption_channels": 16,
    },
    _allegro,
)
