"""MochiTransformer3DModel: Mochi 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import TEXT, Family, Kwargs, gather_rows, positions_given, register_family


@register_family
class MochiFamily(Family):
    """One stack of all blocks; each row of a batch has a product of its own, with the words it has."""

    name = "mochi"
    classes = ("MochiTransformer3DModel",)
    texts = (TEXT,)
    sample_name = "hidden_states"
    rotary = True
    image_first = True

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        frames, height, width = self.sample(named).shape[2:]
        patch = model.config.patch_size
        return {0: TokenGrid(height // patch, width // patch, frames)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {"attn1": block.norm1(x, kwargs["temb"])[0]}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given = positions_given(plan, removed)
        # One table for all rows [N, H, D], which is multiplied as one a row as well.
        rotary = tuple(gather_rows(part[None], given) for part in kwargs["image_rotary_emb"])
        return {**kwargs, "image_rotary_emb": rotary}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        video = (2, config.in_channels, 14, 60, 106)  # 84 frames of 480 x 848 pixels
        return {
            "hidden_states": torch.empty(video, device="meta"),
            "encoder_hidden_states": torch.empty(
                2, config.max_sequence_length, config.text_embed_dim, device="meta"
            ),
            "timestep": torch.empty(2, device="meta"),
            "encoder_attention_mask": torch.empty(
                2, config.max_sequence_length, dtype=torch.bool, device="meta"
            ),
        }
