"""Transformers of waveforms' latents and of spectrograms."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from .base import Inputs, Noise, add


def _ace_step(noise: Noise) -> Inputs:
    timestep = torch.tensor([0.5, 0.5])
    return {
        "hidden_states": noise(2, 10, 4),
        "timestep": timestep,
        # Where the step begins is where it ends.
        "timestep_r": timestep.clone(),
        "encoder_hidden_states": noise(2, 7, 24),
        "context_latents": noise(2, 10, 8),
        "attention_kwargs": None,
    }


add(
    "AceStepTransformer1DModel",
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        # The latents and their context.
        "in_channels": 12,
        "audio_acoustic_hidden_dim": 4,
        # Less than the sequence: every second layer looks at near tokens only.
        "sliding_window": 2,
        "encoder_hidden_size": 24,
    },
    _ace_step,
)


def _stable_audio(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 10),
        "timestep": torch.tensor([0.5]),
        # Tokens of the prompt, of the start and of the end; start and end again as one token.
        "encoder_hidden_states": noise(2, 9, 16),
        "global_hidden_states": noise(2, 1, 32),
        "rotary_embedding": get_1d_rotary_pos_embed(
            4, 11, use_real=True, repeat_interleave_real=False
        ),
    }


add(
    "StableAudioDiTModel",
    {
        "sample_size": 10,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_attention_heads": 2,
        "out_channels": 4,
        "cross_attention_dim": 16,
        "time_proj_dim": 16,
        "global_states_input_dim": 32,
        "cross_attention_input_dim": 16,
    },
    _stable_audio,
)


def _spectrogram(noise: Noise) -> Inputs:
    notes = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    return {
        # The notes, then the spectrogram of the part before; the first part has none.
        "encodings_and_masks": [
            (noise(2, 6, 16), notes),
            (noise(2, 10, 16), torch.tensor([[False] * 10, [True] * 10])),
        ],
        "decoder_input_tokens": noise(2, 10, 8),
        "decoder_noise_time": torch.tensor([0.5, 0.5]),
    }


add(
    "T5FilmDecoder",
    {
        "input_dims": 8,
        "targets_length": 10,
        "max_decoder_noise_time": 2000.0,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 8,
        "d_ff": 32,
    },
    _spectrogram,
)
