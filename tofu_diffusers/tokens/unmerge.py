"""Spreads the kept tokens' update over all tokens, by a kernel where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import use_fused_rows
from .gather import scatter_rows_
from .plan import Plan
from .unmerges import UNMERGES, Given
from .update_cache import CacheKind, UpdateCache


def _fits(update: Tensor, kind: str, cache: UpdateCache | None, step: Tensor | None) -> bool:
    """Whether the kernel takes this update and this cache."""
    unmerge = UNMERGES[kind]
    if not unmerge.fused or cache is None or step is None:
        return False
    alike = update.dtype == cache.value.dtype and step.device == cache.value.device
    return alike and (cache.slope is not None) == (unmerge.cache is CacheKind.SLOPE)


def _cached_in_one_launch(
    update: Tensor,
    plan: Plan,
    kind: str,
    cache: UpdateCache,
    step: Tensor,
    max_age: int | None,
    x: Tensor | None,
    computed: Tensor | None,
) -> Tensor:
    full: Tensor = torch.ops.tofu.unmerge_cached(
        update,
        plan.kept,
        plan.assign,
        cache.value,
        cache.slope,
        cache.last,
        step,
        kind,
        max_age,
        x,
        computed,
    )
    return full


def unmerge_onto(
    x: Tensor,
    update: Tensor,
    plan: Plan,
    kind: str,
    *,
    computed: Tensor | None,
    merged: Tensor | None = None,
    cache: UpdateCache | None = None,
    step: Tensor | None = None,
    max_age: int | None = None,
) -> Tensor:
    """Add to x what `unmerge_tokens` gives; kept tokens are exactly what was computed.

    Args:
        computed: [B, K, C] of x's dtype, what the kept tokens become instead of x plus their update (which
            rounds); None: x plus their update.
        x, update, plan, kind, merged, cache, step, max_age: as of `unmerge_tokens`.

    Returns:
        [B, N, C] of x's dtype.

    Raises:
        ValueError: as `unmerge_tokens`.
    """
    if use_fused_rows(x, update):
        if kind == "copy":
            copied: Tensor = torch.ops.tofu.unmerge_copy(
                x, update, plan.kept, plan.assign, computed
            )
            return copied
        if _fits(update, kind, cache, step) and cache is not None and step is not None:
            return _cached_in_one_launch(update, plan, kind, cache, step, max_age, x, computed)
    unmerged = unmerge_tokens(
        update, plan, kind, x=x, merged=merged, cache=cache, step=step, max_age=max_age
    )
    # In place: nobody else holds it, and on a CPU to make room for as much again costs more than the sum.
    full = unmerged.to(x.dtype).add_(x)
    if computed is not None:
        scatter_rows_(full, plan.kept, computed)
    return full


def unmerge_tokens(
    update: Tensor,
    plan: Plan,
    kind: str = "copy",
    *,
    x: Tensor | None = None,
    merged: Tensor | None = None,
    cache: UpdateCache | None = None,
    step: Tensor | None = None,
    max_age: int | None = None,
) -> Tensor:
    """Spread the kept tokens' update over all tokens; those with a cache also record it there.

    Args:
        update: [B, K, C].
        plan: the plan that x was reduced with.
        kind: a key of `UNMERGES`.
        x, merged: the input before [B, N, C] and after [B, K, C] merging; mlerp needs both.
        cache: of this site and branch of guidance; those with a cache need it.
        step: 0-d float32 tensor, the current step; those with a cache need it.
        max_age: a cached update older than this many steps is not used; None: no limit.

    Returns:
        [B, N, C] of the update's dtype.

    Raises:
        ValueError: unknown unmerge, a missing argument, or shapes that do not belong together.
    """
    if kind not in UNMERGES:
        raise ValueError(f"unknown unmerge {kind!r}; choose one of {', '.join(UNMERGES)}")
    if update.shape[:2] != plan.kept.shape:
        raise ValueError(
            f"update is {tuple(update.shape)} but the plan keeps {tuple(plan.kept.shape)} "
            "[batch, tokens]; unmerge with the plan that reduced the input"
        )
    unmerge = UNMERGES[kind]
    if unmerge.reads_merge and (x is None or merged is None):
        missing = "x" if x is None else "merged"
        raise ValueError(
            f"unmerge {kind!r} needs {missing}: it compares the tokens before and after merging; "
            "pass the input before and after merge_tokens"
        )
    if unmerge.cached:
        if cache is None or step is None:
            missing = "cache" if cache is None else "step"
            raise ValueError(
                f"unmerge {kind!r} needs {missing}: it reuses updates of earlier steps; "
                "pass an UpdateCache and the step, or choose copy"
            )
        shape = (*plan.assign.shape, update.shape[2])
        if cache.value.shape != shape:
            raise ValueError(
                f"the cache is {tuple(cache.value.shape)} but the unmerged update is "
                f"{shape}; keep one cache for each site and branch of guidance"
            )
        if unmerge.cache is CacheKind.SLOPE and cache.slope is None:
            raise ValueError(
                f"unmerge {kind!r} needs a cache with slopes; make it by "
                "UpdateCache.empty(CacheKind.SLOPE, ...)"
            )
        if _fits(update, kind, cache, step) and use_fused_rows(update, cache.value):
            return _cached_in_one_launch(update, plan, kind, cache, step, max_age, None, None)
    return unmerge.spread(update, plan, Given(x, merged, cache, step, max_age))
