"""Transformers of videos: EasyAnimate, Helios, LTX, LTX-2 with its sound, and Mochi."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Inputs, Noise, add

FRAMES = 3
TEXT = 5


def _words() -> Tensor:
    """True for the tokens of two rows that are no padding."""
    return torch.arange(TEXT) < torch.tensor([[5], [3]])


def _easyanimate(noise: Noise) -> Inputs:
    """From a picture: a mask and its latents are an input beside those that are noisy."""
    mask = torch.zeros(2, 1, FRAMES, 8, 12)
    mask[:, :, 1:] = 1
    return {
        "hidden_states": noise(2, 4, FRAMES, 8, 12),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "inpaint_latents": torch.cat([mask, noise(2, 4, FRAMES, 8, 12) * (1 - mask)], dim=1),
    }


add(
    "EasyAnimateTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4 + 1 + 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 1,
        "time_embed_dim": 16,
        "add_norm_text_encoder": True,
        "text_embed_dim": 16,
    },
    _easyanimate,
)


def _helios(noise: Noise) -> Inputs:
    """A piece of a video, with a first frame and what was made before at three grains."""
    history = (16, 2, 1)
    first, *past, latents = torch.arange(1 + sum(history) + FRAMES).split([1, *history, FRAMES])
    return {
        "hidden_states": noise(2, 4, FRAMES, 8, 12),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "indices_hidden_states": latents[None],
        "indices_latents_history_short": torch.cat([first, past[2]])[None],
        "indices_latents_history_mid": past[1][None],
        "indices_latents_history_long": past[0][None],
        "latents_history_short": noise(2, 4, 1 + 1, 8, 12),
        "latents_history_mid": noise(2, 4, 2, 8, 12),
        "latents_history_long": noise(2, 4, 16, 8, 12),
        "attention_kwargs": None,
    }


add(
    "HeliosTransformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_dim": (4, 6, 6),
        "is_amplify_history": True,
    },
    _helios,
)


def _ltx(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, FRAMES * 4 * 6, 8),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "timestep": torch.full((2,), 500.0),
        "encoder_attention_mask": _words().long(),
        "num_frames": FRAMES,
        "height": 4,
        "width": 6,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
    }


add(
    "LTXVideoTransformer3DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 16,
    },
    _ltx,
)


def _video_coords(fps: float) -> Tensor:
    """The first and the last second, row and column of every latent."""
    axes = [torch.arange(size, dtype=torch.float32) for size in (FRAMES, 4, 6)]
    start = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    coords = torch.stack([start, start + 1], dim=-1) * torch.tensor([8.0, 32, 32])[:, None, None]
    coords[0] = (coords[0] - 7).clamp(min=0) / fps
    return coords.repeat(2, 1, 1, 1)


def _audio_coords(length: int) -> Tensor:
    """The first and the last second of every latent of the sound."""
    place = torch.arange(length, dtype=torch.float32)
    seconds = (torch.stack([place, place + 1], dim=-1) * 4 - 3).clamp(min=0) * 0.01
    return seconds.expand(2, 1, -1, -1)


def _ltx2(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, FRAMES * 4 * 6, 8),
        "audio_hidden_states": noise(2, 7, 6),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "audio_encoder_hidden_states": noise(2, TEXT, 16),
        "timestep": torch.full((2,), 500.0),
        "sigma": torch.full((2,), 500.0),
        "encoder_attention_mask": _words().long(),
        "audio_encoder_attention_mask": _words().long(),
        "num_frames": FRAMES,
        "height": 4,
        "width": 6,
        "fps": 24.0,
        "audio_num_frames": 7,
        "video_coords": _video_coords(24.0),
        "audio_coords": _audio_coords(7),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
    }


add(
    "LTX2VideoTransformer3DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "gated_attn": True,
        "cross_attn_mod": True,
        "audio_in_channels": 6,
        "audio_out_channels": 6,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "audio_gated_attn": True,
        "audio_cross_attn_mod": True,
        "num_layers": 2,
        "caption_channels": 16,
    },
    _ltx2,
)


def _mochi(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, FRAMES, 8, 12),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "timestep": torch.full((2,), 500.0),
        "encoder_attention_mask": _words(),
        "attention_kwargs": None,
    }


add(
    "MochiTransformer3DModel",
    {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
        "max_sequence_length": TEXT,
    },
    _mochi,
)
