"""What every kernel must compute, in plain torch: one file a kernel, as in `kernels.triton`.

Sums run in float32, or float64 for float64 input. No N x N or N x M matrix is ever held: the
similarities come in chunks of at most `numbers.CHUNK` numbers.
"""

from .energy import energy, energy_tiles
from .groups import group_max, group_sum
from .match import best_match, best_match_tiles
from .numbers import max_abs, normalise, upcast

__all__ = [
    "best_match",
    "best_match_tiles",
    "energy",
    "energy_tiles",
    "group_max",
    "group_sum",
    "max_abs",
    "normalise",
    "upcast",
]
