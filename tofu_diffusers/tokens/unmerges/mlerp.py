"""d_i = d_m * ||x_i|| / ||x_merged||, the inverse of the MLERP merge (ToFu, arXiv 2312.01026)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.reference import max_abs, upcast
from ..plan import Plan
from .base import Given, register_unmerge


@register_unmerge("mlerp", reads_merge=True)
def mlerp(update: Tensor, plan: Plan, given: Given) -> Tensor:
    """The match's update, as long for this token as the token is for the merged one.  [B, K, C] -> [B, N, C].

    Capped at the group's size: without opposed tokens neither MLERP (rho <= 1) nor a mean asks
    for more, and with them the quotient has no bound.
    """
    assert given.x is not None and given.merged is not None
    x, y = upcast(given.x), upcast(given.merged)
    # Norms as scale * norm, divided part by part: neither may be representable by itself.
    x_scale, y_scale = max_abs(x), plan.broadcast(max_abs(y))
    x_norm = (x / x_scale).norm(dim=-1, keepdim=True)
    y_norm = plan.broadcast((y / max_abs(y)).norm(dim=-1, keepdim=True))
    size = plan.broadcast(plan.sizes()[..., None]).to(x.dtype)
    quotient = x_norm / y_norm.clamp(min=torch.finfo(x.dtype).tiny) * (x_scale / y_scale)
    # Behind a group of zeros there is no length to compare: a plain copy.
    rho = torch.where(y_norm > 0, torch.minimum(quotient, size), 1.0)
    return (plan.broadcast(upcast(update)) * rho).to(update.dtype)
