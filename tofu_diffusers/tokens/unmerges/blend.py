"""d_i = d_i(t-1) + (d_m(t) - d_m(t-1)): its own last update, moved as its match's moved."""

from __future__ import annotations

from torch import Tensor

from ...kernels.reference import upcast
from ..plan import Plan
from ..update_cache import CacheKind, clamp_cast
from .base import Given, from_past, register_unmerge


@register_unmerge("blend", cache=CacheKind.VALUE, fused=True)
def blend(update: Tensor, plan: Plan, given: Given) -> Tensor:
    """Each removed token's last used update, and its match's change since.  [B, K, C] -> [B, N, C]."""
    cache, step = given.past
    before = plan.broadcast(plan.rows(cache.value))
    change = upcast(plan.broadcast(update)) - upcast(before)
    own = clamp_cast(upcast(cache.value) + change, update.dtype)
    # The match's change is known only if its own past is.
    known = plan.broadcast(plan.rows(cache.last[..., None]) >= 0)[..., 0]
    full = from_past(own, update, plan, given, known)
    cache.record(update, step, plan.kept)
    # The next step builds on what this one used, for removed tokens too.
    cache.value.copy_(full)
    return full
