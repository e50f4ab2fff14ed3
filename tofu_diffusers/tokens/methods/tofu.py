"""Prune where the network bends, merge where it is near linear: Token Fusion.

ToFu (WACV 2024, arXiv 2312.01026): one matching, and by depth the merge prune or MLERP.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import register
from .tome import Tome


@register
@dataclass(frozen=True)
class Tofu(Tome):
    """ToMe's matching; prune and copy before the switch depth, MLERP and its inverse from it on.

    Options:
        switch: depth in [0, 1] from which tokens are merged; 0: always, 1: only at the very end.
            The others are ToMe's.
    """

    name = "tofu"

    switch: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.switch, (int, float)) and not isinstance(self.switch, bool)
        if not number or not 0 <= self.switch <= 1:
            raise ValueError(f"switch is {self.switch!r}; give a depth from 0 to 1")

    def merge(self, depth: float) -> str:
        return "prune" if depth < self.switch else "mlerp"

    def unmerge(self, depth: float) -> str:
        return "copy" if depth < self.switch else "mlerp"
