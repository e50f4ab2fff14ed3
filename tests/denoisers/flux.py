"""FLUX and transformers built like it: two streams of tokens, then one."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Inputs, Noise, add

GRID = (4, 6)
TEXT = 5


def _ids(first: int, height: int, width: int, axes: int = 3, start: int = 0) -> Tensor:
    """A row of (first, y, x, 0...) for every patch."""
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = first
    ids[..., 1] = torch.arange(height)[:, None] + start
    ids[..., 2] = torch.arange(width) + start
    return ids.flatten(0, 1)


def _text_ids(length: int) -> Tensor:
    """A row of (0, 0, 0, place) for every token of text."""
    ids = torch.zeros(length, 4, dtype=torch.int64)
    ids[:, 3] = torch.arange(length)
    return ids


JOINT = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}


def _flux(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 24, 16),
        "timestep": torch.full((2,), 0.5),
        "guidance": torch.full((2,), 3.5),
        "pooled_projections": noise(2, 12),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _ids(0, *GRID),
        "joint_attention_kwargs": None,
    }


add(
    "FluxTransformer2DModel",
    {
        **JOINT,
        "patch_size": 1,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    _flux,
)


def _flux2(noise: Noise) -> Inputs:
    """With the tokens of a picture to edit behind those of the noisy one."""
    ids = torch.cat([_ids(0, *GRID, 4), _ids(10, 2, 3, 4)]).long()
    return {
        "hidden_states": noise(2, 24 + 6, 16),
        "timestep": torch.full((2,), 0.5),
        "guidance": torch.full((2,), 4.0),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "txt_ids": _text_ids(TEXT).expand(2, -1, -1),
        "img_ids": ids.expand(2, -1, -1),
        "joint_attention_kwargs": None,
    }


add(
    "Flux2Transformer2DModel",
    {
        **JOINT,
        "patch_size": 1,
        "timestep_guidance_channels": 16,
        "mlp_ratio": 2.0,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    _flux2,
)


def _flux3(noise: Noise) -> Inputs:
    """With the tokens of a reference picture, which are an input of their own."""
    reference = _ids(0, 2, 3, 4)
    reference[:, 3] = -1
    return {
        "hidden_states": noise(2, 24, 16),
        "timestep": torch.full((2,), 0.5),
        "img_ids": _ids(0, *GRID, 4),
        "image_cond_hidden_states": noise(2, 6, 12),
        "image_cond_ids": reference,
        "encoder_hidden_states": noise(2, TEXT, 16),
        "txt_ids": _text_ids(TEXT),
    }


add(
    "Flux3Transformer2DModel",
    {
        **JOINT,
        "cond_in_channels": 12,
        "timestep_channels": 16,
        "mlp_ratio": 2.0,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    _flux3,
)


def _longcat_image(noise: Noise) -> Inputs:
    text = torch.zeros(TEXT, 3)
    text[:, 1:] = torch.arange(TEXT)[:, None]
    return {
        "hidden_states": noise(2, 24, 16),
        "timestep": torch.full((2,), 0.5),
        "guidance": None,
        "encoder_hidden_states": noise(2, TEXT, 16),
        "txt_ids": text,
        "img_ids": _ids(1, *GRID, start=TEXT),
    }


add(
    "LongCatImageTransformer2DModel",
    {**JOINT, "patch_size": 1, "pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6]},
    _longcat_image,
)
