"""Skip rule "late": skips as short as they can be, the longer ones late, and the last step computed.

A forecast far from the last computed step is worse than two near it, and an early one is worse than a late
one, because all later steps build on it.
"""

from __future__ import annotations

from .base import Steps, register_rule


@register_rule("late")
def late(steps: Steps) -> set[int]:
    """Skip steps in intervals as even as they can be, the longer ones last."""
    computed = steps.computed_free
    interval, longer = divmod(len(steps.free) - computed, computed)
    skipped: set[int] = set()
    step = steps.free.start
    for i in range(computed):
        length = interval + (i >= computed - longer)
        skipped.update(range(step, step + length))
        step += length + 1
    return skipped
