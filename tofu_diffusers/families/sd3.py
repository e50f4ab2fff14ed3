"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5, joint attention over image tokens, then text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tokens.grid import TokenGrid
from .base import Family, Kwargs, patch_grid, register_family


@register_family
class SD3Family(Family):
    """One stack of all blocks. Position is added at patchify, so nothing but the tokens shrinks."""

    name = "sd3"
    classes = ("SD3Transformer2DModel",)
    sample_name = "hidden_states"
    output_index = 1
    args_between_blocks = ("block_controlnet_hidden_states", "skip_layers")

    def attentions(self, block: Any) -> dict[str, nn.Module]:
        names = ["attn", "attn2"] if getattr(block, "use_dual_attention", False) else ["attn"]
        return {name: getattr(block, name) for name in names}

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        normed = block.norm1(x, emb=kwargs["temb"])
        inputs = {"attn": normed[0]}
        if getattr(block, "use_dual_attention", False):
            inputs["attn2"] = normed[5]
        return inputs

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size
        return {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "encoder_hidden_states": torch.empty(2, 333, config.joint_attention_dim, device="meta"),
            "pooled_projections": torch.empty(2, config.pooled_projection_dim, device="meta"),
            "timestep": torch.empty(2, device="meta"),
        }
