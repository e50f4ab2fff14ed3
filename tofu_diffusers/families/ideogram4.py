"""Ideogram4Transformer2DModel: Ideogram 4, one sequence of padding, text and image, or of the image alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Kwargs, gather_rows, register_family
from .sequence import SequenceFamily

FIRST = 65536
"""Rows and columns of the image are counted from it, places in the text from 0."""


@register_family
class Ideogram4Family(SequenceFamily):
    """One stack of all blocks. Its pipeline has a denoiser of its own for the unconditional branch."""

    name = "ideogram4"
    classes = ("Ideogram4Transformer2DModel",)
    sample_name = "hidden_states"
    stacks = ("layers",)
    attention_names = ("attention",)
    latents_are_tokens = True
    ids_name = "position_ids"
    guidance_in_batch = False
    timestep_scale = None  # runs from 0 at noise to 1 at the image

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        # (time, row, column) of each token.
        _, row, column = named["position_ids"][0].long().T.tolist()
        height, width = max(row) - FIRST + 1, max(column) - FIRST + 1
        text = sum(each < FIRST for each in row)
        if height * width != len(row) - text or min(row[text:]) != FIRST:
            raise ValueError(
                f"position_ids of {len(row) - text} tokens are no grid behind the text: {height} rows of "
                f"{width} columns are {height * width} tokens; give positions as Ideogram4Pipeline makes "
                "them, or ratio=0"
            )
        return {0: TokenGrid(height, width, text_before=text)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        scale = 1 + block.adaln_modulation(kwargs["adaln_input"]).chunk(4, dim=-1)[0]
        return {"attention": block.attention_norm1(x) * scale}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        modulation = kwargs.get("adaln_input")
        if modulation is None or modulation.shape[1] == 1:
            return kwargs
        return {**kwargs, "adaln_input": gather_rows(modulation, positions)}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64, 128  # 1024 x 1024 pixels
        tokens = text + side * side
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1) + FIRST
        words = torch.arange(text)[:, None].expand(-1, 3)
        return {
            "hidden_states": torch.empty(2, tokens, config.in_channels, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, tokens, config.llm_features_dim, device="meta"),
            "position_ids": torch.cat([words, image]).expand(2, -1, -1),
            "segment_ids": torch.ones(2, tokens, dtype=torch.int64, device="meta"),
            "indicator": torch.ones(2, tokens, dtype=torch.int64, device="meta"),
        }
