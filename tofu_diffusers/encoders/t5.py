"""The encoder of T5, whose first block makes the position bias of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import EncoderFamily, Kwargs, register_encoder, text

TYPICAL = 512
"""Tokens of a typical text; T5 has no limit."""


@register_encoder
class T5(EncoderFamily):
    """`T5Stack` as an encoder, as in `T5EncoderModel`: no token must stay."""

    name = "t5"
    classes = ("T5Stack",)
    blocks = "block"
    attention = "layer.0.SelfAttention"
    queries = "q"
    keys = "k"
    heads = "n_heads"
    query_scale = 0.5

    def refusal(self, model: Any) -> str | None:
        if model.is_decoder:
            return "T5Stack is a decoder here, and tokens leave encoders alone; give the encoder"
        return None

    def attend(self, block: Any, x: Tensor, mask: Tensor | None, named: Kwargs) -> tuple[Any, ...]:
        given = {name: value for name, value in named.items() if "encoder" not in name}
        x, bias, _ = block.layer[0](x, attention_mask=mask, **given)
        return _finite(x), bias

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        return _finite(block.layer[-1](x))

    def follow(self, named: Kwargs, positions: Tensor) -> Kwargs:
        bias = named["position_bias"][0][:, positions[:, :, None], positions[:, None, :]]
        return {**named, "position_bias": bias.transpose(0, 1)}

    def output(self, x: Tensor, beside: tuple[Any, ...], named: Kwargs) -> Any:
        # The blocks behind are handed the bias of all tokens, and take their own from it.
        bias = beside[0] if named.get("position_bias") is None else named["position_bias"]
        return x, bias, None

    def example(self, model: Any) -> Kwargs:
        return text(TYPICAL)


def _finite(x: Tensor) -> Tensor:
    """Clamp what overflows in float16, as T5 does."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), most - 1000, most)
    return torch.clamp(x, min=-limit, max=limit)
