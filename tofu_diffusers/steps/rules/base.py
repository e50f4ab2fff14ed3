"""How a rule is asked which steps to skip, and how many steps a speed-up leaves.

A rule knows step numbers only: what a denoiser computed is on the device, and to wait for it at every step
would cost more than many rules gain. One schedule was found to serve all prompts of a model and sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable

SkipRule = Callable[[range, int], set[int]]
"""(steps that may be skipped, how many of them are computed: at least 1, fewer than all) -> those skipped."""

SKIP_RULES: dict[str, SkipRule] = {}


def register_rule(name: str) -> Callable[[SkipRule], SkipRule]:
    """Decorate a rule to make it known by its name."""

    def register(rule: SkipRule) -> SkipRule:
        SKIP_RULES[name] = rule
        return rule

    return register


def skipped_steps(rule: str, total: int, speedup: float, first: int, last: int) -> set[int]:
    """Which of a generation's steps are skipped.

    Args:
        total: Steps of the generation.
        speedup: At most total / speedup steps are computed, if those that must be are not more.
        first, last: Steps before `first` and from `last` on are computed.

    Returns:
        Steps from `first` to `last`, one fewer than those at most.
    """
    candidates = range(first, last)
    # A speed-up that was worked out as total / computed means so many, whatever the rounding.
    computed = math.floor(total / speedup + 1e-6) - (total - len(candidates))
    computed = max(1, computed)
    if computed >= len(candidates):
        return set()
    return SKIP_RULES[rule](candidates, computed)
