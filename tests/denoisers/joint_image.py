"""Transformers of pictures that attend to tokens of text and picture together."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor

from .base import Inputs, Noise, add

TEXT = 5


def _words(*lengths: int) -> Tensor:
    """True for the tokens of each row that are no padding."""
    return torch.arange(TEXT) < torch.tensor(lengths)[:, None]


def _ernie(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 8, 4, 6),
        "timestep": torch.full((2,), 500.0),
        "text_bth": noise(2, TEXT, 16),
        "text_lens": torch.tensor([5, 3]),
    }


add(
    "ErnieImageTransformer2DModel",
    {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "in_channels": 8,
        "out_channels": 8,
        "patch_size": 1,
        "text_in_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    },
    _ernie,
)


def _glm(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "prior_token_id": torch.arange(48).reshape(2, 24) % 20,
        "prior_token_drop": torch.zeros(2, 24, dtype=torch.bool),
        "timestep": torch.full((2,), 499.0),
        "target_size": torch.tensor([[64.0, 96.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
        "attention_kwargs": None,
        "attention_mask": _words(5, 3).float(),
        "kv_caches": GlmImageKVCache(2),
    }


add(
    "GlmImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 20,
    },
    _glm,
)


def _hidream(noise: Noise) -> Inputs:
    """With the states of one layer of the language model for each block."""
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timesteps": torch.full((2,), 500.0),
        "encoder_hidden_states_t5": noise(2, TEXT, 16),
        "encoder_hidden_states_llama3": noise(4, 2, TEXT, 12),
        "pooled_embeds": noise(2, 10),
        "attention_kwargs": None,
    }


add(
    "HiDreamImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_channels": [16, 12],
        "text_emb_dim": 10,
        "num_routed_experts": 3,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 6, 6),
        "max_resolution": (12, 12),
        "llama_layers": [0, 1, 2, 3],
    },
    _hidream,
)


def _ideogram(noise: Noise) -> Inputs:
    """One sequence: padding, text, then the picture, which alone has latents that are not 0."""
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    picture = torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1) + 65536
    positions = torch.zeros(2, TEXT + 24, 3, dtype=torch.int64)
    positions[:, TEXT:] = picture
    segments = torch.ones(2, TEXT + 24, dtype=torch.int64)
    kinds = torch.tensor([3] * TEXT + [2] * 24).repeat(2, 1)
    for row, padding in enumerate((0, 2)):
        positions[row, padding:TEXT] = torch.arange(TEXT - padding)[:, None]
        segments[row, :padding] = -1
        kinds[row, :padding] = 0
    latents = torch.zeros(2, TEXT + 24, 8)
    latents[:, TEXT:] = noise(2, 24, 8)
    return {
        "hidden_states": latents,
        "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states": noise(2, TEXT + 24, 16),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": kinds,
        "attention_kwargs": None,
    }


add(
    "Ideogram4Transformer2DModel",
    {
        "in_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "adaln_dim": 16,
        "llm_features_dim": 16,
        "mrope_section": (4, 2, 2),
    },
    _ideogram,
)

JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def _joy(noise: Noise) -> Inputs:
    """Two pictures: the one to edit, then the noisy one."""
    return {
        "hidden_states": noise(2, 2, 4, 1, 8, 12),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": noise(2, TEXT, 16),
    }


add("JoyImageEditTransformer3DModel", JOY, _joy)


def _joy_plus(noise: Noise) -> Inputs:
    """Patches of the noisy picture, then those of one or two others, padded to the longer row."""
    latents = noise(2, 24 + 6 + 8, 4, 1, 2, 2)
    latents[0, 24 + 6 :] = 0
    return {
        "hidden_states": latents,
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_hidden_states_mask": _words(5, 3).long(),
        "shape_list": [[(1, 4, 6), (1, 2, 3)], [(1, 4, 6), (1, 2, 3), (1, 2, 4)]],
    }


add("JoyImageEditPlusTransformer3DModel", JOY, _joy_plus)


def _krea(noise: Noise) -> Inputs:
    """With the states of three layers of the language model."""
    positions = torch.zeros(TEXT + 24, 3)
    positions[TEXT:, 1] = torch.arange(24) // 6
    positions[TEXT:, 2] = torch.arange(24) % 6
    return {
        "hidden_states": noise(2, 24, 16),
        "encoder_hidden_states": noise(2, TEXT, 3, 16),
        "timestep": torch.full((2,), 0.5),
        "position_ids": positions,
        "encoder_attention_mask": _words(5, 3),
        "attention_kwargs": None,
    }


add(
    "Krea2Transformer2DModel",
    {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": (4, 6, 6),
    },
    _krea,
)


def _lumina2(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": _words(5, 3).long(),
        "attention_kwargs": None,
    }


add(
    "Lumina2Transformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (40, 16, 16),
        "cap_feat_dim": 16,
    },
    _lumina2,
)
