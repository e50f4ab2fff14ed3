"""ChromaTransformer2DModel: FLUX blocks whose modulation comes from one table, with a mask over the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import BlockStack, Kwargs, cut_mask, positions_given, register_family
from .flux import FluxFamily


@register_family
class ChromaFamily(FluxFamily):
    """Joint blocks, then single blocks on one sequence of text and image."""

    name = "chroma"
    classes = ("ChromaTransformer2DModel",)

    def block_stacks(self, model: Any) -> list[BlockStack]:
        return [
            BlockStack.of(model, "transformer_blocks"),
            BlockStack.of(model, "single_transformer_blocks", 1),
        ]

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return self.around(super().grids(model, named), named)

    def around(self, grids: dict[int, TokenGrid], named: Kwargs) -> dict[int, TokenGrid]:
        text = named.get("encoder_hidden_states")
        if text is None:
            return grids
        return {0: grids[0], 1: replace(grids[0], text_before=text.shape[1])}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        if hasattr(block, "norm1"):
            return {"attn": block.norm1(x, emb=kwargs["temb"][:, :6])[0]}
        return {"attn": block.norm(x, emb=kwargs["temb"])[0]}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        kwargs = super().slice_block_arguments(kwargs, plan, keys_values, removed)
        mask = kwargs.get("attention_mask")
        if mask is None or keys_values == "cached":
            return kwargs
        cut = cut_mask(mask, plan.assign.shape[1], positions_given(plan, removed))
        return {**kwargs, "attention_mask": cut}
