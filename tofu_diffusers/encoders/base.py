"""What an encoder family must say: where its blocks are, their two halves, and which tokens must stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

Kwargs = dict[str, Any]


class EncoderFamily(ABC):
    """One kind of encoder. Subclasses hold no state."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    """Of the modules whose call is one run over the blocks, by name."""

    blocks: ClassVar[str]
    """Dotted name of the list of blocks in such a module."""

    attention: ClassVar[str]
    """Dotted name of the module in a block that has the projections of queries and keys."""

    queries: ClassVar[str] = "q_proj"
    keys: ClassVar[str] = "k_proj"
    heads: ClassVar[str] = "num_attention_heads"
    """Names of those projections and of the number of heads in it."""

    images: ClassVar[bool] = False
    """Whether it encodes images; of a model with an image and a text side, the image side is reduced."""

    prefix: ClassVar[int] = 0
    """How many tokens at the front are always kept: class tokens, register tokens, the start of a text."""

    causal: ClassVar[bool] = False
    """Whether a token sees only those before it."""

    query_scale: ClassVar[float] = 0.0
    """Power of the head's width that the queries lack, for attention that does not scale them."""

    def refusal(self, model: Any) -> str | None:
        """Say why this very model cannot be reduced; None if it can."""
        return None

    def kept(self, model: Any, named: Kwargs) -> Tensor | None:
        """Position of the one further token of each row that must be kept.  -> [B, 1] int64, or None."""
        return None

    def example(self, model: Any) -> Kwargs:
        """The arguments of a typical call, on the meta device."""
        config = model.config
        return pixels(config) if self.images else text(config.max_position_embeddings)

    @abstractmethod
    def attend(self, block: Any, x: Tensor, mask: Tensor | None, named: Kwargs) -> tuple[Any, ...]:
        """The first half of a block: attention with its residual.

        Args:
            block: The block.
            x: [B, K, C].
            mask: What its attention is given as mask.
            named: The other arguments of the block.

        Returns:
            [B, K, C], and what the block returns beside.
        """

    @abstractmethod
    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """The second half of a block.  [B, K, C] -> [B, K, C]."""

    def follow(self, named: Kwargs, positions: Tensor) -> Kwargs:
        """What of the block's other arguments belongs to the kept tokens, at positions [B, K]."""
        return named

    def output(self, x: Tensor, beside: tuple[Any, ...], named: Kwargs) -> Any:
        """What the block returns."""
        return x


class PreNorm(EncoderFamily):
    """Blocks that normalise before each half: x + f(attention(norm(x))), then x + g(mlp(norm(x))).

    `f` and `g` are the modules of `after_attention` and `after_mlp`, in order.
    """

    norms: ClassVar[tuple[str, str]]
    mlp: ClassVar[str] = "mlp"
    after_attention: ClassVar[tuple[str, ...]] = ()
    after_mlp: ClassVar[tuple[str, ...]] = ()

    def attend(self, block: Any, x: Tensor, mask: Tensor | None, named: Kwargs) -> tuple[Any, ...]:
        attention = block.get_submodule(self.attention)
        y = attention(getattr(block, self.norms[0])(x), attention_mask=mask, **named)[0]
        for name in self.after_attention:
            y = getattr(block, name)(y)
        return (y + x,)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        y = getattr(block, self.mlp)(getattr(block, self.norms[1])(x))
        for name in self.after_mlp:
            y = getattr(block, name)(y)
        out: Tensor = y + x
        return out


ENCODERS: dict[str, EncoderFamily] = {}

_F = TypeVar("_F", bound=type[EncoderFamily])


def register_encoder(cls: _F) -> _F:
    """Class decorator: make the family known by its `name`."""
    ENCODERS[cls.name] = cls()
    return cls


def encoder_classes() -> dict[str, EncoderFamily]:
    """Class names of encoders and the family of each."""
    return {cls: family for family in ENCODERS.values() for cls in family.classes}


def encoders_in(model: nn.Module, name: str | None) -> list[tuple[nn.Module, EncoderFamily]]:
    """The encoders that a model is or holds, with their families; decoders are left out.

    Args:
        model: Any module.
        name: A family that the model itself is taken for.

    Raises:
        ValueError: if there is no such family.
    """
    if name is not None:
        if name not in ENCODERS:
            raise ValueError(
                f"unknown family {name!r}; choose one of {', '.join(sorted(ENCODERS))}"
            )
        own = [each for each in model.modules() if _family(each) is ENCODERS[name]]
        return [(each, ENCODERS[name]) for each in own or [model]]
    found = [(each, family) for each in model.modules() if (family := _family(each)) is not None]
    found = [(each, family) for each, family in found if not getattr(each, "is_decoder", False)]
    return [each for each in found if each[1].images] or found


def _family(module: nn.Module) -> EncoderFamily | None:
    known = encoder_classes()
    names = (parent.__name__ for parent in type(module).__mro__)
    return next((known[name] for name in names if name in known), None)


def pixels(config: Any) -> Kwargs:
    """One image as the encoder's configuration has it, on the meta device."""
    side = config.image_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    return {"pixel_values": torch.empty(1, config.num_channels, height, width, device="meta")}


def text(tokens: int) -> Kwargs:
    """One text of so many tokens, on the meta device."""
    return {"input_ids": torch.empty(1, tokens, dtype=torch.int64, device="meta")}
