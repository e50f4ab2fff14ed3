"""Prune where the network bends, merge where it is near linear: Token Fusion.

ToFu (WACV 2024, arXiv 2312.01026): one matching, and by depth the merge prune or MLERP.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .base import register
from .tome import Tome


@register
@dataclass(frozen=True)
class Tofu(Tome):
    """ToMe's matching; prune and copy before the switch depth, MLERP and its inverse from it on.

    Options:
        switch: depth in [0, 1] from which tokens are merged; 0: always, 1: only at the very end. Or
            ascending depths: tokens are merged from the first on, pruned again from the second on,
            and so forth; none: never merged. The others are ToMe's.
    """

    name = "tofu"

    switch: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.switch
        if isinstance(given, list):
            object.__setattr__(self, "switch", tuple(given))
        depths = self.merge_changes
        numbers = all(isinstance(d, (int, float)) and not isinstance(d, bool) for d in depths)
        if not numbers or not all(0 <= d <= 1 for d in depths):
            raise ValueError(f"switch is {given!r}; give a depth from 0 to 1, or several")
        if not all(before < after for before, after in pairwise(depths)):
            raise ValueError(f"switch is {given!r}; give depths that ascend, each once")

    @property
    def merge_changes(self) -> tuple[float, ...]:
        return self.switch if isinstance(self.switch, tuple) else (self.switch,)

    def _merges(self, depth: float) -> bool:
        return bisect_right(self.merge_changes, depth) % 2 == 1

    def merge(self, depth: float) -> str:
        return "mlerp" if self._merges(depth) else "prune"

    def unmerge(self, depth: float) -> str:
        return "mlerp" if self._merges(depth) else "copy"
