"""ViT, and the models that hold one."""

from __future__ import annotations

from .base import PreNorm, register_encoder


@register_encoder
class Vit(PreNorm):
    """`ViTModel`: the class token in front is kept."""

    name = "vit"
    classes = ("ViTModel",)
    images = True
    blocks = "layers"
    attention = "attention"
    norms = ("layernorm_before", "layernorm_after")
    after_attention = ("dropout",)
    after_mlp = ("dropout",)
    prefix = 1
