"""The image side of SigLIP, which has no class token."""

from __future__ import annotations

from .base import PreNorm, register_encoder


@register_encoder
class SiglipVision(PreNorm):
    """`SiglipVisionModel`: its pooling head reads each group's row once for every token in it."""

    name = "siglip_vision"
    classes = ("SiglipVisionModel",)
    images = True
    blocks = "encoder.layers"
    attention = "self_attn"
    heads = "num_heads"
    norms = ("layer_norm1", "layer_norm2")
