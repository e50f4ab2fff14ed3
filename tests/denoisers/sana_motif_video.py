"""Video transformers of SANA, with those of its world model, and of Motif."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from torch import Tensor

from .base import Inputs, Noise, add

FRAMES, HEIGHT, WIDTH = 3, 4, 6
TEXT = 7


def _prompt_mask() -> Tensor:
    """The first prompt, which may be the negative one, is shorter than the second."""
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[0, 3:] = 0
    return mask


def _sana_video(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": _prompt_mask(),
        "timestep": torch.tensor(500.0).expand(2),
        "attention_kwargs": None,
    }


add(
    "SanaVideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "sample_size": 8,
        "rope_max_seq_len": 32,
    },
    _sana_video,
)


def _cameras() -> Tensor:
    """A camera a frame that goes ahead: 16 numbers of its pose, then focal lengths and centre."""
    poses = torch.eye(4).repeat(FRAMES, 1, 1)
    poses[:, 2, 3] = torch.arange(FRAMES) * 0.1
    lens = torch.tensor([WIDTH, WIDTH, WIDTH / 2, HEIGHT / 2]).expand(FRAMES, 4)
    return torch.cat([poses.flatten(1), lens], dim=1).expand(2, -1, -1)


def _sana_world(noise: Noise) -> Inputs:
    """The first frame is given, so that its time is 0."""
    return {
        "hidden_states": noise(2, 16, FRAMES, HEIGHT, WIDTH),
        "timestep": torch.tensor([0.0, 500.0, 500.0]).expand(2, 1, FRAMES),
        "encoder_hidden_states": noise(2, 1, TEXT, 16),
        "data_info": {"img_hw": torch.tensor([[HEIGHT * 32.0, WIDTH * 32.0]])},
        "mask": _prompt_mask(),
        "camera_conditions": _cameras(),
        "chunk_plucker": noise(2, 48, FRAMES, HEIGHT, WIDTH),
    }


# Each second block has softmax, the others are linear.
add(
    "SanaWMTransformer3DModel",
    {
        "in_channels": 16,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 16,
        "caption_channels": 16,
        "chunk_plucker_post_attn_blocks": 2,
    },
    _sana_world,
)


def _angles(frames: range) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions, one row a token, each angle twice."""
    axes = (torch.tensor(frames), torch.arange(HEIGHT), torch.arange(WIDTH))
    places = torch.cartesian_prod(*axes).float()
    speeds = 10.0 ** -torch.arange(16).float().reshape(1, 16).div(6)
    angles = (places.repeat(1, 6)[:, :16] * speeds).repeat_interleave(2, dim=1).expand(2, -1, -1)
    return angles.cos(), angles.sin()


def _sana_refiner(noise: Noise) -> Inputs:
    """A block of frames after one that is refined and the sink, whose keys and values the cache holds."""
    tokens = HEIGHT * WIDTH
    cache = SanaWMRefinerKVCache(2)
    cache.sink_pe = _angles(range(1))
    for index in range(2):
        layer = cache.get(index)
        layer.store_sink(noise(2, tokens, 32), noise(2, tokens, 32))
        layer.history_k, layer.history_v = noise(2, tokens, 32), noise(2, tokens, 32)
    return {
        "hidden_states": noise(2, FRAMES * tokens, 16),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "timestep": torch.full((2, FRAMES * tokens), 500.0),
        "video_rotary_emb": _angles(range(2, 2 + FRAMES)),
        "encoder_attention_mask": _prompt_mask(),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
    }


# It keeps the modules of LTX-2's sound, which no call runs.
add(
    "SanaWMLTX2RefinerTransformer3DModel",
    {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 16,
        "audio_out_channels": 16,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 16,
    },
    _sana_refiner,
)


def _motif(noise: Noise) -> Inputs:
    """Video from an image: latents, the image's in the first frame, a mask of that frame."""
    latents = noise(2, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    image, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    image[:, :, 0] = noise(2, 4, 2 * HEIGHT, 2 * WIDTH)
    mask[:, :, 0] = 1
    return {
        "hidden_states": torch.cat([latents, image, mask], dim=1),
        "timestep": torch.tensor(500.0).expand(2),
        "image_embeds": noise(2, 5, 16),
        "attention_kwargs": None,
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": _prompt_mask().bool(),
    }


# Two blocks of two streams, two of one stream, two that decode.
add(
    "MotifVideoTransformer3DModel",
    {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_decoder_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "image_embed_dim": 16,
        "rope_axes_dim": (4, 6, 6),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    },
    _motif,
)
