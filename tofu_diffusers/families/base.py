"""What a family must say of its denoisers: where tokens can shrink, on what grid, and what follows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..grid import TokenGrid
from ..plan import Plan

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Blocks that follow each other on one token grid with nothing between them.

    Args:
        name: Dotted name of the module that holds the blocks.
        level: Which of the family's grids the tokens lie on (0 = finest).
        blocks: (dotted name, module) in the order of execution.
    """

    name: str
    level: int
    blocks: tuple[tuple[str, nn.Module], ...]


class Family(ABC):
    """One kind of denoiser. Subclasses hold no state; what they know of a call is in its arguments.

    A block takes its image tokens [B, N, C] as first argument or as `hidden_states`.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    sample_name: ClassVar[str]
    """Name of the root's first argument, the noisy latents [B, C, (F,) H, W]."""
    output_index: ClassVar[int | None] = None
    """Where the image tokens stand in what a block returns; None: they are all it returns."""

    @abstractmethod
    def runs(self, model: nn.Module) -> list[Run]:
        """The denoiser's runs of blocks, in the order of execution."""

    @abstractmethod
    def attentions(self, block: nn.Module) -> dict[str, nn.Module]:
        """A block's self-attention modules over image tokens, by attribute name, in order of execution."""

    @abstractmethod
    def grids(self, model: nn.Module, sample: Tensor) -> dict[int, TokenGrid]:
        """The token grid of every level for these latents."""

    @abstractmethod
    def attention_inputs(
        self, block: nn.Module, x: Tensor, args: Args, kwargs: Kwargs
    ) -> dict[str, Tensor]:
        """What each self-attention of the block would read if it were given the tokens x [B, M, C].

        Token-wise, so that it can be asked for any tokens: context "fresh" projects the keys and values of
        removed tokens from it.

        Raises:
            ValueError: if this block's normalisation is not known.
        """

    @abstractmethod
    def example(self, model: nn.Module) -> Kwargs:
        """Arguments of one forward at the model's own sample size, batch 2, on the meta device."""

    def splits_runs(self, kwargs: Kwargs) -> str | None:
        """What in this call stands between blocks of a run, so that they must be run one by one."""
        return None

    def refusal(self, scope: str, kwargs: Kwargs) -> str | None:
        """Why this call cannot be run with reduced tokens in this scope, and a way out; or None."""
        return None

    def follow(self, args: Args, kwargs: Kwargs, plan: Plan, context: str) -> tuple[Args, Kwargs]:
        """The arguments that must follow the kept tokens, sliced."""
        return args, kwargs

    def sample(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The latents among the root's arguments."""
        sample: Tensor = args[0] if args else kwargs[self.sample_name]
        return sample

    @staticmethod
    def hidden(args: Args, kwargs: Kwargs) -> Tensor:
        """The image tokens among a block's (or attention's) arguments."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    @staticmethod
    def with_hidden(args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
        """A block's arguments with other image tokens."""
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}

    def output(self, out: Any) -> Tensor:
        """The image tokens in what a block returned."""
        tokens: Tensor = out if self.output_index is None else out[self.output_index]
        return tokens

    def with_output(self, out: Any, x: Tensor) -> Any:
        """What a block returned, with other image tokens."""
        if self.output_index is None:
            return x
        return tuple(x if i == self.output_index else part for i, part in enumerate(out))


FAMILIES: dict[str, Family] = {}


def register_family(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known by its name and by the denoiser classes it lists."""
    FAMILIES[cls.name] = cls()
    return cls


def find_family(model: nn.Module, name: str | None = None) -> Family:
    """The family of a denoiser, by name or else by its class (or a parent class).

    Raises:
        ValueError: if the name is unknown, or no family lists the class.
    """
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(
                f"unknown family {name!r}; choose one of {', '.join(sorted(FAMILIES))}"
            )
        return FAMILIES[name]
    parents = [cls.__name__ for cls in type(model).__mro__]
    for family in FAMILIES.values():
        if any(parent in family.classes for parent in parents):
            return family
    raise ValueError(
        f"no family for denoiser class {type(model).__name__}; known are "
        f"{', '.join(sorted(known_classes()))}. Name one with family=... if its blocks are "
        "the same, or add a family"
    )


def known_classes() -> Mapping[str, str]:
    """Denoiser class names and the family each belongs to."""
    return {cls: family.name for family in FAMILIES.values() for cls in family.classes}
