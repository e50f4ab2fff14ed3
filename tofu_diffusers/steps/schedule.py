"""How strongly tofu acts at a noise level or at a depth: a factor in [0, 1] on the ratio.

A schedule is read twice a site: over the noise level (position 0 = pure noise, 1 = clean image) and
over the depth (0 = first block, 1 = last block). The two factors multiply, and the product is
quantised, so that a generation uses few distinct token counts and a compiled model few graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

KINDS = ("constant", "linear", "cosine", "explicit")
QUANTA = 4


@dataclass(frozen=True)
class Schedule:
    """A factor on the ratio, over a position in [0, 1].

    Args:
        kind: "constant" (always `start`), "linear" or "cosine" (from `start` at position 0 to `end`
            at position 1), or "explicit" (`points`, linearly interpolated, constant outside).
        start: Factor at position 0, in [0, 1].
        end: Factor at position 1, in [0, 1]. Not used by "constant" and "explicit".
        points: For "explicit": (position, factor) pairs, positions ascending.

    Raises:
        ValueError: on an unknown kind, a factor or position outside [0, 1], or points that do not ascend.
    """

    kind: str = "constant"
    start: float = 1.0
    end: float = 1.0
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown schedule kind {self.kind!r}; choose one of {', '.join(KINDS)}"
            )
        try:
            points = tuple((float(position), float(factor)) for position, factor in self.points)
            for name in ("start", "end"):
                object.__setattr__(self, name, float(getattr(self, name)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"points must be pairs of numbers (position, factor), start and end numbers, not "
                f"{self.points!r}, {self.start!r}, {self.end!r}"
            ) from error
        object.__setattr__(self, "points", points)
        if (self.kind == "explicit") != bool(points):
            raise ValueError(
                f"schedule kind {self.kind!r} with {len(points)} points: 'explicit' needs at least one "
                "(position, factor) pair, the other kinds take none"
            )
        numbers = [self.start, self.end, *(value for point in points for value in point)]
        for value in numbers:
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"schedule value {value} is outside [0, 1]; factors scale the ratio down"
                )
        positions = [position for position, _ in points]
        if positions != sorted(set(positions)):
            raise ValueError(f"schedule positions {positions} must ascend")

    @property
    def is_constant(self) -> bool:
        """Whether every step, or every depth, has the same factor."""
        return self.kind == "constant"

    def factor(self, position: float) -> float:
        """Factor in [0, 1] at a position in [0, 1]."""
        position = min(1.0, max(0.0, position))
        if self.kind == "constant":
            return self.start
        if self.kind == "explicit":
            return _interpolate(self.points, position)
        if self.kind == "cosine":
            position = (1.0 - math.cos(math.pi * position)) / 2.0
        return self.start + (self.end - self.start) * position

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """A schedule from itself, a kind's name, its JSON form, or a list of (position, factor) pairs.

        By name, "linear" and "cosine" run from 1 at position 0 down to 0 at position 1.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value, end=1.0 if value == "constant" else 0.0)
        if isinstance(value, Mapping):
            known = [each.name for each in fields(cls)]
            if unknown := [name for name in value if name not in known]:
                raise ValueError(
                    f"a schedule has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
                )
            return cls(**value)
        if isinstance(value, Sequence):
            return cls("explicit", points=tuple(value))
        raise TypeError(
            f"a schedule is a Schedule, a name ({', '.join(KINDS)}), a mapping or a list of pairs, "
            f"not {type(value).__name__}"
        )


def quantise(factor: float) -> float:
    """The nearest multiple of 1 / QUANTA: few distinct ratios, few compiled graphs."""
    return round(factor * QUANTA) / QUANTA


def _interpolate(points: Sequence[tuple[float, float]], position: float) -> float:
    if position <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if position <= right:
            # The fraction first: it is exact at the right end, however close the two positions are.
            return low + (high - low) * ((position - left) / (right - left))
    return points[-1][1]
