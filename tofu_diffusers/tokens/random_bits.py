"""The library's own randomness: a hash of (seed, step, position) made of integer tensor ops.

The global generators are never touched, so the user's noise does not shift; the same numbers come
out on every device, in eager and compiled code, and for every row of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ODD = 0x45D9F3B  # a 27-bit odd multiplier: times a 32-bit word it stays inside int64
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, so that a word of zero still stirs the state


def _mix(word: Tensor) -> Tensor:
    """Stir a 32-bit word held in an int64 (xor-shift and multiply, twice)."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * _ODD & _WORD
    return (word >> 16) ^ word


def _absorb(state: Tensor, word: Tensor) -> Tensor:
    """Take 32 more bits into the state."""
    return _mix((state + _GOLDEN & _WORD) ^ (word & _WORD))


def uniform(seed: int, step: Tensor | None, positions: Tensor) -> Tensor:
    """Random numbers in [0, 1) that depend on nothing but the three arguments.

    Args:
        seed: an int of 64 bits, -2^63 <= seed < 2^63.
        step: 0-d tensor, rounded towards zero; None: no step, unlike any other.
        positions: int64, any shape.

    Returns:
        float32 of the shape of `positions`, multiples of 2^-24.
    """
    # As a tensor, the seed can change without recompiling, and its bits are cut on the device.
    key = torch.full((), seed, dtype=torch.int64, device=positions.device)
    state = _absorb(_mix(key & _WORD), key >> 32)
    if step is not None:
        state = _absorb(state, step.to(positions.device, torch.int64) + 1)
    state = _absorb(_absorb(state, positions), positions >> 32)
    return (state >> 8).to(torch.float32) * 2.0**-24
