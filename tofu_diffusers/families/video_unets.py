"""UNetMotionModel and UNetSpatioTemporalConditionModel: AnimateDiff and Stable Video Diffusion."""

from __future__ import annotations

from typing import Any

import torch

from .base import BlockStack, Kwargs, register_family
from .frames import FramesFamily
from .stages import stages
from .unet import UNetFamily


@register_family
class UNetMotionFamily(FramesFamily, UNetFamily):
    """The attention over space of a UNet for pictures; motion modules between are not reduced."""

    name = "unet_motion"
    classes = ("UNetMotionModel",)

    def example(self, model: Any) -> Kwargs:
        kwargs, frames = super().example(model), 16
        sample, text = kwargs["sample"], kwargs["encoder_hidden_states"]
        batch, channels, height, width = sample.shape
        video = (batch, channels, frames, height, width)
        # A row of text for each frame.
        kwargs["sample"] = torch.empty(video, device="meta")
        kwargs["encoder_hidden_states"] = torch.empty(
            batch * frames, *text.shape[1:], device="meta"
        )
        return kwargs


@register_family
class UNet3DFamily(FramesFamily, UNetFamily):
    """The attention over space of UNets for videos; that over time, behind each, is not reduced."""

    name = "unet3d"
    classes = ("I2VGenXLUNet", "UNet3DConditionModel")

    def example(self, model: Any) -> Kwargs:
        config, frames = model.config, 16
        size = config.sample_size if config.sample_size is not None else 32
        height, width = (size, size) if isinstance(size, int) else size
        video = (2, config.in_channels, frames, height, width)
        kwargs: Kwargs = {
            "sample": torch.empty(video, device="meta"),
            "timestep": torch.empty((), device="meta"),
            "encoder_hidden_states": torch.empty(2, 77, config.cross_attention_dim, device="meta"),
        }
        if hasattr(model, "image_latents_proj_in"):
            kwargs["fps"] = torch.empty(2, device="meta")
            kwargs["image_latents"] = torch.empty(video, device="meta")
            kwargs["image_embeddings"] = torch.empty(
                2, 1, config.cross_attention_dim, device="meta"
            )
        return kwargs


@register_family
class UNetSpatioTemporalFamily(FramesFamily, UNetFamily):
    """Blocks over space and over time by turns, each over space a stack; latents are [B, F, C, H, W]."""

    name = "unet_spatio_temporal"
    classes = ("UNetSpatioTemporalConditionModel",)
    frames_dim = 1

    def block_stacks(self, model: Any) -> list[BlockStack]:
        return [
            BlockStack(name, resolution, ((name, block),))
            for stage, holder, resolution in stages(model)
            for i, transformer in enumerate(getattr(holder, "attentions", None) or [])
            for j, block in enumerate(transformer.transformer_blocks)
            for name in (f"{stage}.attentions.{i}.transformer_blocks.{j}",)
        ]

    def example(self, model: Any) -> Kwargs:
        config = model.config
        height, width = 72, 128  # 576 x 1024 pixels
        video = (2, config.num_frames, config.in_channels, height, width)
        times = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
        return {
            "sample": torch.empty(video, device="meta"),
            "timestep": torch.empty((), device="meta"),
            "encoder_hidden_states": torch.empty(2, 1, config.cross_attention_dim, device="meta"),
            "added_time_ids": torch.empty(2, times, device="meta"),
        }
