"""PixArtTransformer2DModel: PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from typing import Any

import torch

from ..tokens.grid import TokenGrid
from .base import Kwargs, patch_grid, register_family
from .basic import BasicFamily


@register_family
class PixArtFamily(BasicFamily):
    """One stack of all blocks. Position is added at patchify, so nothing but the tokens shrinks."""

    name = "pixart"
    classes = ("PixArtTransformer2DModel",)
    sample_name = "hidden_states"

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size, text = config.sample_size, config.caption_channels or config.cross_attention_dim
        sizes = {"resolution": (2, 2), "aspect_ratio": (2, 1)}
        return {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "encoder_hidden_states": torch.empty(2, 300, text, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "added_cond_kwargs": {
                name: torch.empty(shape, device="meta") if model.use_additional_conditions else None
                for name, shape in sizes.items()
            },
        }
