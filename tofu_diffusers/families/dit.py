"""DiTTransformer2DModel: class-conditional DiT."""

from __future__ import annotations

from typing import Any

import torch

from ..tokens.grid import TokenGrid
from .base import Kwargs, patch_grid, register_family
from .basic import BasicFamily


@register_family
class DiTFamily(BasicFamily):
    """One stack of all blocks; squares only, as the model itself."""

    name = "dit"
    classes = ("DiTTransformer2DModel",)
    sample_name = "hidden_states"
    conditional_first = True

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size
        return {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "class_labels": torch.empty(2, dtype=torch.int64, device="meta"),
        }
