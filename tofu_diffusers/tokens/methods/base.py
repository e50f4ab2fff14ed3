"""What a method is: a pure function from the evidence about the tokens to a plan."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..grid import TokenGrid
from ..plan import Plan
from ..sources import SOURCES

_T = TypeVar("_T")


@dataclass(frozen=True)
class Evidence:
    """Everything that a method may look at.

    Attributes:
        metric: [B, N, C], the features to match by, any float dtype.
        grid: where the N tokens stand.
        remove: how many to remove, 0 < remove < N.
        depth: of the site in the denoiser, 0 (first) to 1 (last).
        step: 0-d float32; None: unknown.
        age: [B, N] float32, steps since each token was last computed; 1: at the last step.
        importance: [B, N] float32, zero or more and higher is kept, by each of the method's `sources`.
        seed: of the image.
        matched: whether anybody reads where removed tokens go; if not, a method that need not know for its
            choice leaves it open: they go to the first kept one.
        constants: where `once` keeps what it has made, for as long as the caller likes; None: nowhere.
    """

    metric: Tensor
    grid: TokenGrid
    remove: int
    depth: float = 0.0
    step: Tensor | None = None
    age: Tensor | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    matched: bool = True
    constants: dict[Any, Any] | None = None

    def once(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        """What `make` gives, which must depend on the grid, the device and the key alone.

        Made again in traced code, where it is a constant of the graph.
        """
        if self.constants is None or torch.compiler.is_compiling():
            return make()
        full = (key, self.grid, self.metric.device)
        if full not in self.constants:
            self.constants[full] = make()
        made: _T = self.constants[full]
        return made


class Method(ABC):
    """Base of all methods. A subclass is a frozen dataclass whose fields are its options.

    It names itself, validates its options in `__post_init__`, and implements `choose`. A removed
    token is assigned to the most similar kept token among the method's candidates (`Evidence.matched`).
    """

    name: ClassVar[str]
    reads_depth: ClassVar[bool] = False
    """Whether the plan depends on `Evidence.depth`: if so, compiled blocks of each depth differ."""

    same_for_all: ClassVar[bool] = False
    """Whether the same tokens are kept in every image, because only the seed decides."""

    bounds_age: ClassVar[bool] = False
    """Whether the method has an option `max_age` and lets no token wait longer."""

    @property
    def sources(self) -> tuple[str, ...]:
        """What `Evidence.importance` must hold; none: the method does not read it."""
        return ()

    @property
    def warmup(self) -> int:
        """Steps that must compute all tokens before there is evidence."""
        return max((SOURCES[source].warmup for source in self.sources), default=0)

    @property
    def max_ratio(self) -> float:
        """The highest ratio that any grid allows; 1.0: any ratio below 1."""
        return 1.0

    def max_remove(self, grid: TokenGrid) -> int:
        """The most tokens that can be removed on this very grid."""
        return grid.tokens - 1

    @property
    def merge_changes(self) -> tuple[float, ...]:
        """Depths from which on `merge` or `unmerge` says something else than before."""
        return ()

    def merge(self, depth: float) -> str:
        """The merge that belongs to the method at a depth."""
        return "prune"

    def unmerge(self, depth: float) -> str:
        """The unmerge that belongs to the method at a depth."""
        return "copy"

    def plan(self, evidence: Evidence) -> Plan:
        """The tokens to keep and where the others go.  -> kept [B, N - remove], assign [B, N].

        Raises:
            ValueError: the metric does not fit the grid, or more is asked than the method can do.
        """
        tokens, remove = evidence.grid.tokens, evidence.remove
        if evidence.metric.ndim != 3 or evidence.metric.shape[1] != tokens:
            raise ValueError(
                f"metric is {tuple(evidence.metric.shape)} but the grid has {tokens} image tokens; "
                "give [B, N, C] without the text tokens"
            )
        most = self.max_remove(evidence.grid)
        if not 0 < remove <= most:
            limit = f"1 to {most} are possible" if most > 0 else "none can go"
            raise ValueError(
                f"{self.name} cannot remove {remove} of {tokens} tokens: {limit} "
                f"on {evidence.grid.sides} (frames, rows, columns); change the ratio"
            )
        return self.choose(evidence)

    @abstractmethod
    def choose(self, evidence: Evidence) -> Plan:
        """The plan, for evidence already checked. Tensor ops only: it runs in traced code."""


METHODS: dict[str, type[Method]] = {}

_M = TypeVar("_M", bound=type[Method])


def register(cls: _M) -> _M:
    """Class decorator: make the method known by its `name`."""
    if cls.name in METHODS and METHODS[cls.name].__qualname__ != cls.__qualname__:
        raise ValueError(f"the method name {cls.name!r} is taken by {METHODS[cls.name].__name__}")
    METHODS[cls.name] = cls
    return cls


def hint(word: str, valid: list[str]) -> str:
    """' (did you mean ...?)', or nothing."""
    close = difflib.get_close_matches(word, valid, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def make_method(name: str, **options: Any) -> Method:
    """The method of that name with its options.

    Raises:
        ValueError: an unknown name or option, or a value that the method refuses.
    """
    if name not in METHODS:
        valid = sorted(METHODS)
        raise ValueError(
            f"unknown method {name!r}{hint(str(name), valid)}; choose one of {', '.join(valid)}"
        )
    cls = METHODS[name]
    allowed = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"method {name!r} has no option {option!r}{hint(option, allowed)}; "
                f"it has {', '.join(allowed) or 'none'}"
            )
    return cls(**options)


def as_sides(name: str, value: Any, count: int) -> tuple[int, ...]:
    """An option that is one int, for every axis, or one int for each of the last `count` axes."""
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(sides) != count or not all(type(side) is int and side >= 1 for side in sides):
        raise ValueError(f"{name} is {value!r}; give an int >= 1 or {count} of them")
    return sides
