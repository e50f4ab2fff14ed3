"""PRXTransformer2DModel: PRX, an image that attends to itself and to a text that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import Family, Kwargs, MaskedText, gather_rows, patch_grid, register_family


@register_family
class PRXFamily(Family):
    """One stack of all blocks, whose attentions have one projection to queries, keys and values."""

    name = "prx"
    classes = ("PRXTransformer2DModel",)
    sample_name = "hidden_states"
    texts = (MaskedText("encoder_hidden_states", "attention_mask"),)
    stacks = ("blocks",)
    attention_names = ("attention",)
    timestep_scale = 1e-3
    rotary = True
    keys_values_refused = ("fresh",)
    refused_because = "one projection makes queries, keys and values"

    def widths(self, attention: Any) -> tuple[int, int]:
        return int(attention.query_dim), int(attention.inner_dim)

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        shift, scale, _ = block.modulation(kwargs["temb"])[0]
        return {"attention": (1 + scale) * block.img_pre_norm(x) + shift}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        table = kwargs["image_rotary_emb"]  # [B, 1, N, ...]
        return {**kwargs, "image_rotary_emb": gather_rows(table[:, 0], plan.kept)[:, None]}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64 * config.patch_size, 256
        return {
            "hidden_states": torch.empty(2, config.in_channels, side, side, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, text, config.context_in_dim, device="meta"),
            "attention_mask": torch.ones(2, text, dtype=torch.bool, device="meta"),
        }
