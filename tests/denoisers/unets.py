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


HEIGHT, WIDTH = 8, 12
FRAMES = 3
TEXT = 7

SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def _wave(noise: Noise) -> Inputs:
    return {"sample": noise(2, 2, 96), "timestep": torch.tensor(500)}


add(
    "UNet1DModel",
    {
        "sample_size": 64,
        "extra_in_channels": 32,
        "block_out_channels": (16, 32, 32),
    },
    _wave,
)


def _image(noise: Noise) -> Inputs:
    return {"sample": noise(2, 3, HEIGHT, WIDTH), "timestep": torch.tensor(500)}


add(
    "UNet2DModel",
    {
        **SMALL,
        "sample_size": HEIGHT,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    _image,
)


def _video(noise: Noise) -> Inputs:
    return {
        "sample": noise(2, 4, FRAMES, HEIGHT, WIDTH),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "cross_attention_kwargs": None,
    }


VIDEO = {
    **SMALL,
    "sample_size": HEIGHT,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}

add("UNet3DConditionModel", VIDEO, _video)


def _image_to_video(noise: Noise) -> Inputs:
    """The frames after the image's hold their place in the video."""
    image = noise(1, 4, 1, HEIGHT, WIDTH)
    places = [torch.full_like(image, place / (FRAMES - 1)) for place in range(1, FRAMES)]
    return {
        **_video(noise),
        "fps": torch.tensor([16, 16]),
        "image_latents": torch.cat([image, *places], dim=2).repeat(2, 1, 1, 1, 1),
        "image_embeddings": noise(2, 1, 16),
    }


add("I2VGenXLUNet", VIDEO, _image_to_video)


def _motion(noise: Noise) -> Inputs:
    """A row of text for each frame."""
    return {
        **_video(noise),
        "encoder_hidden_states": noise(2, TEXT, 16).repeat_interleave(FRAMES, dim=0),
        "added_cond_kwargs": None,
    }


add(
    "UNetMotionModel",
    {
        **SMALL,
        "sample_size": HEIGHT,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "cross_attention_dim": 16,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    },
    _motion,
)


def _stable_video(noise: Noise) -> Inputs:
    """Frames come before channels, whose second half is of the image."""
    return {
        "sample": noise(2, FRAMES, 8, HEIGHT, WIDTH),
        "timestep": torch.tensor(1.5),
        "encoder_hidden_states": noise(2, 1, 16),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(2, 1),
    }


# Its norms have groups of 32 channels.
add(
    "UNetSpatioTemporalConditionModel",
    {
        "sample_size": HEIGHT,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "num_attention_heads": (2, 2),
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 48,
        "num_frames": FRAMES,
    },
    _stable_video,
)


def _dream_lite(noise: Noise) -> Inputs:
    """Latents beside those of the image to edit."""
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[0, 3:] = 0
    return {
        "sample": noise(2, 4, HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor(500.0).expand(2),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"time_ids": torch.tensor([[8.0 * WIDTH, 8.0 * HEIGHT]]).repeat(2, 1)},
    }


add(
    "DreamLiteUNetModel",
    {
        "sample_size": HEIGHT,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "addition_embed_type": "time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16,
    },
    _dream_lite,
)


def _kandinsky(noise: Noise) -> Inputs:
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[0, 3:] = 0
    return {
        "sample": noise(2, 4, HEIGHT, 2 * HEIGHT),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_attention_mask": mask,
    }


# Which of the levels attend is fixed for four of them.
add(
    "Kandinsky3UNet",
    {
        "time_embedding_dim": 16,
        "groups": 4,
        "attention_head_dim": 8,
        "layers_per_block": 2,
        "block_out_channels": (16, 16, 32, 32),
        "cross_attention_dim": 16,
        "encoder_hid_dim": 16,
    },
    _kandinsky,
)


def _cascade(noise: Noise) -> Inputs:
    """The prior's call, with no image to start from."""
    return {
        "sample": noise(2, 4, HEIGHT, WIDTH),
        "timestep_ratio": torch.tensor([0.5, 0.5]),
        "clip_text_pooled": noise(2, 1, 16),
        "clip_text": noise(2, TEXT, 16),
        "clip_img": torch.zeros(2, 1, 16),
    }


add(
    "StableCascadeUNet",
    {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 16,
        "conditioning_dim": 16,
        "block_out_channels": (32, 32),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (2, 1),
        "switch_level": (False,),
        "clip_text_in_channels": 16,
        "clip_text_pooled_in_channels": 16,
        "clip_image_in_channels": 16,
    },
    _cascade,
)


def _tokens(noise: Noise) -> Inputs:
    """Tokens of an image, most of them masked by the last one. It is told no time."""
    known = torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    return {
        "input_ids": torch.where(known % 3 == 0, known % 31, 31).repeat(2, 1, 1),
        "micro_conds": torch.tensor([8 * WIDTH, 8 * HEIGHT, 0, 0, 6]).expand(2, -1),
        "pooled_text_emb": noise(2, 16),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "cross_attention_kwargs": None,
    }


add(
    "UVit2DModel",
    {
        "hidden_size": 32,
        "cond_embed_dim": 16,
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 16,
        "vocab_size": 32,
        "codebook_size": 31,
        "in_channels": 16,
        "block_out_channels": 16,
        "num_res_blocks": 2,
        "downsample": True,
        "upsample": True,
        "block_num_heads": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "sample_size": HEIGHT,
    },
    _tokens,
)
