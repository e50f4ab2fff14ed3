"""Kandinsky 5 and 6: latents with channels last, of videos with and without sound."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Inputs, Noise, add

FRAMES = 3
TEXT = 5

SIZES = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 64,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}
TEXT_SIZES = {
    "in_text_dim": 16,
    "in_text_dim2": 12,
    "num_text_blocks": 2,
    "patch_size": (1, 2, 2),
    "visual_cond": True,
}


def _latents(noise: Noise, frames: int, height: int, width: int) -> Tensor:
    """Noisy frames beside the picture that the first has to be, and the mask that says so."""
    mask = torch.zeros(2, frames, height, width, 1)
    mask[:, 0] = 1
    picture = noise(2, frames, height, width, 4) * mask
    return torch.cat([noise(2, frames, height, width, 4), picture, mask], dim=-1)


def _kandinsky5(noise: Noise) -> Inputs:
    return {
        "hidden_states": _latents(noise, FRAMES, 8, 12),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "pooled_projections": noise(2, 12),
        "timestep": torch.full((2,), 500.0),
        "visual_rope_pos": [torch.arange(size) for size in (FRAMES, 4, 6)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
    }


add("Kandinsky5Transformer3DModel", {**SIZES, **TEXT_SIZES}, _kandinsky5)


def _kandinsky6(noise: Noise) -> Inputs:
    """From a picture, which is one more frame at the end, of a type of its own."""
    mask = torch.zeros(2, FRAMES + 1, 8, 12, 1)
    mask[:, -1] = 1
    latents = noise(2, FRAMES + 1, 8, 12, 4)
    types = torch.zeros(2, FRAMES + 1, dtype=torch.int64)
    types[:, -1] = 1
    return {
        "hidden_states": torch.cat([latents, torch.zeros_like(latents), mask], dim=-1),
        "audio_hidden_states": noise(2, 7, 6),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "pooled_projections": noise(2, 12),
        "timestep": torch.full((2,), 500.0),
        "visual_rope_pos": (torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.arange(6)),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[5], [3]]),
        "visual_token_type_ids": types,
    }


add(
    "Kandinsky6Transformer3DModel",
    {
        **SIZES,
        **TEXT_SIZES,
        "in_audio_dim": 6,
        "out_audio_dim": 6,
        "model_dim_a": 16,
        "ff_dim_a": 32,
        "axes_dims_a": (4, 2, 2),
        "ca_rope": False,
        "cross_gates": False,
        "visual_token_type_num_embeddings": 2,
    },
    _kandinsky6,
)


def _kandinsky6_sr(noise: Noise) -> Inputs:
    """Two tiles of a video: its sparse attention takes squares of 8 x 8 tokens."""
    latents = noise(2, 2, 8, 16, 4)
    anchor = torch.zeros(2, 2, 8, 16, 4 + 1)
    return {
        "hidden_states": torch.cat([latents, anchor], dim=-1),
        "timestep": torch.full((2,), 500.0),
    }


add(
    "Kandinsky6SRTransformer3DModel",
    {**SIZES, "out_visual_dim": 4, "patch_size": (1, 1, 1), "nabla_window": (3, 3, 3)},
    _kandinsky6_sr,
)
