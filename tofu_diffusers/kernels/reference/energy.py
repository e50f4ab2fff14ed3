"""PiToMe's energy (arXiv 2405.16148)."""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import chunks, normalise, tile_products


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
        for start, stop in chunks(x.shape[1], x.shape[1])
    ]
    return torch.cat(parts).view(x.shape[:2])


def energy_tiles(metric: Tensor, tiles: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """The same mean, over the members of a tile only.  [B, N, C], [T, S] -> [B, T, S]."""
    x = normalise(metric)
    parts = [
        _pull(cosine, margin, alpha).mean(dim=-1).flatten()
        for row in range(x.shape[0])
        for _, cosine in tile_products(x[row], tiles)
    ]
    return torch.cat(parts).view(x.shape[0], *tiles.shape)
