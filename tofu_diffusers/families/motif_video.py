"""MotifVideoTransformer3DModel: HunyuanVideo's blocks with an attention to the text, and some that decode."""

from __future__ import annotations

from typing import Any

import torch

from .base import TEXT, BlockStack, Kwargs, register_family
from .hunyuan import HunyuanFamily


@register_family
class MotifVideoFamily(HunyuanFamily):
    """Joint blocks, then single ones; the last decode: a new image attends to all of the old one."""

    name = "motif_video"
    classes = ("MotifVideoTransformer3DModel",)
    texts = (TEXT,)
    keys_values_refused = ("fresh",)
    refused_because = "its attention to the text rotates queries by the positions of the joint one"

    def block_stacks(self, model: Any) -> list[BlockStack]:
        joint, single = super().block_stacks(model)
        last = len(single.blocks) - model.num_decoder_layers
        parts = [single.blocks[:last], single.blocks[last:]]
        return [joint, *(BlockStack(single.name, 0, blocks) for blocks in parts if blocks)]

    def example(self, model: Any) -> Kwargs:
        config = model.config
        video = (2, config.in_channels, 31, 92, 160)  # 121 frames of 736 x 1280 pixels
        return {
            "hidden_states": torch.empty(video, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, 512, config.text_embed_dim, device="meta"),
        }
