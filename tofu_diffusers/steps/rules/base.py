"""How a rule is asked which steps to skip, and how many steps a speed-up leaves.

A rule knows what the sampler does and what was measured before. What a denoiser computes now is on the
device, and to wait for it at every step would cost more than many rules gain; one schedule was found to
serve all prompts of a model and sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ..trajectory import Trajectory


@dataclass(frozen=True)
class Steps:
    """The steps of a generation, for a rule.

    Attributes:
        free: Those that may be skipped.
        computed: How many are computed in all: more than are not free, and fewer than all.
        levels: Noise level of each, 1 is pure noise: `Sampling.angles`.
        sizes: How far each moves the latents; None: not known. See `sampler.step_sizes`.
        trajectory: Of the denoiser, if it is known.
        order: Of the forecast.
        corrects: Whether forecasts are corrected.
    """

    free: range
    computed: int
    levels: tuple[float, ...]
    sizes: tuple[float, ...] | None = None
    trajectory: Trajectory | None = None
    order: int = 1
    corrects: bool = True

    @property
    def computed_free(self) -> int:
        """How many of the free ones are computed: at least 1, fewer than all."""
        return self.computed - (len(self.levels) - len(self.free))


SkipRule = Callable[[Steps], set[int]]
"""Gives the steps that are skipped, all of them free ones."""

SKIP_RULES: dict[str, SkipRule] = {}


def register_rule(name: str) -> Callable[[SkipRule], SkipRule]:
    """Decorate a rule to make it known by its name."""

    def register(rule: SkipRule) -> SkipRule:
        SKIP_RULES[name] = rule
        return rule

    return register


def computed_steps(total: int, speedup: float, free: range) -> int:
    """How many steps of a generation are computed at a speed-up: of those that are free, one at least."""
    # A speed-up that was worked out as total / computed means so many, whatever the rounding.
    wanted = math.floor(total / speedup + 1e-6)
    return min(total, max(wanted, total - len(free) + min(1, len(free))))


@lru_cache(maxsize=64)
def skipped_steps(rule: str, steps: Steps) -> frozenset[int]:
    """Which of a generation's steps are skipped."""
    if steps.computed >= len(steps.levels) or not steps.free:
        return frozenset()
    return frozenset(SKIP_RULES[rule](steps))
