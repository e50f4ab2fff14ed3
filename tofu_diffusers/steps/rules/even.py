"""Skip rule "even": computed steps at equal distances, from right behind the warm-up to the last step."""

from __future__ import annotations

from .base import Steps, register_rule


@register_rule("even")
def even(steps: Steps) -> set[int]:
    """Skip all but evenly spaced steps; the last one is computed.

    With n steps, computed step i of k (from 1) is the one at i n / k, rounded half up: the distances between
    computed steps differ by one at most, the warm-up's last step counted.
    """
    free, computed = steps.free, steps.computed_free
    places = {
        free.start + (2 * i * len(free) + computed) // (2 * computed) - 1
        for i in range(1, computed + 1)
    }
    return {*free} - places
