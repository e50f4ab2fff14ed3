"""WanTransformer3DModel: Wan 2.1 and 2.2, text- and image-to-video; and ChronoEdit, of the same blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import Family, Kwargs, gather_rows, positions_given, register_family


@register_family
class WanFamily(Family):
    """One stack of all blocks on a (frame, row, column) grid. Wan 2.2 has two denoisers; each is one."""

    name = "wan"
    classes: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel", "ChronoEditTransformer3DModel")
    sample_name = "hidden_states"
    stacks = ("blocks",)
    guidance_in_batch = False
    rotary = True

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        sides = zip(self.sample(named).shape[2:], model.config.patch_size, strict=True)
        frames, height, width = (side // patch for side, patch in sides)
        return {0: TokenGrid(height, width, frames)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        temb = kwargs["temb"].float()
        if temb.ndim == 4:  # [B, N, 6, C]: a timestep for every token
            modulation = block.scale_shift_table[None] + temb
            shift, scale = modulation[:, :, 0], modulation[:, :, 1]
        else:
            modulation = block.scale_shift_table + temb
            shift, scale = modulation[:, 0:1], modulation[:, 1:2]
        return {"attn1": (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        temb = kwargs.get("temb")
        if temb is None or temb.ndim != 4:
            return kwargs
        return {**kwargs, "temb": gather_rows(temb, positions)}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given = positions_given(plan, removed)
        rotary = tuple(gather_rows(part, given) for part in kwargs["rotary_emb"])
        return {**self.slice_per_token(kwargs, plan.kept), "rotary_emb": rotary}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        video = (2, config.in_channels, 21, 60, 104)  # 81 frames of 480 x 832 pixels
        kwargs = {
            "hidden_states": torch.empty(video, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, 512, config.text_dim, device="meta"),
        }
        if config.image_dim is not None:
            kwargs["encoder_hidden_states_image"] = torch.empty(
                2, 257, config.image_dim, device="meta"
            )
        return kwargs
