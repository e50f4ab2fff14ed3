"""What every kernel must compute, in plain torch: cosine matching, PiToMe energy, group sums.

Sums run in float32, or float64 for float64 input. No N x N or N x M matrix is ever held: the
similarities come in chunks of at most `CHUNK` numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 24


def upcast(x: Tensor) -> Tensor:
    """x in the dtype in which sums are taken: float32, or float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def max_abs(x: Tensor) -> Tensor:
    """max |x| over the last axis, at least the smallest normal number.  [..., C] -> [..., 1]

    Dividing by it before squaring keeps norms finite for huge tokens and positive for tiny ones.
    """
    return x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def length(x: Tensor) -> Tensor:
    """Euclidean norm over the last axis.  [..., C] -> [..., 1]"""
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return norm


def normalise(x: Tensor) -> Tensor:
    """Unit vectors in the wide dtype; a zero vector stays zero.  [..., C] -> [..., C]"""
    x = upcast(x.detach())  # choosing tokens is not differentiated: keep no activations
    x = x / max_abs(x)
    return x / length(x).clamp(min=torch.finfo(x.dtype).tiny)


def _chunks(total: int, each: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of `total` items so that a run of items of size `each` fits CHUNK."""
    run = max(1, CHUNK // each)
    return ((start, min(start + run, total)) for start in range(0, total, run))


def best_match(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar candidate of each query by cosine; the first of equals.

    Args:
        queries: [B, M, C] of any float dtype.
        candidates: [B, D, C], D >= 1.

    Returns:
        value [B, M] in the wide dtype and index [B, M] int64 into the candidates.
    """
    q, c = normalise(queries), normalise(candidates)
    values, indices = [], []
    # Row by row: a batched product may round differently for another batch size, and a near tie
    # would then be decided by an image's neighbours.
    for row in range(q.shape[0]):
        for start, stop in _chunks(q.shape[1], c.shape[1]):
            value, index = (q[row, start:stop] @ c[row].T).max(dim=-1)
            values.append(value)
            indices.append(index)
    shape = q.shape[:2]
    return torch.cat(values).view(shape), torch.cat(indices).view(shape)


def _tile_products(x: Tensor, tiles: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities inside every tile of one row.  [N, C] unit vectors, [T, S] ->
    in chunks, members [t, S] and their products [t, s, S], in the order of `tiles`."""
    count, side = tiles.shape
    for first, last in _chunks(count, side * side):
        members = tiles[first:last]
        inside = x[members]
        # One tile may by itself exceed a chunk; then its rows come in chunks too.
        for start, stop in _chunks(side, side * (last - first)):
            yield members, inside[:, start:stop] @ inside.transpose(1, 2)


def best_match_tiles(metric: Tensor, candidate: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar candidate inside each tile, for every member of the tile.

    Args:
        metric: [B, N, C] of any float dtype.
        candidate: [B, N] bool, the tokens that may be matched to.
        tiles: [T, S] int64, the positions of each tile's members, ascending.

    Returns:
        value [B, T, S], -inf where the tile holds no candidate, and position [B, T, S] int64.
    """
    x = normalise(metric)
    values, positions = [], []
    for row in range(x.shape[0]):
        for members, cosine in _tile_products(x[row], tiles):
            barred = ~candidate[row][members]
            value, slot = cosine.masked_fill(barred[:, None], -torch.inf).max(dim=-1)
            values.append(value.flatten())
            positions.append(members.gather(1, slot).flatten())
    shape = (x.shape[0], *tiles.shape)
    return torch.cat(values).view(shape), torch.cat(positions).view(shape)


def _pull(cosine: Tensor, margin: float, alpha: float) -> Tensor:
    """f_m of PiToMe: c where c >= m, else alpha * (exp(c - m) - 1)."""
    return torch.where(cosine >= margin, cosine, alpha * torch.expm1(cosine - margin))


def energy(metric: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """PiToMe's energy, E_i = mean_j f_m(cos(v_i, v_j)) over all j (arXiv 2405.16148).

    High: one of many alike. Low: isolated.  [B, N, C] -> [B, N] in the wide dtype
    """
    x = normalise(metric)
    parts = [
        _pull(x[row, start:stop] @ x[row].T, margin, alpha).mean(dim=-1)
        for row in range(x.shape[0])
        for start, stop in _chunks(x.shape[1], x.shape[1])
    ]
    return torch.cat(parts).view(x.shape[:2])


def energy_tiles(metric: Tensor, tiles: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """The same mean, over the members of a tile only.  [B, N, C], [T, S] -> [B, T, S]"""
    x = normalise(metric)
    parts = [
        _pull(cosine, margin, alpha).mean(dim=-1).flatten()
        for row in range(x.shape[0])
        for _, cosine in _tile_products(x[row], tiles)
    ]
    return torch.cat(parts).view(x.shape[0], *tiles.shape)


def group_sum(x: Tensor, assign: Tensor, groups: int) -> Tensor:
    """Sum of each group's rows.  [B, N, C], [B, N] -> [B, groups, C], dtype of x"""
    batch, _, channels = x.shape
    row = torch.arange(batch, device=assign.device)[:, None] * groups
    out = x.new_zeros(batch * groups, channels)
    # index_add over a flat index is deterministic on every device when torch is asked for that.
    return out.index_add_(0, (assign + row).flatten(), x.flatten(0, 1)).view(
        batch, groups, channels
    )


def group_max(x: Tensor, assign: Tensor, groups: int) -> Tensor:
    """Maximum of each group's non-negative numbers.  [B, N], [B, N] -> [B, groups]"""
    # A maximum does not depend on the order, so amax needs no deterministic form.
    return x.new_zeros(x.shape[0], groups).scatter_reduce(1, assign, x, "amax")
