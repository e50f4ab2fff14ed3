"""SkyReelsV2Transformer3DModel: SkyReels-V2, with a time for every frame under diffusion forcing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..tokens.plan import Plan
from .base import Kwargs, cut_mask, gather_rows, positions_given, register_family
from .wan import WanFamily


@register_family
class SkyReelsFamily(WanFamily):
    """Wan's blocks with modulation [B, 6, N, C] and, frame by frame, a causal mask."""

    name = "skyreels"
    classes = ("SkyReelsV2Transformer3DModel",)

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        temb = kwargs["temb"].float()
        if temb.ndim == 4:
            temb = temb.transpose(1, 2)
        return super().attention_inputs(block, x, {**kwargs, "temb": temb})

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        temb = kwargs.get("temb")
        if temb is None or temb.ndim != 4:
            return kwargs
        return {**kwargs, "temb": gather_rows(temb.transpose(1, 2), positions).transpose(1, 2)}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        kwargs = super().slice_block_arguments(kwargs, plan, keys_values, removed)
        mask = kwargs.get("attention_mask")
        if mask is None:
            return kwargs
        mask = mask.expand(len(plan.kept), -1, -1, -1)
        if keys_values != "cached":
            mask = cut_mask(mask, plan.assign.shape[1], positions_given(plan, removed))
        return {**kwargs, "attention_mask": mask}
