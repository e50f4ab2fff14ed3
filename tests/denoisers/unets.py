"""UNets."""

from __future__ import annotations

import torch

from .base import Inputs, Noise, add


def _unet(noise: Noise) -> Inputs:
    return {
        "sample": noise(2, 4, 8, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(2, 7, 16),
    }


add(
    "UNet2DConditionModel",
    {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
    },
    _unet,
)
