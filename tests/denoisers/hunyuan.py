"""Hunyuan's transformers of pictures and videos."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Inputs, Noise, add

FRAMES = 3
TEXT = 5


def _mask(*lengths: int, size: int = TEXT) -> Tensor:
    """Ones for the first tokens of each row."""
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).long()


def _guidance() -> Tensor:
    return torch.full((2,), 6000.0)


BLOCKS = {
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
}
VIDEO = {
    **BLOCKS,
    "in_channels": 4,
    "out_channels": 4,
    "num_single_layers": 2,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def _video(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, FRAMES, 8, 12),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": _mask(5, 3),
        "pooled_projections": noise(2, 8),
        "guidance": _guidance(),
        "attention_kwargs": None,
    }


add("HunyuanVideoTransformer3DModel", VIDEO, _video)


def _framepack(noise: Noise) -> Inputs:
    """A window of a video with the frames that were made before it, sorted by how coarse they are."""
    history = (2, 3, 16)
    first, latents, *past = torch.arange(1 + FRAMES + sum(history)).split([1, FRAMES, *history])
    return {
        **_video(noise),
        "image_embeds": noise(2, 3, 12),
        "indices_latents": latents,
        "latents_clean": noise(2, 4, 3, 8, 12),
        "indices_latents_clean": torch.cat([first, past[0]]),
        "latents_history_2x": noise(2, 4, 3, 8, 12),
        "indices_latents_history_2x": past[1],
        "latents_history_4x": noise(2, 4, 16, 8, 12),
        "indices_latents_history_4x": past[2],
    }


add(
    "HunyuanVideoFramepackTransformer3DModel",
    {**VIDEO, "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True},
    _framepack,
)


def _video15(noise: Noise) -> Inputs:
    """From a picture: the latents are followed by those of the first frame and by a mask."""
    first = torch.zeros(2, 1, FRAMES, 4, 6)
    first[:, :, 0] = 1
    latents = noise(2, 4, FRAMES, 4, 6)
    picture = noise(2, 4, FRAMES, 4, 6) * first
    return {
        "hidden_states": torch.cat([latents, picture, first], dim=1),
        "image_embeds": noise(2, 3, 12),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": _mask(5, 3),
        "encoder_hidden_states_2": noise(2, 4, 12),
        "encoder_attention_mask_2": _mask(2, 4, size=4),
        "attention_kwargs": None,
    }


add(
    "HunyuanVideo15Transformer3DModel",
    {
        **BLOCKS,
        "in_channels": 2 * 4 + 1,
        "out_channels": 4,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_2_dim": 12,
        "image_embed_dim": 12,
        "rope_axes_dim": (2, 4, 4),
        "task_type": "i2v",
    },
    _video15,
)


def _image(noise: Noise) -> Inputs:
    """Of the distilled model: the scale of guidance and the next timestep are inputs."""
    return {
        "hidden_states": noise(2, 8, 4, 6),
        "timestep": torch.full((2,), 500.0),
        "timestep_r": torch.full((2,), 400.0),
        "guidance": _guidance(),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": _mask(5, 3),
        "encoder_hidden_states_2": noise(2, 4, 12),
        "encoder_attention_mask_2": _mask(2, 4, size=4),
        "attention_kwargs": None,
    }


add(
    "HunyuanImageTransformer2DModel",
    {
        **BLOCKS,
        "in_channels": 8,
        "out_channels": 8,
        "num_single_layers": 2,
        "patch_size": (1, 1),
        "guidance_embeds": True,
        "text_embed_2_dim": 12,
        "rope_axes_dim": (4, 6),
        "use_meanflow": True,
    },
    _image,
)
