"""Skip rule "even": computed steps at equal distances, from right behind the warm-up to the last step."""

from __future__ import annotations

from .base import register_rule


@register_rule("even")
def even(steps: range, computed: int) -> set[int]:
    """Skip all but evenly spaced steps; the last one is computed.

    With n steps, computed step i of k (from 1) is the one at i n / k, rounded half up: the distances between
    computed steps differ by one at most, the warm-up's last step counted.
    """
    places = {
        steps.start + (2 * i * len(steps) + computed) // (2 * computed) - 1
        for i in range(1, computed + 1)
    }
    return {*steps} - places
