"""Transformers of images of several families, and the prior of unCLIP and Kandinsky."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina

from .base import Inputs, Noise, add
from .prompts import prompt_mask


def _aura_flow(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "encoder_hidden_states": noise(2, 7, 16),
        # From 1 at noise to 0 at the image.
        "timestep": torch.tensor([0.5, 0.5]),
        "attention_kwargs": None,
    }


add(
    "AuraFlowTransformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 64,
    },
    _aura_flow,
)


def _hunyuan_dit(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": noise(2, 7, 16),
        "text_embedding_mask": prompt_mask(),
        "encoder_hidden_states_t5": noise(2, 9, 24),
        "text_embedding_mask_t5": torch.tensor([[1, 1, 1, 1] + [0] * 5, [1] * 8 + [0]]),
        # Original size, target size, corner of the crop.
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 64.0, 96.0, 0.0, 0.0]] * 2),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            8, ((0, 0), (4, 6)), (4, 6), device=torch.device("cpu"), output_type="pt"
        ),
    }


add(
    "HunyuanDiT2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        # The fifth and sixth block read what the first and second left.
        "num_layers": 6,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 16,
        "text_len": 7,
        "text_len_t5": 9,
    },
    _hunyuan_dit,
)


def _lumina(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        # From 0 at noise to 1 at the image.
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, 7, 16),
        "encoder_mask": prompt_mask(),
        # Of a grid larger than the image's.
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(
            8, 24, 24, linear_factor=1.0, ntk_factor=1.0
        ),
        "cross_attention_kwargs": {"base_sequence_length": 16},
    }


add(
    "LuminaNextDiT2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "cross_attention_dim": 16,
    },
    _lumina,
)


def _sana(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 4, 4, 6),
        "encoder_hidden_states": noise(2, 7, 16),
        "encoder_attention_mask": prompt_mask(),
        "timestep": torch.tensor([500.0, 500.0]),
        "attention_kwargs": None,
    }


add(
    "SanaTransformer2DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
    },
    _sana,
)


def _prior(noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(2, 16),
        "timestep": torch.tensor(500),
        "proj_embedding": noise(2, 16),
        "encoder_hidden_states": noise(2, 7, 16),
        "attention_mask": prompt_mask(torch.bool),
    }


add(
    "PriorTransformer",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "embedding_dim": 16,
        "num_embeddings": 7,
    },
    _prior,
)
