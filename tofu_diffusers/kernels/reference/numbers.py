"""What the definitions share: wide sums, norms that neither overflow nor vanish, similarities in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 24


def upcast(x: Tensor) -> Tensor:
    """Cast to the dtype in which sums are taken: float32, or float64 if x is float64."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def max_abs(x: Tensor) -> Tensor:
    """The largest |x| over the last axis, at least the smallest normal number.  [..., C] -> [..., 1].

    Dividing by it before squaring keeps norms finite for huge tokens and positive for tiny ones.
    """
    return x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def length(x: Tensor) -> Tensor:
    """Euclidean norm over the last axis.  [..., C] -> [..., 1]."""
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return norm


def normalise(x: Tensor) -> Tensor:
    """Unit vectors in the wide dtype; a zero vector stays zero.  [..., C] -> [..., C]."""
    x = upcast(x.detach())  # choosing tokens is not differentiated: keep no activations
    x = x / max_abs(x)
    return x / length(x).clamp(min=torch.finfo(x.dtype).tiny)


def chunks(total: int, each: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of `total` items so that a run of items of size `each` fits CHUNK."""
    run = max(1, CHUNK // each)
    return ((start, min(start + run, total)) for start in range(0, total, run))


def tile_products(x: Tensor, tiles: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities inside every tile of one row.  [N, C] unit vectors, [T, S].

    Yields chunks in the order of `tiles`: members [t, S] and their products [t, s, S].
    """
    count, side = tiles.shape
    for first, last in chunks(count, side * side):
        members = tiles[first:last]
        inside = x[members]
        # One tile may by itself exceed a chunk; then its rows come in chunks too.
        for start, stop in chunks(side, side * (last - first)):
            yield members, inside[:, start:stop] @ inside.transpose(1, 2)
