"""Keep the tokens that matter most, and let none wait too long.

Scores of the previous step: change of the prediction, guidance magnitude (IBTM, ICCV 2025); of the tokens
themselves: received attention, key norm, or how much the prediction depends on them, guessed by a probe;
or a product of these; times age, as token-wise caches do (ToCa, RAS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import TokenGrid
from ..plan import Plan, highest
from ..sources import SOURCES
from .base import Evidence, Method, register
from .matching import as_window, assign_to_kept


@register
@dataclass(frozen=True)
class Importance(Method):
    """The highest importance * age ** age_exponent is kept.

    Options:
        source: change, cfg, attention, key_norm or gradient; or several with their exponents, such as
            {"change": 1, "gradient": 0.5}: importance is then the product of these powers.
        probe: file that `calibrate_gradient` wrote; for source gradient, and only for it.
        age_exponent: 0 ignores age. None: 2 with change, else 0.
        max_age: no token waits longer than this many steps; None: no bound. With it at most
            1 - 1/max_age of the tokens can be removed.
        window: assign removed tokens only inside tiles: an int, or (frames, rows, columns)
            with None for a whole side.
    """

    name = "importance"
    bounds_age = True

    source: str | Mapping[str, float] = "change"
    probe: str | None = None
    age_exponent: float | None = None
    max_age: int | None = None
    window: int | tuple[int | None, int | None, int | None] | None = None

    def __post_init__(self) -> None:
        if not self.source or not isinstance(self.source, (str, Mapping)):
            raise ValueError(
                f"source is {self.source!r}; name one, or several with their exponents"
            )
        for source, power in self.powers.items():
            if source not in SOURCES:
                raise ValueError(
                    f"unknown source {source!r}; choose one of {', '.join(sorted(SOURCES))}"
                )
            if isinstance(power, bool) or not isinstance(power, (int, float)) or power <= 0:
                raise ValueError(f"source {source!r} has exponent {power!r}; give a number above 0")
        if ("gradient" in self.powers) != (self.probe is not None):
            raise ValueError(
                f"source {self.source!r} with probe {self.probe!r}: source 'gradient' needs the file that "
                "calibrate_gradient wrote as probe, and the others need none"
            )
        exponent = self.age_exponent
        number = isinstance(exponent, (int, float)) and not isinstance(exponent, bool)
        if exponent is not None and not (number and exponent >= 0):
            raise ValueError(f"age_exponent is {exponent!r}; give a number, 0 or more")
        if self.max_age is not None and (type(self.max_age) is not int or self.max_age < 2):
            raise ValueError(
                f"max_age is {self.max_age!r}; give an int of 2 or more "
                "(1 computes every token at every step)"
            )
        object.__setattr__(self, "window", as_window(self.window))

    @property
    def powers(self) -> dict[str, float]:
        """Exponent of each source."""
        return dict(self.source) if isinstance(self.source, Mapping) else {self.source: 1.0}

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.powers)

    @property
    def max_ratio(self) -> float:
        return 1.0 if self.max_age is None else 1 - 1 / self.max_age

    def max_remove(self, grid: TokenGrid) -> int:
        # K * max_age >= N, or the tokens could not all be computed once in max_age steps.
        least = 1 if self.max_age is None else -(-grid.tokens // self.max_age)
        return grid.tokens - least

    def unmerge(self, depth: float) -> str:
        return "taylor"

    def choose(self, evidence: Evidence) -> Plan:
        age, exponent = evidence.age, self.age_exponent
        if exponent is None:
            exponent = 2.0 if "change" in self.powers else 0.0
        for source in self.sources:
            if source not in evidence.importance:
                raise ValueError(
                    f"importance needs Evidence.importance of {source!r} and has none; "
                    f"run {self.warmup} unreduced steps first, or choose another source"
                )
        score = self.score(evidence)
        if age is None and (exponent > 0 or self.max_age is not None):
            raise ValueError(
                "importance needs Evidence.age for age_exponent and max_age and has none; "
                "track it, or set age_exponent=0 and max_age=None"
            )
        count = evidence.grid.tokens - evidence.remove
        if exponent > 0 and age is not None:
            score = score * age**exponent
        if self.max_age is None or age is None:
            keep = highest(score, count)
        else:
            order = score.argsort(dim=1, descending=True, stable=True)
            due = forced(age.gather(1, order), count, self.max_age)
            rest = count - due.sum(dim=1, keepdim=True)
            keep = torch.zeros_like(due).scatter(1, order, due | ((~due).cumsum(1) <= rest))
        return assign_to_kept(evidence, keep, as_window(self.window))

    def score(self, evidence: Evidence) -> Tensor:
        """The product of the sources' powers.  -> [B, N] float32."""
        if isinstance(self.source, str):
            return evidence.importance[self.source]
        product = torch.ones_like(evidence.metric[..., 0], dtype=torch.float32)
        for source, power in self.powers.items():
            part = evidence.importance[source] ** power
            # By its mean: the order stays, and products of small numbers do not vanish.
            mean = part.mean(dim=1, keepdim=True)
            product = product * (part / mean.clamp(min=torch.finfo(part.dtype).tiny))
        return product


def forced(age: Tensor, count: int, max_age: int) -> Tensor:
    """The tokens that must be computed now, if `count` a step are, for none to pass max_age.

    Earliest deadline first: a token of slack s = max_age - age has to be computed within s more
    steps, in which s * count can be; so of the n tokens with at most that slack, n - s * count
    must go now. The oldest F = max over s of that many are forced: the rest then stays feasible
    for ever, as long as count * max_age >= N.

    Args:
        age: [B, N] float32, steps since each token was computed, in order of preference.

    Returns:
        [B, N] bool, at most `count` a row; of equal ages the earlier in the list.
    """
    oldest, order = age.sort(dim=1, descending=True, stable=True)
    slack = (max_age - oldest).floor().clamp(min=0)
    n = torch.arange(1, age.shape[1] + 1, device=age.device)
    demand = (n - slack * count).amax(dim=1, keepdim=True).clamp(max=count)
    rank = torch.zeros_like(order).scatter(1, order, (n - 1).expand_as(order))
    return rank < demand
