"""ZImageTransformer2DModel: Z-Image, whose latents, texts and predictions are lists of one a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..steps.outputs import tensors_in
from ..tokens.grid import TokenGrid
from .base import Kwargs, refusal_of_sizes, register_family
from .sequence import SequenceFamily

MULTIPLE = 32
"""Texts and images are padded to a multiple of it."""


def padding(tokens: int) -> int:
    """How many tokens are added to so many."""
    return -tokens % MULTIPLE


@register_family
class ZImageFamily(SequenceFamily):
    """Refiner blocks on the image alone, then blocks on one sequence, the text behind the image.

    Blocks take their tokens as `x`, their attentions as `hidden_states`.
    """

    name = "z_image"
    classes = ("ZImageTransformer2DModel",)
    sample_name = "x"
    stacks = ("noise_refiner", "layers")
    one_grid = False
    attention_names = ("attention",)
    args_between_blocks = ("controlnet_block_samples",)
    conditional_first = True
    timestep_scale = None  # runs from 0 at noise to 1 at the image
    rotary_names = ("freqs_cis",)
    mask_names = ("attn_mask", "attention_mask")

    def sample(self, named: Kwargs) -> Tensor:
        rows = named["x"]
        alike = all(isinstance(row, Tensor) and row.shape == rows[0].shape for row in rows)
        # Others are refused, or only skipped steps of: then one tells the number of rows.
        return torch.stack(rows) if alike else tensors_in(rows)[0].expand(len(rows), -1, -1, -1, -1)

    def latents(self, named: Kwargs) -> list[Tensor]:
        return [self.sample(named), *tensors_in(named["x"])]

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        frames, height, width = named["x"][0].shape[1:]
        side = named.get("patch_size", 2)
        grid = TokenGrid(height // side, width // side, frames // named.get("f_patch_size", 1))
        pad = padding(grid.tokens)
        text = max(len(each) + padding(len(each)) for each in named["cap_feats"])
        return {0: replace(grid, text_after=pad), 1: replace(grid, text_after=pad + text)}

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        rows = named["x"]
        if any(isinstance(row, list) for row in rows):
            return (
                "several pictures a row (omni mode) make rows of different length, of which tokens cannot "
                "be reduced; give one latent a row, or skip steps instead (speedup=2.0)"
            )
        return refusal_of_sizes([tuple(row.shape[1:]) for row in rows])

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        scale = 1 + block.adaLN_modulation(kwargs["adaln_input"]).unsqueeze(1).chunk(4, dim=2)[0]
        return {"attention": block.attention_norm1(x) * scale}

    def hidden(self, kwargs: Kwargs) -> Tensor:
        tokens: Tensor = kwargs["x"] if "x" in kwargs else kwargs["hidden_states"]
        return tokens

    def with_hidden(self, kwargs: Kwargs, x: Tensor) -> Kwargs:
        return {**kwargs, "x" if "x" in kwargs else "hidden_states": x}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side = 128  # 1024 x 1024 pixels
        return {
            "x": [torch.empty(config.in_channels, 1, side, side, device="meta") for _ in range(2)],
            "t": torch.empty(2, device="meta"),
            "cap_feats": [torch.empty(128, config.cap_feat_dim, device="meta") for _ in range(2)],
        }
