"""d_i = d_m: a removed token gets its match's update (ToMe for SD, arXiv 2303.17604)."""

from __future__ import annotations

from torch import Tensor

from ..plan import Plan
from .base import Given, register_unmerge


@register_unmerge("copy")
def copy(update: Tensor, plan: Plan, given: Given) -> Tensor:
    """The match's update.  [B, K, C] -> [B, N, C]."""
    return plan.broadcast(update)
