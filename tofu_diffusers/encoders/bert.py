"""BERT, which normalises behind each half."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import EncoderFamily, Kwargs, register_encoder

OF_DECODERS = ("encoder_hidden_states", "encoder_attention_mask")


@register_encoder
class Bert(EncoderFamily):
    """`BertModel` as an encoder: the first token, which is pooled, is kept."""

    name = "bert"
    classes = ("BertModel",)
    blocks = "encoder.layer"
    attention = "attention.self"
    queries = "query"
    keys = "key"
    prefix = 1

    def refusal(self, model: Any) -> str | None:
        if model.config.is_decoder:
            return (
                "BertModel is a decoder here, and tokens leave encoders alone; set is_decoder=False"
            )
        if model.config.chunk_size_feed_forward:
            return (
                f"chunk_size_feed_forward {model.config.chunk_size_feed_forward} cuts the tokens of a "
                "feed-forward, which become fewer; set it to 0"
            )
        return None

    def attend(self, block: Any, x: Tensor, mask: Tensor | None, named: Kwargs) -> tuple[Any, ...]:
        given = {name: value for name, value in named.items() if name not in OF_DECODERS}
        return (block.attention(x, mask, **given)[0],)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.feed_forward_chunk(x)
        return out
