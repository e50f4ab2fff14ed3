"""What a removed token gets back: its group's update, or a guess from its own past ones.

What is unmerged is the update d = f(Mx) - Mx, never the state: every token keeps its own residual
stream. For the removed token i with kept match m, at step t, last computed at step t':

    copy      d_i = d_m
    mlerp     d_i = d_m * ||x_i|| / ||x_merged||              (inverse of the merge)
    temporal  d_i = d_i(t')                                    (ToCa, RAS)
    taylor    d_i = d_i(t') + (t - t') * slope_i               (slope of its last two)
    blend     d_i = d_i(t-1) + (d_m(t) - d_m(t-1))

The last three need a cache and are a copy for tokens that it knows nothing of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import use_fused_rows
from ..kernels.reference import max_abs, upcast
from .gather import gather_rows, scatter_rows_
from .plan import Plan

UNMERGES = ("copy", "mlerp", "temporal", "taylor", "blend")
CACHED = frozenset({"temporal", "taylor", "blend"})


def clamp_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, within the dtype's range: an extrapolation of finite values may leave it. Overwrites x."""
    limit = torch.finfo(dtype).max
    return x.clamp_(-limit, limit).to(dtype)


@dataclass
class UpdateCache:
    """The last computed updates of one span under one condition; changed in place only.

    Attributes:
        value: [B, N, C], each token's last computed update (blend: its last used one).
        slope: [B, N, C], its change per step between the last two computed; None but for taylor.
        last: [B, N] float32, the step at which it was last computed; -1: never.
        complete: whether every token has a past, known without a look at `last`: a step ran whole.
    """

    value: Tensor
    slope: Tensor | None
    last: Tensor
    complete: bool = False

    @classmethod
    def empty(
        cls,
        unmerge: str,
        batch: int,
        tokens: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> UpdateCache:
        """A cache that knows nothing yet, for one of the `CACHED` unmerges."""
        if unmerge not in CACHED:
            raise ValueError(
                f"unmerge {unmerge!r} needs no cache; those that do: {', '.join(sorted(CACHED))}"
            )
        value = torch.zeros(batch, tokens, channels, dtype=dtype, device=device)
        last = torch.full((batch, tokens), -1.0, dtype=torch.float32, device=device)
        return cls(value, torch.zeros_like(value) if unmerge == "taylor" else None, last)

    @staticmethod
    def nbytes_for(unmerge: str, batch: int, tokens: int, channels: int, dtype: torch.dtype) -> int:
        """Bytes that `empty` would take; 0 for an unmerge without a cache."""
        if unmerge not in CACHED:
            return 0
        tensors = 2 if unmerge == "taylor" else 1
        return batch * tokens * (tensors * channels * dtype.itemsize + torch.float32.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        held = (self.value, self.slope, self.last)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def record(self, update: Tensor, step: Tensor, kept: Tensor | None = None) -> None:
        """Store computed updates, in place.

        Args:
            update: [B, K, C], or [B, N, C] where the step ran whole.
            step: 0-d float32 tensor.
            kept: [B, K] int64, whose updates these are; None: every token's.
        """
        if kept is None and update.shape != self.value.shape:
            raise ValueError(
                f"a whole update is {tuple(self.value.shape)}, this one is "
                f"{tuple(update.shape)}; give kept for a reduced one"
            )
        # A whole step is the same as keeping every token, without taking rows out and putting them back.
        since = self.last if kept is None else self.last.gather(1, kept)
        now = step.to(torch.float32).expand_as(since)
        update = update.to(self.value.dtype)
        slope = None
        if self.slope is not None:
            old = self.value if kept is None else gather_rows(self.value, kept)
            before = self.slope if kept is None else gather_rows(self.slope, kept)
            span = now - since
            change = (upcast(update) - upcast(old)).div_(span.clamp(min=1e-6)[..., None])
            # A second call within one step spans no time and says nothing of the slope.
            slope = torch.where((span > 0)[..., None], clamp_cast(change, before.dtype), before)
            slope = slope.masked_fill_((since < 0)[..., None], 0)
        if kept is None:
            self.value.copy_(update)
            self.last.copy_(now)
            if self.slope is not None and slope is not None:
                self.slope.copy_(slope)
            self.complete = True
        else:
            scatter_rows_(self.value, kept, update)
            self.last.scatter_(1, kept, now)
            if self.slope is not None and slope is not None:
                scatter_rows_(self.slope, kept, slope)


def _rescaled(update: Tensor, plan: Plan, x: Tensor, merged: Tensor) -> Tensor:
    """The inverse of MLERP: rho_i = ||x_i|| / ||x_merged||.  [B, K, C] -> [B, N, C]

    Capped at the group's size: without opposed tokens neither MLERP (rho <= 1) nor a mean asks
    for more, and with them the quotient has no bound.
    """
    x, y = upcast(x), upcast(merged)
    # Norms as scale * norm, divided part by part: neither may be representable by itself.
    x_scale, y_scale = max_abs(x), plan.broadcast(max_abs(y))
    x_norm = (x / x_scale).norm(dim=-1, keepdim=True)
    y_norm = plan.broadcast((y / max_abs(y)).norm(dim=-1, keepdim=True))
    size = plan.broadcast(plan.sizes()[..., None]).to(x.dtype)
    quotient = x_norm / y_norm.clamp(min=torch.finfo(x.dtype).tiny) * (x_scale / y_scale)
    # Behind a group of zeros there is no length to compare: a plain copy.
    rho = torch.where(y_norm > 0, torch.minimum(quotient, size), 1.0)
    return (plan.broadcast(upcast(update)) * rho).to(update.dtype)


def own_update(kind: str, cache: UpdateCache, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Each token's own last update, extrapolated for taylor and else repeated.  -> [B, N, C], a copy"""
    if kind == "temporal" or cache.slope is None:
        return cache.value.to(dtype, copy=True)
    age = step.to(torch.float32) - cache.last
    return clamp_cast(
        torch.addcmul(upcast(cache.value), age[..., None], upcast(cache.slope)), dtype
    )


def _from_past(
    kind: str, copied: Tensor, plan: Plan, cache: UpdateCache, step: Tensor, max_age: int | None
) -> Tensor:
    """Each removed token's own update as its cache has it, else the copy.  -> [B, N, C]"""
    age = step.to(torch.float32) - cache.last
    known = cache.last >= 0
    if max_age is not None:
        known = known & (age <= max_age)
    if kind != "blend":
        own = own_update(kind, cache, step, copied.dtype)
    else:
        before = plan.broadcast(plan.rows(cache.value))
        own = clamp_cast(upcast(cache.value) + (upcast(copied) - upcast(before)), copied.dtype)
        # The match's change is known only if its own past is.
        known = known & plan.broadcast(plan.rows(cache.last[..., None]) >= 0)[..., 0]
    return torch.where((known & ~plan.is_kept())[..., None], own, copied)


def _fits(update: Tensor, cache: UpdateCache, step: Tensor, kind: str) -> bool:
    """Whether the kernel takes this update and this cache."""
    alike = update.dtype == cache.value.dtype and step.device == cache.value.device
    return alike and (cache.slope is not None) == (kind == "taylor")


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
    """x plus what `unmerge` gives, and at the kept tokens exactly what was computed.

    Args:
        computed: [B, K, C] of x's dtype, what the kept tokens become instead of x plus their update (which
            rounds); None: x plus their update.
        x, update, plan, kind, merged, cache, step, max_age: as of `unmerge`.

    Returns:
        [B, N, C] of x's dtype.

    Raises:
        ValueError: as `unmerge`.
    """
    if use_fused_rows(x, update):
        if kind == "copy":
            copied: Tensor = torch.ops.tofu.unmerge_copy(
                x, update, plan.kept, plan.assign, computed
            )
            return copied
        if (
            kind in CACHED
            and cache is not None
            and step is not None
            and _fits(update, cache, step, kind)
        ):
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
    """Spread the kept tokens' update over all tokens; cached forms also record it in the cache.

    Args:
        update: [B, K, C].
        plan: the plan that x was reduced with.
        kind: one of `UNMERGES`.
        x, merged: the input before [B, N, C] and after [B, K, C] merging; mlerp needs both.
        cache: of this span and condition; the cached forms need it.
        step: 0-d float32 tensor, the current step; the cached forms need it.
        max_age: a cached update older than this many steps is not used; None: no limit.

    Returns:
        [B, N, C] of the update's dtype.

    Raises:
        ValueError: unknown form, a missing argument, or shapes that do not belong together.
    """
    if kind not in UNMERGES:
        raise ValueError(f"unknown unmerge {kind!r}; choose one of {', '.join(UNMERGES)}")
    if update.shape[:2] != plan.kept.shape:
        raise ValueError(
            f"update is {tuple(update.shape)} but the plan keeps {tuple(plan.kept.shape)} "
            "[batch, tokens]; unmerge with the plan that reduced the input"
        )
    if kind == "mlerp":
        if x is None or merged is None:
            missing = "x" if x is None else "merged"
            raise ValueError(
                f"unmerge 'mlerp' needs {missing}: it rescales by ||x|| / ||merged||; "
                "pass the input before and after merge_tokens"
            )
        return _rescaled(update, plan, x, merged)
    if kind == "copy":
        return plan.broadcast(update)
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
            f"{shape}; keep one cache for each span and condition"
        )
    if kind == "taylor" and cache.slope is None:
        raise ValueError("unmerge 'taylor' needs a cache with slopes; make it by empty('taylor')")
    if _fits(update, cache, step, kind) and use_fused_rows(update, cache.value):
        return _cached_in_one_launch(update, plan, kind, cache, step, max_age, None, None)
    if cache.complete and max_age is None and kind != "blend":
        full = own_update(kind, cache, step, update.dtype)
        scatter_rows_(full, plan.kept, update)
    else:
        full = _from_past(kind, plan.broadcast(update), plan, cache, step, max_age)
    cache.record(update, step, plan.kept)
    if kind == "blend":  # the next step builds on what this one used, for removed tokens too
        cache.value.copy_(full)
    return full
