"""AuraFlowTransformer2DModel: joint blocks, then blocks on one sequence of registers, text and image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Family, Kwargs, patch_grid, register_family


@register_family
class AuraFlowFamily(Family):
    """Position is added at patchify. Joint blocks return the text, then the image."""

    name = "aura_flow"
    classes = ("AuraFlowTransformer2DModel",)
    sample_name = "hidden_states"
    stacks = ("joint_transformer_blocks", "single_transformer_blocks")
    one_grid = False
    attention_names = ("attn",)
    output_index = 1
    timestep_scale = 1e-3

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        grid = patch_grid(model, self.sample(named))[0]
        text = model.register_tokens.shape[1] + named["encoder_hidden_states"].shape[1]
        return {0: grid, 1: replace(grid, text_before=text)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {"attn": block.norm1(x, emb=kwargs["temb"])[0]}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size
        return {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "encoder_hidden_states": torch.empty(2, 256, config.joint_attention_dim, device="meta"),
            "timestep": torch.empty(2, device="meta"),
        }
