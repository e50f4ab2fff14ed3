"""Wan's video transformers, with SkyReels' that came from them."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from .base import Inputs, Noise, add

FRAMES, HEIGHT, WIDTH = 3, 4, 6
TEXT = 7

COMMON = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _latents(noise: Noise, channels: int, frames: int = FRAMES) -> Tensor:
    return noise(2, channels, frames, 2 * HEIGHT, 2 * WIDTH)


def _wan(noise: Noise) -> Inputs:
    return {
        "hidden_states": _latents(noise, 4),
        "timestep": torch.tensor(500).expand(2),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "attention_kwargs": None,
    }


add("WanTransformer3DModel", COMMON, _wan)


def _vace(noise: Noise) -> Inputs:
    return {
        **_wan(noise),
        "control_hidden_states": _latents(noise, 12),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5, 0.7]),
    }


add(
    "WanVACETransformer3DModel",
    {**COMMON, "num_layers": 4, "vace_layers": [0, 2, 3], "vace_in_channels": 12},
    _vace,
)


def _animate(noise: Noise) -> Inputs:
    """A frame of the character, then those of the poses; four frames of a face for one latent one."""
    return {
        **_wan(noise),
        "hidden_states": _latents(noise, 12),
        "encoder_hidden_states_image": noise(2, 5, 16),
        "pose_hidden_states": _latents(noise, 4, FRAMES - 1),
        "face_pixel_values": noise(2, 3, 4 * (FRAMES - 2) + 1, 16, 16),
        "motion_encode_batch_size": None,
    }


# Latents, the character's and a mask of four go in. Each second block attends to the face.
add(
    "WanAnimateTransformer3DModel",
    {
        **COMMON,
        "num_layers": 4,
        "in_channels": 12,
        "latent_channels": 4,
        "image_dim": 16,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 16,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    _animate,
)


def _animate_2(noise: Noise) -> Inputs:
    """One video as a list, after the pass over the reference that filled the cache.

    The first call in a process compiles what makes the mask, which takes seconds.
    """
    reference = FRAMES - 1
    cache = WanAnimate2KVCache(2)
    for index in range(2):
        shape = (1, reference * HEIGHT * WIDTH, 2, 16)
        cache.get(index).store(noise(*shape), noise(*shape))
    return {
        "hidden_states": [noise(4, FRAMES, 2 * HEIGHT, 2 * WIDTH)],
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": [noise(TEXT, 16)],
        "condition_latents": [noise(8, FRAMES, 2 * HEIGHT, 2 * WIDTH)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": FRAMES * HEIGHT * WIDTH,
        "reference_grid_sizes": torch.tensor([[reference, HEIGHT, WIDTH]]),
        "origin_len": 4 * (reference - 1) + 1,
        "origin_area": [16 * HEIGHT, 16 * WIDTH],
        "is_uncondtion": False,
        "encoder_hidden_states_image": noise(1, 5, 1280),
    }


add(
    "WanAnimate2Transformer3DModel",
    {
        "text_len": 8,
        "in_dim": 12,
        "dim": 32,
        "ffn_dim": 32,
        "freq_dim": 32,
        "text_dim": 16,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 2,
    },
    _animate_2,
)


def _sky_reels(noise: Noise) -> Inputs:
    """Diffusion forcing: each frame has a time of its own, and sees its pair and those before."""
    return {
        **_wan(noise),
        "hidden_states": _latents(noise, 4, 4),
        "timestep": torch.tensor([300, 500, 700, 900]).repeat(2, 1),
        "enable_diffusion_forcing": True,
        "fps": [1, 1],
    }


add("SkyReelsV2Transformer3DModel", {**COMMON, "num_frame_per_block": 2}, _sky_reels)
