"""DINOv2, whose halves end in a layer scale and a drop path."""

from __future__ import annotations

from .base import PreNorm, register_encoder


@register_encoder
class Dinov2(PreNorm):
    """`Dinov2Model`: the class token in front is kept."""

    name = "dinov2"
    classes = ("Dinov2Model",)
    images = True
    blocks = "encoder.layer"
    attention = "attention"
    norms = ("norm1", "norm2")
    after_attention = ("layer_scale1", "drop_path")
    after_mlp = ("layer_scale2", "drop_path")
    prefix = 1
