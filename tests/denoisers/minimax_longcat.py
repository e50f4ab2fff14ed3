"""MiniMax H3, which makes a video and its sound, and makers of sound alone."""

from __future__ import annotations

import torch

from .base import Inputs, Noise, add

TEXT = 5


def _minimax_h3(noise: Noise) -> Inputs:
    """One sequence, never a batch: text, the sound of two channels, then the video.

    Each row knows its kind (0 for video, 1 for text, 2 for sound) and which of the two timesteps it has.
    """
    frames, height, width, length = 3, 4, 6, 4
    text, sound, video = torch.arange(TEXT + 2 * length + frames * height * width).split(
        [TEXT, 2 * length, frames * height * width]
    )
    step = 32 / (height * width) ** 0.5
    y, x = (16 + step * (torch.arange(size).double() - size / 2) for size in (height, width))
    positions = torch.zeros(video[-1] + 1, 3, dtype=torch.float64)
    positions[text, 0] = torch.arange(TEXT, dtype=torch.float64)
    positions[sound, 0] = TEXT + torch.arange(length, dtype=torch.float64).repeat(2)
    positions[sound, 2] = x[[0, -1]].repeat_interleave(length)
    times = TEXT + torch.tensor([0, 1, 5], dtype=torch.float64) * 5 / 3
    positions[video] = torch.cartesian_prod(times, y, x)
    kinds = torch.zeros(len(positions), dtype=torch.int64)
    kinds[text], kinds[sound] = 1, 2
    return {
        "hidden_states": noise(1, len(video), 16),
        "audio_hidden_states": noise(1, len(sound), 6),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": torch.tensor([0.4, 0.5]),
        "timestep_indices": (kinds == 2).long(),
        "attention_kwargs": None,
        "token_tags": kinds,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
    }


add(
    "MiniMaxH3Transformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "ffn_dim": 48,
        "in_channels": 4,
        "audio_in_channels": 6,
        "patch_size": (1, 2, 2),
        "text_dim": 16,
        "freq_dim": 16,
        "time_embed_hidden_dim": 24,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    },
    _minimax_h3,
)


def _minimax_music3(noise: Noise) -> Inputs:
    """A window of a song; there is never more than one row."""
    return {
        "hidden_states": noise(1, 8, 24),
        "timestep": torch.full((1,), 0.5),
        "encoder_hidden_states": noise(1, 24, 12),
    }


add(
    "MiniMaxMusic3Transformer1DModel",
    {
        "in_channels": 8,
        "condition_dim": 12,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ff_inner_dim": 64,
        "rotary_dim": 8,
        "fourier_embedding_dim": 16,
    },
    _minimax_music3,
)


def _longcat_audio(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 24, 8),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[5], [3]]),
        "timestep": torch.full((2,), 0.5),
        "attention_mask": torch.ones(2, 24, dtype=torch.bool),
        "latent_cond": torch.zeros(2, 24, 8),
    }


add(
    "LongCatAudioDiTTransformer",
    {
        "dit_dim": 32,
        "dit_depth": 2,
        "dit_heads": 2,
        "dit_text_dim": 16,
        "latent_dim": 8,
        "ff_mult": 2.0,
    },
    _longcat_audio,
)
