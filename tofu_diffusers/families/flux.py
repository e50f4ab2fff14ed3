"""FLUX.1 with its fill, control and Kontext relatives, and what else is built of its blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import Family, Kwargs, cut_mask, positions_given, register_family


@register_family
class FluxFamily(Family):
    """Joint blocks, then single blocks; text stands first in the attention of both.

    Reference images of an edit come after the image's own tokens and are never removed.
    """

    name = "flux"
    classes: ClassVar[tuple[str, ...]] = (
        "FluxTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    )
    sample_name = "hidden_states"
    stacks = ("transformer_blocks", "single_transformer_blocks")
    attention_names = ("attn",)
    latents_are_tokens = True
    ids_name = "img_ids"
    output_index = 1
    args_between_blocks: ClassVar[tuple[str, ...]] = (
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    )
    guidance_in_batch = False
    timestep_scale = 1e-3
    rotary = True
    shared_positions = True

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        ids = named["img_ids"]
        # (image, row, column) of each token; an edit's references are images 1 and up.
        image, row, column = (ids[0] if ids.ndim == 3 else ids)[:, :3].T.tolist()
        own = [i for i, number in enumerate(image) if int(number) == int(image[0])]
        # Counted, not measured: some models scale them.
        height, width = (len({places[i] for i in own}) for places in (row, column))
        if height * width != len(own):
            raise ValueError(
                f"img_ids of {len(own)} tokens are no grid: {height} rows of {width} columns are "
                f"{height * width} tokens; give positions as FluxPipeline makes them, or ratio=0"
            )
        return {0: TokenGrid(height, width, text_after=len(image) - len(own))}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        return {"attn": norm(x, emb=kwargs["temb"])[0]}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        cos, sin = kwargs["image_rotary_emb"]
        given = positions_given(plan, removed)
        # Positions have no batch axis: all rows of this call keep the same tokens.
        image, tokens = given[0], plan.assign.shape[1]
        text = cos.shape[0] - tokens
        rows = torch.cat([torch.arange(text, device=image.device), image + text]).to(cos.device)
        kwargs = {**kwargs, "image_rotary_emb": (cos[rows], sin[rows])}
        return kwargs if keys_values == "cached" else cut_masks(kwargs, tokens, given)

    def example(self, model: Any) -> Kwargs:
        config, kwargs = model.config, packed_example(model)
        if "guidance_embeds" in config:
            kwargs["pooled_projections"] = torch.empty(
                2, config.pooled_projection_dim, device="meta"
            )
            kwargs["guidance"] = torch.empty(2, device="meta") if config.guidance_embeds else None
        return kwargs


class TextInSequenceFamily(FluxFamily):
    """Single blocks are given text and image in one sequence, and return both so."""

    one_grid = False

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return self.around(super().grids(model, named), named)

    def around(self, grids: dict[int, TokenGrid], named: Kwargs) -> dict[int, TokenGrid]:
        text = named.get("encoder_hidden_states")
        if text is None:
            return grids
        return {0: grids[0], 1: replace(grids[0], text_before=text.shape[1])}


def cut_masks(kwargs: Kwargs, tokens: int, positions: Tensor) -> Kwargs:
    """A block's (or attention's) arguments with its mask, wherever it stands, cut by `cut_mask`."""
    inside = kwargs.get("joint_attention_kwargs")
    if inside:
        kwargs = {**kwargs, "joint_attention_kwargs": cut_masks(inside, tokens, positions)}
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    return {**kwargs, "attention_mask": cut_mask(mask, tokens, positions)}


def packed_example(model: Any, axes: int = 3) -> Kwargs:
    """What all of these models are given for a picture of 1024 x 1024 pixels.

    axes: Of the positions: picture, row, column and others.
    """
    config = model.config
    side, text = 64, 512
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    zero = torch.zeros_like(row)
    ids = torch.stack([zero, row, column, *[zero] * (axes - 3)], -1).flatten(0, 1)
    return {
        "hidden_states": torch.empty(2, side * side, config.in_channels, device="meta"),
        "encoder_hidden_states": torch.empty(2, text, config.joint_attention_dim, device="meta"),
        "timestep": torch.empty(2, device="meta"),
        "img_ids": ids.float(),
        "txt_ids": torch.empty(text, axes, device="meta"),
    }
