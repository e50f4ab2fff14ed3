"""Relatives of Wan: AnyFlow, its causal form, and ChronoEdit."""

from __future__ import annotations

import torch

from .base import Inputs, Noise, add

COMMON = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _anyflow(noise: Noise) -> Inputs:
    """Frames come before channels; each frame has the time where a step begins and where it ends."""
    return {
        "hidden_states": noise(2, 3, 4, 8, 12),
        "timestep": torch.full((2, 3), 500.0),
        "r_timestep": torch.full((2, 3), 250.0),
        "encoder_hidden_states": noise(2, 7, 16),
        "attention_kwargs": None,
    }


def _far(noise: Noise) -> Inputs:
    """The third chunk, after one in short tokens and one in full tokens."""
    return {
        **_anyflow(noise),
        "chunk_partition": [1, 3, 3],
        # Keys and values of 2 heads: 2 chunks of 3 frames of 24 tokens, 2 chunks of 3 frames of 6 tokens.
        "kv_cache": {
            layer: {
                "full_cache": noise(2, 2, 2, 144, 12),
                "compressed_cache": noise(2, 2, 2, 36, 12),
            }
            for layer in range(2)
        },
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


def _chronoedit(noise: Noise) -> Inputs:
    return {
        # The latents, then the mask and the latents of the image.
        "hidden_states": noise(2, 12, 3, 8, 12),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": noise(2, 7, 16),
        "encoder_hidden_states_image": noise(2, 5, 20),
        "attention_kwargs": None,
    }


add("AnyFlowTransformer3DModel", COMMON, _anyflow)

add(
    "AnyFlowFARTransformer3DModel",
    {
        **COMMON,
        "compressed_patch_size": (1, 4, 4),
        "full_chunk_limit": 2,
        "chunk_partition": (1, 3, 3),
    },
    _far,
)

add(
    "ChronoEditTransformer3DModel",
    {**COMMON, "in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24},
    _chronoedit,
)
