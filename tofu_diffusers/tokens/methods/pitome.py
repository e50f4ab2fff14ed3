"""Merge tokens that have many look-alikes, keep the isolated ones: PiToMe.

Energy-based merging (arXiv 2405.16148).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..grid import TokenGrid
from ..plan import Plan, highest
from .base import Evidence, Method, register
from .matching import as_window, energies, match, merging


@register
@dataclass(frozen=True)
class Pitome(Method):
    """The 2k tokens of highest energy, in that order, go by turns to A and B; A merges into B.

    The others, of low energy, are protected. The margin shrinks with depth: m = margin * (1 - l/L).

    Options:
        margin: of the similarity, at depth 0; from 0 to 1. The paper has 0.9, its code 0.75.
        alpha: weight of the push of tokens less similar than the margin.
        protect: False lets all tokens take part (the paper's ablation): A and B are the halves
            of the whole order, and the k best pairs merge.
        window: energy and matching only inside tiles: an int, or (frames, rows, columns)
            with None for a whole side.
    """

    name = "pitome"
    reads_depth = True

    margin: float = 0.9
    alpha: float = 1.0
    protect: bool = True
    window: int | tuple[int | None, int | None, int | None] | None = None

    def __post_init__(self) -> None:
        for field, value, most in (("margin", self.margin, 1.0), ("alpha", self.alpha, None)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= (float("inf") if most is None else most):
                limits = "0 or more" if most is None else f"0 to {most:g}"
                raise ValueError(f"{field} is {value!r}; give a number, {limits}")
        if not isinstance(self.protect, bool):
            raise ValueError(f"protect is {self.protect!r}; give True or False")
        object.__setattr__(self, "window", as_window(self.window))

    @property
    def max_ratio(self) -> float:
        return 0.5

    def max_remove(self, grid: TokenGrid) -> int:
        return grid.tokens // 2

    def merge(self, depth: float) -> str:
        return "mean"

    def choose(self, evidence: Evidence) -> Plan:
        k = evidence.remove
        margin = self.margin * (1.0 - evidence.depth)
        energy = energies(evidence, margin, self.alpha, as_window(self.window))
        order = energy.argsort(dim=1, descending=True, stable=True)
        if self.protect:
            order = order[:, : 2 * k]
        # B in token order, so that of equally similar tokens the earlier one is the match.
        a, b = order[:, 0::2], order[:, 1::2].sort(dim=1).values
        value, position = match(evidence, a, b, as_window(self.window))
        return merging(evidence, a, highest(value, k), position)
