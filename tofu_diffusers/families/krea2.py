"""Krea2Transformer2DModel: Krea 2, blocks on one sequence of text, then image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Kwargs, MaskedText, register_family, seen_by_numbers
from .sequence import SequenceFamily


@register_family
class Krea2Family(SequenceFamily):
    """One stack of all blocks. Modulation is shared by them, and by all tokens."""

    name = "krea2"
    classes = ("Krea2Transformer2DModel",)
    sample_name = "hidden_states"
    # Its pipeline pads between the prompt and the template's end; all words have the same position.
    texts = (
        MaskedText(
            "encoder_hidden_states", "encoder_attention_mask", ids="position_ids", gaps=True
        ),
    )
    attention_names = ("attn",)
    latents_are_tokens = True
    ids_name = "position_ids"
    guidance_in_batch = False
    timestep_scale = 1e-3
    shared_positions = True
    gate_names = ("to_gate",)

    def sees_padding(self, model: Any, named: Kwargs) -> str | None:
        return seen_by_numbers(
            named.get("encoder_attention_mask"),
            "encoder_attention_mask",
            "give the pipeline a prompt_embeds_mask of bool (and the negative one)",
        )

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        # (time, row, column) of each token, 0 for text. Of the image's, rows and columns begin at 0, too.
        _, row, column = named["position_ids"].long().T.tolist()
        height, width = max(row) + 1, max(column) + 1
        text = len(row) - height * width
        if text < 0:
            raise ValueError(
                f"position_ids of {len(row)} tokens are no grid: {height} rows of {width} columns are "
                f"{height * width} tokens; give positions as Krea2Pipeline makes them, or ratio=0"
            )
        return self.around({0: TokenGrid(height, width, text_before=text)}, named)

    def around(self, grids: dict[int, TokenGrid], named: Kwargs) -> dict[int, TokenGrid]:
        text = named.get("encoder_hidden_states")
        if text is None:
            return grids
        grid, tokens = grids[0], self.sample(named).shape[1]
        # In the first step of a compiled denoiser the text is not known to be none of the image.
        height, width = (grid.height, grid.width) if grid.tokens == tokens else (1, tokens)
        return {0: TokenGrid(height, width, text_before=text.shape[1])}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        modulation = kwargs["temb"].unflatten(-1, (6, -1)) + block.scale_shift_table
        scale, shift = modulation[..., 0, :], modulation[..., 1, :]
        return {"attn": (1 + scale) * block.norm1(x) + shift}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64, 128  # 1024 x 1024 pixels
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
        states = (2, text, config.num_text_layers, config.text_hidden_dim)
        return {
            "hidden_states": torch.empty(2, side * side, config.in_channels, device="meta"),
            "encoder_hidden_states": torch.empty(states, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "position_ids": torch.cat([torch.zeros(text, 3), image.float()]),
        }
