"""GlmImageTransformer2DModel: GLM-Image, joint blocks that can read pictures to edit from a cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Kwargs, patch_grid, register_family
from .tables import TableFamily


@register_family
class GlmImageFamily(TableFamily):
    """One stack of all blocks. Keys of pictures to edit are written before the steps, and read in them."""

    name = "glm_image"
    classes = ("GlmImageTransformer2DModel",)
    cache_names = ("kv_caches",)
    guidance_in_batch = False

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return patch_grid(model, self.sample(named))

    def computes_all(self, named: Kwargs) -> bool:
        caches = named.get("kv_caches")
        return caches is not None and caches[0].mode == "write"

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {"attn1": block.norm1(x, kwargs["encoder_hidden_states"], kwargs["temb"])[0]}

    def arguments_of_image(self, kwargs: Kwargs, row: int, batch: int) -> Kwargs:
        own, layer = super().arguments_of_image(kwargs, row, batch), kwargs.get("kv_cache")
        if layer is None or len(layer.k_caches) < 2:
            return own
        # A sample's pictures are those of all images made for it.
        sample, one = row * len(layer.k_caches) // batch, copy.copy(layer)
        one.k_caches, one.v_caches = [layer.k_caches[sample]], [layer.v_caches[sample]]
        return {**own, "kv_cache": one}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64, 128  # 1024 x 1024 pixels
        size = side * config.patch_size
        return {
            "hidden_states": torch.empty(2, config.in_channels, size, size, device="meta"),
            "encoder_hidden_states": torch.empty(2, text, config.text_embed_dim, device="meta"),
            "prior_token_id": torch.zeros(2, side * side, dtype=torch.int64, device="meta"),
            "prior_token_drop": torch.zeros(2, side * side, dtype=torch.bool, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "target_size": torch.empty(2, 2, device="meta"),
            "crop_coords": torch.empty(2, 2, device="meta"),
        }
