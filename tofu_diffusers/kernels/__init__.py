"""Where the package gets its heavy operations from: the torch reference, on every device.

A faster kernel lives in a file of its own and is chosen here; `reference` stays the definition.
"""

from .reference import (
    best_match,
    best_match_tiles,
    energy,
    energy_tiles,
    group_max,
    group_sum,
)

__all__ = [
    "best_match",
    "best_match_tiles",
    "energy",
    "energy_tiles",
    "group_max",
    "group_sum",
]
