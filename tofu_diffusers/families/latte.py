"""LatteTransformer3DModel: Latte videos, blocks over space and over time by turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..tokens.grid import TokenGrid
from .base import BlockStack, Kwargs, patch_grid, register_family
from .basic import BasicFamily
from .frames import FramesFamily


@register_family
class LatteFamily(FramesFamily, BasicFamily):
    """A stack is one block over space.

    Those over time are not reduced: frames keep other tokens, so that a place would miss some of its frames.
    """

    name = "latte"
    classes = ("LatteTransformer3DModel",)
    sample_name = "hidden_states"

    def block_stacks(self, model: nn.Module) -> list[BlockStack]:
        (whole,) = [BlockStack.of(model, "transformer_blocks")]
        return [BlockStack(name, 0, ((name, block),)) for name, block in whole.blocks]

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size
        video = (2, config.in_channels, config.video_length, size, size)
        return {
            "hidden_states": torch.empty(video, device="meta"),
            "encoder_hidden_states": torch.empty(2, 120, config.caption_channels, device="meta"),
            "timestep": torch.empty(2, device="meta"),
        }
