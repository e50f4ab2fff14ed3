"""Kandinsky5Transformer3DModel: Kandinsky 5 pictures and videos, from text and from pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import Family, Kwargs, gather_rows, positions_given, register_family


@register_family
class Kandinsky5Family(Family):
    """The blocks of the picture, with attention to the text beside; latents are [B, F, H, W, C]."""

    name = "kandinsky5"
    classes = ("Kandinsky5Transformer3DModel",)
    sample_name = "hidden_states"
    stacks = ("visual_transformer_blocks",)
    attention_names = ("self_attention",)
    guidance_in_batch = False
    rotary = True
    projections = ("to_query", "to_key", "to_value")

    def heads(self, attention: Any) -> int:
        return int(attention.num_heads)

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        sides = zip(self.sample(named).shape[1:4], model.config.patch_size, strict=True)
        frames, height, width = (side // patch for side, patch in sides)
        return {0: TokenGrid(height, width, frames)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        modulation = block.visual_modulation(kwargs["time_embed"])[:, None].chunk(9, dim=-1)
        shift, scale = modulation[0].float(), modulation[1].float()
        normed = block.self_attention_norm(x.float()) * (scale + 1.0) + shift
        return {"self_attention": normed.type_as(x)}

    def hidden(self, kwargs: Kwargs) -> Tensor:
        hidden: Tensor = kwargs["visual_embed" if "visual_embed" in kwargs else "hidden_states"]
        return hidden

    def with_hidden(self, kwargs: Kwargs, x: Tensor) -> Kwargs:
        return {**kwargs, "visual_embed" if "visual_embed" in kwargs else "hidden_states": x}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        name = "rope" if "rope" in kwargs else "rotary_emb"
        rotary = gather_rows(kwargs[name], positions_given(plan, removed))
        return {**kwargs, name: rotary}

    def prediction(self, out: Tensor, grid: TokenGrid) -> Tensor:
        return out.movedim(-1, 1)

    def with_prediction(self, out: Tensor, grid: TokenGrid, maps: Tensor) -> Tensor:
        return maps.movedim(1, -1)

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        if named.get("sparse_params") is None:
            return None
        return (
            "sparse attention (sparse_params, of a checkpoint with attention_type 'nabla') takes squares of "
            "8x8 tokens, which reduced tokens are not; use a checkpoint with regular attention, or "
            "StepSkipping"
        )

    def example(self, model: Any) -> Kwargs:
        config = model.config
        frames, height, width = 31, 64, 96  # 121 frames of 512 x 768 pixels
        channels = config.in_visual_dim * (2 if config.visual_cond else 1) + config.visual_cond
        sides = (frames, height // 2, width // 2)
        return {
            "hidden_states": torch.empty(2, frames, height, width, channels, device="meta"),
            "encoder_hidden_states": torch.empty(2, 256, config.in_text_dim, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "pooled_projections": torch.empty(2, config.in_text_dim2, device="meta"),
            "visual_rope_pos": [
                torch.empty(side, dtype=torch.int64, device="meta") for side in sides
            ],
            "text_rope_pos": torch.empty(256, dtype=torch.int64, device="meta"),
        }
