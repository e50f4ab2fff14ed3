"""JoyImage-Edit and JoyImage-Edit-Plus: joint attention over the image, its references and the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import (
    Family,
    Kwargs,
    cut_mask,
    gather_rows,
    positions_given,
    refusal_of_sizes,
    register_family,
    shared_rows,
)


@register_family
class JoyImageFamily(Family):
    """JoyImageEditTransformer3DModel. The noisy picture is last in the latents, and first in the blocks."""

    name = "joyimage"
    classes = ("JoyImageEditTransformer3DModel",)
    sample_name = "hidden_states"
    stacks = ("double_blocks",)
    attention_names = ("attn",)
    guidance_in_batch = False
    rotary = True
    shared_positions = True
    image_first = True
    keys_values_refused = ("fresh",)
    refused_because = "its attention projects queries, keys and values in one"

    def widths(self, attention: Any) -> tuple[int, int]:
        fused = attention.img_attn_qkv
        return int(fused.in_features), int(fused.out_features) // 3

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        sample = self.sample(named)
        sides = zip(sample.shape[-3:], model.config.patch_size, strict=True)
        frames, height, width = (side // patch for side, patch in sides)
        references = sample.shape[1] - 1 if sample.ndim == 6 else 0
        after = references * frames * height * width
        return {0: TokenGrid(height, width, frames, text_after=after)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        shift, scale, *_ = block.img_mod(kwargs["temb"])
        return {"attn": block.img_norm1(x) * (1 + scale[:, None]) + shift[:, None]}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        image, text = kwargs["image_rotary_emb"]
        table = tuple(shared_rows(part, plan.kept) for part in image)
        return {**kwargs, "image_rotary_emb": (table, text)}

    def prediction(self, out: Tensor, grid: TokenGrid) -> Tensor:
        return out[:, -1] if out.ndim == 6 else out

    def with_prediction(self, out: Tensor, grid: TokenGrid, maps: Tensor) -> Tensor:
        return torch.cat([out[:, :-1], maps[:, None]], dim=1) if out.ndim == 6 else maps

    def example(self, model: Any) -> Kwargs:
        config = model.config
        pictures = (2, 2, config.in_channels, 1, 128, 128)  # two of 1024 x 1024 pixels
        return {
            "hidden_states": torch.empty(pictures, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, 1024, config.text_dim, device="meta"),
        }


@register_family
class JoyImagePlusFamily(JoyImageFamily):
    """JoyImageEditPlusTransformer3DModel: patches of the noisy picture, of references, and padding."""

    name = "joyimage_plus"
    classes = ("JoyImageEditPlusTransformer3DModel",)
    latents_are_tokens = True
    guidance_in_batch = True
    shared_positions = False

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        frames, height, width = named["shape_list"][0][0]
        after = self.sample(named).shape[1] - frames * height * width
        return {0: TokenGrid(height, width, frames, text_after=after)}

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        return refusal_of_sizes([row[0] for row in named["shape_list"]])

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given = positions_given(plan, removed)
        tables = tuple(gather_rows(part, given) for part in kwargs["image_rotary_emb"])
        mask = kwargs.get("attention_mask")
        if mask is not None and keys_values != "cached":
            mask = cut_mask(mask, plan.assign.shape[1], given, first=True)
        return {**kwargs, "image_rotary_emb": tables, "attention_mask": mask}

    def prediction(self, out: Tensor, grid: TokenGrid) -> Tensor:
        return Family.prediction(self, out.flatten(2), grid)

    def with_prediction(self, out: Tensor, grid: TokenGrid, maps: Tensor) -> Tensor:
        tokens: Tensor = Family.with_prediction(self, out.flatten(2), grid, maps)
        return tokens.view(out.shape)

    def example(self, model: Any) -> Kwargs:
        config = model.config
        patches, text = 2 * 64 * 64, 1024  # two pictures of 1024 x 1024 pixels
        return {
            "hidden_states": torch.empty(
                2, patches, config.in_channels, *config.patch_size, device="meta"
            ),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, text, config.text_dim, device="meta"),
            "encoder_hidden_states_mask": torch.empty(2, text, device="meta"),
            "shape_list": [[(1, 64, 64)] * 2] * 2,
        }
