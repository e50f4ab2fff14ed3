"""Both sides of CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Kwargs, PreNorm, register_encoder

LEGACY_EOS = 2
"""A configuration with this end of a text pools at the highest number instead."""


class _Clip(PreNorm):
    blocks = "encoder.layers"
    attention = "self_attn"
    heads = "num_heads"
    norms = ("layer_norm1", "layer_norm2")
    prefix = 1


@register_encoder
class ClipVision(_Clip):
    """`CLIPVisionModel`: the class token in front is kept."""

    name = "clip_vision"
    classes = ("CLIPVisionModel",)
    images = True


@register_encoder
class ClipText(_Clip):
    """`CLIPTextModel`: the start of the text and its end, which is pooled, are kept."""

    name = "clip_text"
    classes = ("CLIPTextModel",)
    causal = True

    def kept(self, model: Any, named: Kwargs) -> Tensor | None:
        if named.get("input_ids") is None:  # which CLIP refuses in its own words
            return None
        ids = named["input_ids"].view(-1, named["input_ids"].shape[-1]).to(torch.int)
        if model.eos_token_id != LEGACY_EOS:
            ids = (ids == model.eos_token_id).int()
        end: Tensor = ids.argmax(dim=-1, keepdim=True)
        return end
