"""What a kept token becomes when others merge into it: itself, the group's mean, or MLERP.

MLERP keeps the length that averaging loses (ToFu, arXiv 2312.01026):
x* = xbar / ||xbar|| * max_k ||x_k||, with the mean and the maximum over the whole group.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..kernels import group_max, group_sum, use_triton
from ..kernels.reference import max_abs, upcast
from .plan import Plan

EPS = 1e-6
"""A mean shorter than this share of the group's longest token has lost its direction."""


class Merge(Protocol):
    """Makes kept tokens of all; `weights` [B, N]: how many tokens each is already, one where None."""

    def __call__(self, x: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, K, C]."""


def prune(x: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Keep the kept tokens, drop the others.  [B, N, C] -> [B, K, C]."""
    return plan.rows(x)


def mean(x: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Average each group, the kept token included.  [B, N, C] -> [B, K, C]."""
    if use_triton(x) and weights is None:
        return _in_triton(x, plan, None)
    # Divided before the sum: the sum of large tokens may not be representable, their mean is.
    if weights is None:
        parts = upcast(x) / plan.sizes().gather(1, plan.assign)[..., None]
    else:
        parts = _weighted(upcast(x), plan, weights)
    return group_sum(parts, plan.assign, plan.kept.shape[1]).to(x.dtype)


def mlerp(x: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """The mean's direction at the group's maximum norm.  [B, N, C] -> [B, K, C].

    Where opposed tokens cancel (||xbar|| <= EPS * maximum norm) there is no direction to take;
    the result is then finite and no longer than the maximum norm.
    """
    if use_triton(x) and weights is None:
        return _in_triton(x, plan, EPS)
    groups = plan.kept.shape[1]
    y = upcast(x)
    if weights is not None:
        y = torch.where(weights[..., None] > 0, y, 0.0)
    # Every group is brought to a largest entry of 1 first: squares neither overflow nor vanish.
    tiny = torch.finfo(y.dtype).tiny
    scale = group_max(max_abs(y)[..., 0], plan.assign, groups)[..., None].clamp(min=tiny)
    y = y / plan.broadcast(scale)
    longest = group_max(y.norm(dim=-1), plan.assign, groups)[..., None]
    if weights is None:
        xbar = group_sum(y, plan.assign, groups) / plan.sizes()[..., None]
    else:
        xbar = group_sum(_weighted(y, plan, weights), plan.assign, groups)
    length = torch.maximum(xbar.norm(dim=-1, keepdim=True), EPS * longest).clamp(min=tiny)
    return (xbar / length * longest * scale).to(x.dtype)


def _weighted(y: Tensor, plan: Plan, weights: Tensor) -> Tensor:
    """Each token's part of its group's weighted mean."""
    weights = weights.to(y.dtype)
    total = plan.broadcast(sums(weights, plan)[..., None]).clamp(min=1.0)
    return y * (weights[..., None] / total)


def sums(weights: Tensor, plan: Plan) -> Tensor:
    """The sum of each group's weights.  [B, N] -> [B, K]."""
    return group_sum(weights[..., None], plan.assign, plan.kept.shape[1])[..., 0]


def _in_triton(x: Tensor, plan: Plan, eps: float | None) -> Tensor:
    """The mean, or with eps the MLERP."""
    from ..kernels.triton.merge import members

    order, offsets = members(plan.assign, plan.kept.shape[1])
    if eps is None:
        mean: Tensor = torch.ops.tofu.merge_mean(x, order, offsets)
        return mean
    mlerp: Tensor = torch.ops.tofu.merge_mlerp(x, order, offsets, eps)
    return mlerp


MERGES: dict[str, Merge] = {"prune": prune, "mean": mean, "mlerp": mlerp}


def merge_tokens(
    x: Tensor, plan: Plan, merge: str = "mean", weights: Tensor | None = None
) -> Tensor:
    """Merge the tokens of x into the kept ones.

    Args:
        x: [B, N, C], any float dtype; sums run in float32 (float64 for float64).
        plan: of the same B and N.
        merge: a key of `MERGES`.
        weights: [B, N], how many tokens each one is already: means are weighted by it, and a token of
            weight 0 does not count. None: one each.

    Returns:
        [B, K, C] of x's dtype.

    Raises:
        ValueError: unknown merge, or a plan for another batch or number of tokens.
    """
    if merge not in MERGES:
        raise ValueError(f"unknown merge {merge!r}; choose one of {', '.join(MERGES)}")
    if x.shape[:2] != plan.assign.shape:
        raise ValueError(
            f"x is {tuple(x.shape)} but the plan is for {tuple(plan.assign.shape)} "
            "[batch, tokens]; make the plan from this input, or tile it with plan.repeat"
        )
    return MERGES[merge](x, plan, weights)
