"""CogVideoXTransformer3DModel: CogVideoX, 1.0 and 1.5, from text, from pictures and from videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Kwargs, register_family
from .tables import TableFamily


@register_family
class CogVideoXFamily(TableFamily):
    """One stack of all blocks. Latents are [B, F, C, H, W]; CogVideoX-2b adds positions at patchify."""

    name = "cogvideox"
    classes = ("CogVideoXTransformer3DModel",)

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        frames, _, height, width = self.sample(named).shape[1:]
        patch, depth = model.config.patch_size, model.config.patch_size_t or 1
        return {0: TokenGrid(height // patch, width // patch, frames // depth)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {"attn1": block.norm1(x, x[:, :0], kwargs["temb"])[0]}

    def prediction(self, out: Tensor, grid: TokenGrid) -> Tensor:
        return out.transpose(1, 2)

    def with_prediction(self, out: Tensor, grid: TokenGrid, maps: Tensor) -> Tensor:
        return maps.transpose(1, 2)

    def example(self, model: Any) -> Kwargs:
        config = model.config
        compression, depth = config.temporal_compression_ratio, config.patch_size_t or 1
        frames = (config.sample_frames - 1) // compression + 1
        frames += -frames % depth
        height, width = config.sample_height, config.sample_width
        kwargs: Kwargs = {
            "hidden_states": torch.empty(
                2, frames, config.in_channels, height, width, device="meta"
            ),
            "encoder_hidden_states": torch.empty(
                2, config.max_text_seq_length, config.text_embed_dim, device="meta"
            ),
            "timestep": torch.empty(2, device="meta"),
        }
        if config.use_rotary_positional_embeddings:
            side = height // config.patch_size * (width // config.patch_size)
            table = torch.empty(frames // depth * side, config.attention_head_dim, device="meta")
            kwargs["image_rotary_emb"] = (table, table)
        if config.ofs_embed_dim is not None:
            kwargs["ofs"] = torch.empty(1, device="meta")
        return kwargs
