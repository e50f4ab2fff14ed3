"""QwenImageTransformer2DModel: Qwen-Image and Qwen-Image-Edit, with complex rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import (
    Family,
    Kwargs,
    gather_rows,
    positions_given,
    refusal_of_sizes,
    register_family,
    shared_rows,
)


@register_family
class QwenFamily(Family):
    """Joint blocks, text first. The pictures that an edit refers to come last and are never removed."""

    name = "qwen"
    classes = ("QwenImageTransformer2DModel",)
    sample_name = "hidden_states"
    attention_names = ("attn",)
    latents_are_tokens = True
    output_index = 1
    args_between_blocks = ("controlnet_block_samples",)
    guidance_in_batch = False
    timestep_scale = 1e-3
    rotary = True
    shared_positions = True

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        shapes = named["img_shapes"][0]
        shapes = shapes if isinstance(shapes, list) else [shapes]
        frames, height, width = shapes[0]
        after = sum(f * h * w for f, h, w in shapes[1:])
        return {0: TokenGrid(height, width, frames, text_after=after)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        modulation = block.img_mod(kwargs["temb"]).chunk(2, dim=-1)[0]
        index = kwargs.get("modulate_index")
        return {"attn": block._modulate(block.img_norm1(x), modulation, index)[0]}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        index = kwargs.get("modulate_index")
        if index is None:
            return kwargs
        return {**kwargs, "modulate_index": gather_rows(index, positions)}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        image, text = kwargs["image_rotary_emb"]
        rotary = (shared_rows(image, positions_given(plan, removed)), text)
        return {**self.slice_per_token(kwargs, plan.kept), "image_rotary_emb": rotary}

    def arguments_of_image(self, kwargs: Kwargs, row: int, batch: int) -> Kwargs:
        own = super().arguments_of_image(kwargs, row, batch)
        temb = kwargs.get("temb")
        if temb is not None and temb.shape[0] == 2 * batch:  # of the image, then of its references
            own["temb"] = temb[row::batch]
        return own

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        return refusal_of_sizes(named["img_shapes"])

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64, 128  # 1024 x 1024 pixels
        return {
            "hidden_states": torch.empty(2, side * side, config.in_channels, device="meta"),
            "encoder_hidden_states": torch.empty(
                2, text, config.joint_attention_dim, device="meta"
            ),
            "timestep": torch.empty(2, device="meta"),
            "img_shapes": [[(1, side, side)]] * 2,
        }
