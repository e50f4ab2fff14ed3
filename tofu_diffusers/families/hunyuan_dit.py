"""HunyuanDiT2DModel: Hunyuan-DiT, whose later blocks read what the earlier ones left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import Kwargs, gather_rows, patch_grid, register_family
from .tables import TableFamily


@register_family
class HunyuanDiTFamily(TableFamily):
    """One stack of all blocks, which are run one by one: each of the second half has a skip connection."""

    name = "hunyuan_dit"
    classes = ("HunyuanDiT2DModel",)
    stacks = ("blocks",)
    keys_values_refused = ("fresh",)
    refused_because = (
        "its attention to the text rotates queries by the positions of the self-attention"
    )

    def splits_stacks(self, named: Kwargs) -> str | None:
        return "a skip connection"

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        if block.skip_linear is not None:
            x = block.skip_linear(block.skip_norm(torch.cat([x, kwargs["skip"]], dim=-1)))
        return {"attn1": block.norm1(x, kwargs["temb"])}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        kwargs = super().slice_block_arguments(kwargs, plan, keys_values, removed)
        skip = kwargs.get("skip")
        return kwargs if skip is None else {**kwargs, "skip": gather_rows(skip, plan.kept)}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size, text, t5 = config.sample_size, config.text_len, config.text_len_t5
        tokens = (size // config.patch_size) ** 2
        table = torch.empty(tokens, config.attention_head_dim, device="meta")
        kwargs: Kwargs = {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(
                2, text, config.cross_attention_dim, device="meta"
            ),
            "text_embedding_mask": torch.empty(2, text, device="meta"),
            "encoder_hidden_states_t5": torch.empty(
                2, t5, config.cross_attention_dim_t5, device="meta"
            ),
            "text_embedding_mask_t5": torch.empty(2, t5, device="meta"),
            "image_rotary_emb": (table, table),
        }
        if config.use_style_cond_and_image_meta_size:
            kwargs["image_meta_size"] = torch.empty(2, 6, device="meta")
            kwargs["style"] = torch.empty(2, dtype=torch.int64, device="meta")
        return kwargs
