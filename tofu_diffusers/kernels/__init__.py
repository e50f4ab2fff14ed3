"""Where the package gets its heavy operations from: Triton on CUDA, the torch reference everywhere else.

A fast kernel lives in a file of its own and is chosen in `dispatch`; `reference` stays the definition.
"""

from .dispatch import best_match, best_match_tiles, energy, energy_tiles, use_fused_rows, use_triton
from .reference import group_max, group_sum

__all__ = [
    "best_match",
    "best_match_tiles",
    "energy",
    "energy_tiles",
    "group_max",
    "group_sum",
    "use_fused_rows",
    "use_triton",
]
