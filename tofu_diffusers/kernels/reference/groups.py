"""Sums and maxima of the groups that merge."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(x: Tensor, assign: Tensor, groups: int) -> Tensor:
    """Sum of each group's rows.  [B, N, C], [B, N] -> [B, groups, C], dtype of x."""
    batch, _, channels = x.shape
    row = torch.arange(batch, device=assign.device)[:, None] * groups
    out = x.new_zeros(batch * groups, channels)
    # index_add over a flat index is deterministic on every device when torch is asked for that.
    return out.index_add_(0, (assign + row).flatten(), x.flatten(0, 1)).view(
        batch, groups, channels
    )


def group_max(x: Tensor, assign: Tensor, groups: int) -> Tensor:
    """Maximum of each group's non-negative numbers.  [B, N], [B, N] -> [B, groups]."""
    # A maximum does not depend on the order, so amax needs no deterministic form.
    return x.new_zeros(x.shape[0], groups).scatter_reduce(1, assign, x, "amax")
