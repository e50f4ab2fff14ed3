"""d_i = d_i(t'): a removed token repeats its own last update (ToCa, arXiv 2410.05317; RAS, 2502.10389)."""

from __future__ import annotations

from torch import Tensor

from ..plan import Plan
from ..update_cache import CacheKind
from .base import Given, from_past, register_unmerge


@register_unmerge("temporal", cache=CacheKind.VALUE, own_past=True, fused=True)
def temporal(update: Tensor, plan: Plan, given: Given) -> Tensor:
    """Each removed token's last update.  [B, K, C] -> [B, N, C]."""
    cache, step = given.past
    full = from_past(cache.value.to(update.dtype, copy=True), update, plan, given)
    cache.record(update, step, plan.kept)
    return full
