"""ChromaTransformer2DModel: FLUX blocks whose modulation comes from one table, with a mask over the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Kwargs, MaskedText, register_family, seen_by_numbers
from .flux import TextInSequenceFamily, packed_example


@register_family
class ChromaFamily(TextInSequenceFamily):
    """Joint blocks, then single blocks on one sequence of text and image."""

    name = "chroma"
    classes = ("ChromaTransformer2DModel",)
    # The mask is over text and image.
    texts = (MaskedText("encoder_hidden_states", "attention_mask", ids="txt_ids"),)

    def sees_padding(self, model: Any, named: Kwargs) -> str | None:
        seen = seen_by_numbers(
            named.get("attention_mask"),
            "attention_mask",
            "give the pipeline prompt_embeds with a prompt_attention_mask of bool (and the negative ones)",
        )
        if seen is None and torch.is_grad_enabled() and model.gradient_checkpointing:
            return (
                "with gradient checkpointing single blocks get no mask, so that padding is seen; call "
                "disable_gradient_checkpointing()"
            )
        return seen

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        if hasattr(block, "norm1"):
            return {"attn": block.norm1(x, emb=kwargs["temb"][:, :6])[0]}
        return {"attn": block.norm(x, emb=kwargs["temb"])[0]}

    def example(self, model: Any) -> Kwargs:
        return packed_example(model)
