"""Keep tokens at random, by seed and step: the baseline that every choice must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..plan import Plan, highest
from ..random_bits import uniform
from .base import Evidence, Method, register
from .matching import as_window, assign_to_kept


@register
@dataclass(frozen=True)
class Random(Method):
    """The same kept set for the whole batch, new at every step.

    Options:
        window: assign removed tokens only inside tiles: an int, or (frames, rows, columns)
            with None for a whole side.
    """

    name = "random"
    same_for_all = True

    window: int | tuple[int | None, int | None, int | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", as_window(self.window))

    def choose(self, evidence: Evidence) -> Plan:
        metric, grid = evidence.metric, evidence.grid
        place = torch.arange(grid.tokens, device=metric.device)
        draw = uniform(evidence.seed, evidence.step, place)
        keep = highest(draw[None], grid.tokens - evidence.remove).expand(metric.shape[0], -1)
        return assign_to_kept(evidence, keep, as_window(self.window))
