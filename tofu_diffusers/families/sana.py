"""SanaTransformer2DModel: Sana and Sana-Sprint, linear attention and convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Family, Kwargs, patch_grid, register_family


@register_family
class SanaFamily(Family):
    """Only attentions shrink: the feed-forward is a convolution over the grid.

    Half of the tokens less is 7 % of the FLOPs less ("fresh"), or 14 % ("dropped", "cached"). A linear
    attention makes one sum over its keys, so that all keys_values hold as with softmax.
    """

    name = "sana"
    classes = ("SanaTransformer2DModel",)
    sample_name = "hidden_states"
    scopes_refused = ("block", "span")
    refused_because = "its feed-forward is a convolution over the whole grid"
    args_between_blocks = ("controlnet_block_samples",)
    # Times a number of the model (`config.timestep_scale`), or an angle (Sana-Sprint).
    timestep_scale = None

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        modulation = block.scale_shift_table[None] + kwargs["timestep"].reshape(len(x), 6, -1)
        shift, scale = modulation[:, 0:1], modulation[:, 1:2]
        return {"attn1": (block.norm1(x) * (1 + scale) + shift).to(x.dtype)}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size
        kwargs: Kwargs = {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "encoder_hidden_states": torch.empty(2, 300, config.caption_channels, device="meta"),
            "timestep": torch.empty(2, device="meta"),
        }
        if config.guidance_embeds:
            kwargs["guidance"] = torch.empty(2, device="meta")
        return kwargs
