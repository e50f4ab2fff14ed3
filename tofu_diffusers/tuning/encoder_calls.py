"""An encoder that is measured: what it is given, what it gives, and its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..api import only_encoder
from ..encoders import EncoderFamily
from ..hooks.patch import compiled_alone
from ..tokens.grid import TokenGrid


@dataclass(frozen=True)
class MeasuredEncoder:
    """A model and the one encoder in it.

    Attributes:
        model: What is called.
        root: The encoder, the model itself or a part of it.
        family: Of the encoder.
    """

    model: nn.Module
    root: nn.Module
    family: EncoderFamily

    @classmethod
    def of(cls, target: Any) -> MeasuredEncoder | None:
        """None of a pipeline or a denoiser.

        Raises:
            ValueError: if it holds several encoders, has tofu or is compiled.
        """
        found = only_encoder(target)
        if found is None:
            return None
        if target is not found[0] or any(compiled_alone(each) for each in found[0].modules()):
            raise ValueError(
                "the encoder is compiled, and compiled calls cannot be watched; calibrate first, then compile"
            )
        return cls(*found)

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Names and blocks, in the order of execution."""
        blocks = self.root.get_submodule(self.family.blocks).named_children()
        return [(f"{self.family.blocks}.{name}", block) for name, block in blocks]

    def grid(self, x: Tensor) -> TokenGrid:
        """Of tokens [B, N, C], behind those that always stay."""
        prefix = self.family.prefix
        return TokenGrid(1, x.shape[1] - prefix, text_before=prefix)

    def __call__(self, given: Any, options: Mapping[str, Any]) -> Tensor:
        """The first output of the model, such as its logits.

        Raises:
            TypeError: if it is not given arguments by name.
            ValueError: if there is padding among them.
        """
        if not isinstance(given, Mapping):
            raise TypeError(
                f"an encoder's input is {type(given).__name__}; give its arguments by name, such as a "
                "tokenizer or a processor returns: {'pixel_values': ...}"
            )
        mask = given.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            padding = int((torch.as_tensor(mask) == 0).sum())
            raise ValueError(
                f"{padding} tokens of an input are padding, which would be measured too; give each text for "
                "itself, without padding"
            )
        out = self.model(**given, **options)
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        return first
