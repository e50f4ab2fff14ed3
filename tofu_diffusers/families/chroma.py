"""ChromaTransformer2DModel: FLUX blocks whose modulation comes from one table, with a mask over the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Kwargs, register_family
from .flux import TextInSequenceFamily, packed_example


@register_family
class ChromaFamily(TextInSequenceFamily):
    """Joint blocks, then single blocks on one sequence of text and image."""

    name = "chroma"
    classes = ("ChromaTransformer2DModel",)

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        if hasattr(block, "norm1"):
            return {"attn": block.norm1(x, emb=kwargs["temb"][:, :6])[0]}
        return {"attn": block.norm(x, emb=kwargs["temb"])[0]}

    def example(self, model: Any) -> Kwargs:
        return packed_example(model)
