"""What families of diffusers' BasicTransformerBlock share: UNets, PixArt and DiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tokens.plan import Plan
from .base import Family, Kwargs


class BasicFamily(Family):
    """Self-attention `attn1`, cross-attention or none, feed-forward; no position inside the blocks."""

    def attentions(self, block: Any) -> dict[str, nn.Module]:
        return {} if block.only_cross_attention else {"attn1": block.attn1}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        kind = block.norm_type
        if block.pos_embed is None and kind in ("layer_norm", "layer_norm_i2vgen"):
            return {"attn1": block.norm1(x)}
        timestep = kwargs.get("timestep")
        if block.pos_embed is None and kind == "ada_norm_zero":
            labels = kwargs.get("class_labels")
            return {"attn1": block.norm1(x, timestep, labels, hidden_dtype=x.dtype)[0]}
        if block.pos_embed is None and kind == "ada_norm_single" and timestep is not None:
            modulation = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
            shift, scale = modulation[:, 0:1], modulation[:, 1:2]
            return {"attn1": block.norm1(x) * (1 + scale) + shift}
        raise ValueError(
            f"keys_values 'fresh' does not know norm_type {kind!r} in a {type(block).__name__}; "
            "use keys_values 'cached' or 'dropped'"
        )

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        extra = named.get("cross_attention_kwargs") or {}
        if scope in ("attention", "step") or "ip_adapter_masks" not in extra:
            return None
        return (
            f"ip_adapter_masks need the whole grid in the cross-attention, which scope {scope!r} "
            "shrinks; use scope='attention'"
        )

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        mask = kwargs.get("attention_mask")
        # A mask over self-attention keys [B, 1, N]; unless they are dropped, all N keys are there.
        if mask is None or keys_values != "dropped":
            return kwargs
        kept = plan.kept[:, None].expand(-1, mask.shape[1], -1)
        mask = torch.gather(mask.expand(plan.kept.shape[0], -1, -1), 2, kept)
        return {**kwargs, "attention_mask": mask}
