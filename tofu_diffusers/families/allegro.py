"""AllegroTransformer3DModel: Allegro videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import (
    Family,
    Kwargs,
    gather_rows,
    padded_by_attention,
    positions_given,
    register_family,
)


@register_family
class AllegroFamily(Family):
    """One stack of all blocks; positions are numbers of rows in tables of rotations."""

    name = "allegro"
    classes = ("AllegroTransformer3DModel",)
    sample_name = "hidden_states"
    rotary = True

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        frames, height, width = self.sample(named).shape[2:]
        patch, depth = model.config.patch_size, model.config.patch_size_t
        return {0: TokenGrid(height // patch, width // patch, frames // depth)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        modulation = block.scale_shift_table[None] + kwargs["temb"].reshape(len(x), 6, -1)
        shift, scale = modulation[:, 0:1], modulation[:, 1:2]
        return {"attn1": block.norm1(x) * (1 + scale) + shift}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given = positions_given(plan, removed)
        kwargs = dict(kwargs)
        if kwargs.get("image_rotary_emb") is not None:
            tables, places = kwargs["image_rotary_emb"]
            kwargs["image_rotary_emb"] = tables, tuple(gather_rows(each, given) for each in places)
        mask = kwargs.get("attention_mask")
        if mask is not None:  # over the keys [B, 1, N]
            if keys_values == "cached":
                raise padded_by_attention("attention_mask")
            kwargs["attention_mask"] = gather_rows(mask.mT, given).mT
        return kwargs

    def example(self, model: Any) -> Kwargs:
        config = model.config
        sides = (config.sample_frames, config.sample_height, config.sample_width)
        patch, third = config.patch_size, config.attention_head_dim // 3
        grid = (sides[0], sides[1] // patch, sides[2] // patch)
        tokens = grid[0] * grid[1] * grid[2]
        table = [torch.empty(side, third, device="meta") for side in grid]
        places = tuple(torch.empty(1, tokens, dtype=torch.int64, device="meta") for _ in grid)
        return {
            "hidden_states": torch.empty(2, config.in_channels, *sides, device="meta"),
            "encoder_hidden_states": torch.empty(2, 512, config.caption_channels, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "image_rotary_emb": (tuple((each, each) for each in table), places),
        }
