"""CogView3PlusTransformer2DModel: joint blocks whose positions are added at patchify."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Kwargs, register_family
from .cogview4 import CogView4Family


@register_family
class CogView3PlusFamily(CogView4Family):
    """One stack of all blocks; text and image are projected together, the text first."""

    name = "cogview3plus"
    classes = ("CogView3PlusTransformer2DModel",)
    guidance_in_batch = True
    shared_positions = False

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {"attn1": block.norm1(x, x[:, :0], kwargs["emb"])[0]}

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        return None
