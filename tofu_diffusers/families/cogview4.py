"""CogView4Transformer2DModel: CogView4 and its control relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Kwargs, patch_grid, register_family
from .tables import TableFamily


@register_family
class CogView4Family(TableFamily):
    """One stack of all blocks; a mask is over the text alone."""

    name = "cogview4"
    classes = ("CogView4Transformer2DModel",)
    guidance_in_batch = False

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {"attn1": block.norm1(x, x[:, :0], kwargs["temb"])[0]}

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        extra = named.get("attention_kwargs") or {}
        packed = [
            name for name in ("batch_flag", "latent_attn_mask") if extra.get(name) is not None
        ]
        if not packed or scope == "step":
            return None
        return (
            f"{packed[0]} packs images of several sizes into one row, which have no one grid; give a batch "
            "of images of one size without it"
        )

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size
        return {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "encoder_hidden_states": torch.empty(2, 224, config.text_embed_dim, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "original_size": torch.empty(2, 2, device="meta"),
            "target_size": torch.empty(2, 2, device="meta"),
            "crop_coords": torch.empty(2, 2, device="meta"),
        }
