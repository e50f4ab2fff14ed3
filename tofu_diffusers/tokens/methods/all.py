"""Every token goes: what is left to choose is at which steps. The method of scope "step", and of no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ..grid import TokenGrid
from .base import Evidence, Method


@dataclass(frozen=True)
class All(Method):
    """All tokens leave together, at the steps that `schedule.left_out` names. Not among `METHODS`."""

    name = "all"

    def max_remove(self, grid: TokenGrid) -> int:
        return grid.tokens

    def restore(self, depth: float) -> str:
        return "taylor"

    def choose(self, evidence: Evidence) -> NoReturn:
        raise TypeError("method 'all' keeps no token, so there is no plan to make")
