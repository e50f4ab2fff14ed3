"""Flux3Transformer2DModel: FLUX.3, whose image meets the text and its references after blocks of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import Kwargs, gather_rows, register_family
from .flux import FluxFamily, packed_example


@register_family
class Flux3Family(FluxFamily):
    """Blocks of the image alone, then joint ones, with a modulation for every token."""

    name = "flux3"
    classes = ("Flux3Transformer2DModel",)
    stacks = ("mode_blocks.image", "single_transformer_blocks")
    one_grid = False
    args_between_blocks = ()

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return self.around(super().grids(model, named), named)

    def around(self, grids: dict[int, TokenGrid], named: Kwargs) -> dict[int, TokenGrid]:
        references = named.get("image_cond_hidden_states")
        after = 0 if references is None else references.shape[1]
        return {0: grids[0], 1: replace(grids[0], text_after=after)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        shift, scale, _ = kwargs["temb_mod"].chunk(3, dim=-1)
        return {"attn": (1 + scale) * block.norm(x) + shift}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        modulation = kwargs.get("temb_mod")
        if modulation is None:
            return kwargs
        return {**kwargs, "temb_mod": gather_rows(modulation, positions)}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        kwargs = super().slice_block_arguments(kwargs, plan, keys_values, removed)
        return self.slice_per_token(kwargs, plan.kept)

    def example(self, model: Any) -> Kwargs:
        kwargs = packed_example(model, axes=4)
        if model.config.flow_map:
            kwargs["target_timestep"] = kwargs["timestep"]
        return kwargs
