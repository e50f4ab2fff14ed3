"""Cosine matching (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import chunks, normalise, tile_products


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
        for start, stop in chunks(q.shape[1], c.shape[1]):
            value, index = (q[row, start:stop] @ c[row].T).max(dim=-1)
            values.append(value)
            indices.append(index)
    shape = q.shape[:2]
    return torch.cat(values).view(shape), torch.cat(indices).view(shape)


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
        for members, cosine in tile_products(x[row], tiles):
            barred = ~candidate[row][members]
            value, slot = cosine.masked_fill(barred[:, None], -torch.inf).max(dim=-1)
            values.append(value.flatten())
            positions.append(members.gather(1, slot).flatten())
    shape = (x.shape[0], *tiles.shape)
    return torch.cat(values).view(shape), torch.cat(positions).view(shape)
