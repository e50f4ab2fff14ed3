"""Image transformers of Qwen's family: packed latents, and the sizes of images as `img_shapes`."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Tensor

from .base import Inputs, Noise, add

GRID = (1, 4, 6)
TOKENS = 24
TEXT = 7

COMMON = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}


def _prompt_mask() -> Tensor:
    """The second prompt is shorter than the first."""
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 5:] = False
    return mask


def _qwen(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, TOKENS, 16),
        "timestep": torch.tensor(0.5).expand(2),
        "guidance": None,
        "encoder_hidden_states_mask": _prompt_mask().long(),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "img_shapes": [[GRID]] * 2,
        "attention_kwargs": {},
    }


add(
    "QwenImageTransformer2DModel",
    {**COMMON, "patch_size": 2, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16},
    _qwen,
)


def _qwen21(noise: Noise) -> Inputs:
    """The first of the steps, which fills the cache of the prompt's keys and values.

    In `img_mask`, a place stands for a token of text or for 2 x 2 of the image.
    """
    places = torch.zeros(2, TEXT + TOKENS // 4, dtype=torch.bool)
    places[:, TEXT:] = True
    return {
        "hidden_states": noise(2, TOKENS, 16),
        "timestep": torch.tensor(0.5).expand(2),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_hidden_states_mask": _prompt_mask().long(),
        "img_shapes": [[GRID]] * 2,
        "img_mask": places,
        "attention_kwargs": {},
        "kv_cache": QwenImage21KVCache(2),
        "kv_cache_mode": "extract",
    }


add(
    "QwenImage21Transformer2DModel",
    {**COMMON, "patch_size": 1, "out_channels": 16, "num_layers": 2, "context_in_dim": 16},
    _qwen21,
)


def _nucleus(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, TOKENS, 16),
        "timestep": torch.tensor(0.5).expand(2),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_hidden_states_mask": _prompt_mask().long(),
        "img_shapes": [GRID] * 2,
        "attention_kwargs": {},
    }


# A dense block, then two of experts that choose half of the tokens each.
add(
    "NucleusMoEImageTransformer2DModel",
    {
        **COMMON,
        "patch_size": 2,
        "out_channels": 4,
        "num_layers": 3,
        "num_key_value_heads": 1,
        "joint_attention_dim": 16,
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 4,
        "moe_intermediate_dim": 32,
        "capacity_factors": 2.0,
    },
    _nucleus,
)
