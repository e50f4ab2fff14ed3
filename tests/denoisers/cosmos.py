"""Cosmos, and the transformer of Cosmos 3 that makes videos, sound and actions."""

from __future__ import annotations

import torch

from .base import Inputs, Noise, add


def _cosmos(noise: Noise) -> Inputs:
    """The first frame is given: its time is near 0, and a mask says so."""
    given = torch.zeros(2, 1, 3, 1, 1)
    given[:, :, 0] = 1
    return {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "timestep": torch.where(given > 0, 0.0001, 0.5),
        "encoder_hidden_states": noise(2, 7, 16),
        "fps": 16,
        "condition_mask": given.repeat(1, 1, 1, 8, 12),
        # Of the pixels, for all rows.
        "padding_mask": torch.zeros(1, 1, 64, 96),
    }


add(
    "CosmosTransformer3DModel",
    {
        # The latents and the mask of given frames.
        "in_channels": 5,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
        "concat_padding_mask": False,
        "extra_pos_embed_type": "learnable",
    },
    _cosmos,
)


def _omni(noise: Noise) -> Inputs:
    """One sequence: 5 tokens of text, then 3 frames of 4 x 6 tokens, 9 tokens of sound, 4 of action.

    The first frame and the first action are given.
    """
    text = torch.arange(5.0).repeat(3, 1)
    video = torch.cartesian_prod(20.0 + torch.arange(3), torch.arange(4.0), torch.arange(6.0)).T
    sound = torch.zeros(3, 9)
    sound[0] = 20.0 + torch.arange(9)
    # Actions lie between frames.
    action = torch.zeros(3, 4)
    action[0] = 20.25 + torch.arange(4) / 4
    return {
        "input_ids": torch.tensor([3, 1, 4, 1, 5]),
        "text_indexes": torch.arange(5),
        "position_ids": torch.cat([text, video, sound, action], dim=1),
        "und_len": 5,
        "sequence_length": 90,
        "vision_tokens": [noise(1, 4, 3, 8, 12)],
        "vision_token_shapes": [(3, 4, 6)],
        "vision_sequence_indexes": torch.arange(5, 77),
        "vision_mse_loss_indexes": torch.arange(29, 77),
        "vision_timesteps": torch.full((48,), 500.0),
        "vision_noisy_frame_indexes": [torch.tensor([1, 2])],
        "sound_tokens": [noise(3, 9)],
        "sound_token_shapes": [(9, 1, 1)],
        "sound_sequence_indexes": torch.arange(77, 86),
        "sound_mse_loss_indexes": torch.arange(77, 86),
        "sound_timesteps": torch.full((9,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(9)],
        "action_tokens": [noise(4, 6)],
        "action_token_shapes": [(4, 1, 1)],
        "action_sequence_indexes": torch.arange(86, 90),
        "action_mse_loss_indexes": torch.arange(87, 90),
        "action_timesteps": torch.full((3,), 500.0),
        "action_noisy_frame_indexes": [torch.arange(1, 4)],
        "action_domain_ids": [torch.tensor(1)],
    }


add(
    "Cosmos3OmniTransformer",
    {
        "head_dim": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "latent_channel": 4,
        "latent_patch_size": 2,
        "patch_latent_dim": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_axes_dim": (2, 1, 1),
        "action_gen": True,
        "action_dim": 6,
        "num_embodiment_domains": 3,
        "sound_gen": True,
        "sound_dim": 3,
        "vocab_size": 32,
    },
    _omni,
)
