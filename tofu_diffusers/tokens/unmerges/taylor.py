"""d_i = d_i(t') + (t - t') * slope_i: its last two updates, extrapolated (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from torch import Tensor

from ..plan import Plan
from ..update_cache import CacheKind
from .base import Given, from_past, register_unmerge


@register_unmerge("taylor", cache=CacheKind.SLOPE, own_past=True, fused=True)
def taylor(update: Tensor, plan: Plan, given: Given) -> Tensor:
    """Each removed token's last update and its slope.  [B, K, C] -> [B, N, C]."""
    cache, step = given.past
    full = from_past(cache.extrapolated(step, update.dtype), update, plan, given)
    cache.record(update, step, plan.kept)
    return full
