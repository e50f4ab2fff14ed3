"""Lumina2Transformer2DModel: Lumina-Image 2.0, one sequence of text, image and padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Kwargs, patch_grid, register_family
from .sequence import SequenceFamily


@register_family
class Lumina2Family(SequenceFamily):
    """Refiner blocks on the image alone, then blocks on one sequence.

    In a batch, the image begins where the row's own text ends.
    """

    name = "lumina2"
    classes = ("Lumina2Transformer2DModel",)
    sample_name = "hidden_states"
    stacks = ("noise_refiner", "layers")
    one_grid = False
    attention_names = ("attn",)
    read_names = ("encoder_attention_mask",)
    guidance_in_batch = False
    timestep_scale = None  # runs from 0 at noise to 1 at the image

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        grid = patch_grid(model, self.sample(named))[0]
        # This waits for the device, as the denoiser does itself in every call, for the same numbers.
        text = int(named["encoder_attention_mask"].sum(1).max())
        return {0: grid, 1: replace(grid, text_before=text)}

    def image_starts(self, named: Kwargs) -> dict[int, Tensor]:
        mask: Tensor = named["encoder_attention_mask"]
        return {1: mask.sum(1)} if mask.shape[0] > 1 else {}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {"attn": block.norm1(x, kwargs["temb"])[0]}

    def with_hidden(self, kwargs: Kwargs, x: Tensor) -> Kwargs:
        # An attention takes its keys from an argument of their own, which is the same tensor.
        both = {"encoder_hidden_states": x} if "encoder_hidden_states" in kwargs else {}
        return {**kwargs, "hidden_states": x, **both}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side = 64 * config.patch_size  # 1024 x 1024 pixels
        return {
            "hidden_states": torch.empty(2, config.in_channels, side, side, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, 256, config.cap_feat_dim, device="meta"),
            "encoder_attention_mask": torch.ones(2, 256, dtype=torch.int64),
        }
