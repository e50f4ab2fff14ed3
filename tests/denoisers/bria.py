"""Bria's transformers, and Chroma: relatives of Flux without a pooled text."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Inputs, Noise, add
from .prompts import prompt_mask

COMMON = {
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def _tokens(noise: Noise, timestep: Tensor) -> Inputs:
    places = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(4.0), torch.arange(6.0))
    return {
        "hidden_states": noise(2, 24, 8),
        "timestep": timestep,
        "encoder_hidden_states": noise(2, 7, 16),
        "txt_ids": torch.zeros(7, 3),
        "img_ids": places,
    }


def _whole_mask() -> Tensor:
    """The prompts' masks and the image's, which is all of it."""
    return torch.cat([prompt_mask(torch.bool), torch.ones(2, 24, dtype=torch.bool)], dim=1)


def _bria(noise: Noise) -> Inputs:
    return {**_tokens(noise, torch.tensor([500.0, 500.0])), "attention_kwargs": None}


def _fibo(noise: Noise) -> Inputs:
    return {
        **_tokens(noise, torch.tensor([500.0, 500.0])),
        # One of each block.
        "text_encoder_layers": [noise(2, 7, 8) for _ in range(4)],
        "joint_attention_kwargs": {"attention_mask": _whole_mask()[:, None, None]},
    }


def _fibo2(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        # From 1 at noise to 0 at the image.
        "timestep": torch.tensor([0.5, 0.5]),
        # What the resampler reads, then what each of two blocks reads.
        "encoder_hidden_states": noise(2, 3, 7, 16),
        "encoder_attention_mask": prompt_mask(torch.bool),
        # An image to edit.
        "context_latents": [noise(2, 4, 8, 4)],
    }


def _chroma(noise: Noise) -> Inputs:
    return {
        # From 1 at noise to 0 at the image.
        **_tokens(noise, torch.tensor([0.5, 0.5])),
        "attention_mask": _whole_mask().float(),
        "joint_attention_kwargs": {},
    }


add("BriaTransformer2DModel", COMMON, _bria)

add("BriaFiboTransformer2DModel", {**COMMON, "text_encoder_dim": 8}, _fibo)

add(
    "BriaFibo2Transformer2DModel",
    {
        "in_channels": 4,
        "patch_size": 2,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "injection_layer_ids": (1, 3),
        "perceiver_num_layers": 2,
        # A prompt of 3 tokens has 4 gist tokens, one of 6 has more.
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 8,
        "axes_dims": (4, 6, 6),
        "axes_lens": (16, 16, 16),
    },
    _fibo2,
)

add(
    "ChromaTransformer2DModel",
    {
        **COMMON,
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 2,
    },
    _chroma,
)
