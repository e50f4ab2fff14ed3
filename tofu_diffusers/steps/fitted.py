"""Steps and forecasts that were fitted to a pipeline by `tune`: what each step of a generation is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from .sampler import Sampling

POINTS = 3
"""Of the last computed predictions, how many a step is made of. A fourth changed nothing."""

SAME_LEVEL = 1e-3


@dataclass(frozen=True)
class FittedForecasts:
    """Which steps are computed, and what the sampler is given at each.

    At a skipped step p_0 is the prediction that was computed last, and p_1 and p_2 those before it; at a
    computed one p_0 is its own. The sampler is given p_0 + w_0 p_0 + w_1 (p_1 - p_0) + w_2 (p_2 - p_0).

    Args:
        levels: Noise level of every step, descending: `Sampling.angles`.
        computed: The steps that are computed, the first one among them.
        weights: One to three of every step, as many as were computed by then; 0 at the first.
        sampler: `Sampling.kind` of the scheduler.

    Raises:
        ValueError: if they do not go together.
    """

    levels: tuple[float, ...]
    computed: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    sampler: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(float(each) for each in self.levels))
        object.__setattr__(self, "computed", tuple(int(each) for each in self.computed))
        rows = tuple(tuple(float(each) for each in row) for row in self.weights)
        object.__setattr__(self, "weights", rows)
        total, steps = len(self.levels), self.computed
        if (
            not steps
            or steps[0] != 0
            or steps[-1] >= total
            or any(a >= b for a, b in pairwise(steps))
        ):
            raise ValueError(
                f"computed steps {steps} of {total}; they ascend from 0, and are no more than there are"
            )
        wanted = [len(self.past(step)) for step in range(total)]
        if [len(row) for row in rows] != wanted:
            raise ValueError(
                f"{[len(row) for row in rows]} weights for {total} steps; with these computed steps there "
                f"are {wanted}"
            )
        if rows[0] != (0.0,):
            raise ValueError(
                f"the first step has weight {rows[0][0]:g}, and is given as computed: its weight is 0"
            )
        if not np.isfinite([*self.levels, *(each for row in rows for each in row)]).all():
            raise ValueError("fitted forecasts with NaN or infinite numbers; tune again")

    @classmethod
    def of(cls, value: Any) -> FittedForecasts:
        """Return fitted forecasts themselves, or make them from their JSON form."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            if {*value} != {each.name for each in fields(cls)}:
                found = ", ".join(map(str, value)) or "nothing"
                raise ValueError(
                    f"fitted forecasts have levels, computed, weights and sampler, and this has {found}"
                )
            return cls(**value)
        raise TypeError(
            f"fitted forecasts are FittedForecasts or a mapping, not {type(value).__name__}"
        )

    def past(self, step: int) -> tuple[int, ...]:
        """The computed steps that a step is made of, the last one first."""
        return past_of(self.computed, step)

    def fits(self, sampling: Sampling) -> bool:
        """Whether a generation has these steps and this sampler; others go by the rule."""
        alike = len(sampling) == len(self.levels) and sampling.kind == self.sampler
        return alike and np.allclose(sampling.angles, self.levels, rtol=0, atol=SAME_LEVEL)


def past_of(computed: Sequence[int], step: int) -> tuple[int, ...]:
    """The last computed steps up to a step, itself included, the last one first."""
    return tuple([each for each in computed if each <= step][::-1][:POINTS])
