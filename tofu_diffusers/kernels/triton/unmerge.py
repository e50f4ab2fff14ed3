"""What every token gets back, and its residual, in one pass over the tokens, in Triton.

    copy      y_i = x_i + d_m                       d the kept tokens' updates, m = assign_i
    temporal  y_i = x_i + v_i                       v, s, t': the cache's value, slope and last step
    taylor    y_i = x_i + v_i + (t - t') s_i
    blend     y_i = x_i + v_i + (d_m - v_m)
    kept      y_i = x_i + d_i, or what was computed for it, exactly

`unmerge.unmerge` with `UpdateCache.record` is the definition, and where a token has no past that may be used
the result is the copy. A program owns its tokens: it reads and rewrites their rows of the cache, and no
others', so the cache changes in place. Only blend looks at another row, and gets it from before the launch.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import row_blocks
from .gather import take_rows

FORMS = ("temporal", "taylor", "blend")


@triton.jit
def clamp_cast(x, limit):
    """Within the range of a dtype; NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _unmerge(
    x,
    update,
    computed,
    kept,
    assign,
    value,
    slope,
    last,
    step,
    before,
    before_last,
    out,
    tokens,
    slots,
    channels,
    xb,
    xn,
    xc,
    limit,
    max_age,
    HAS_X: tl.constexpr,
    HAS_COMPUTED: tl.constexpr,
    CACHED: tl.constexpr,
    TAYLOR: tl.constexpr,
    BLEND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (c < channels)[None, :]
    token = tl.minimum(token, tokens - 1).to(tl.int64)
    here = batch * tokens + token
    match = batch * slots + tl.load(assign + here)
    own = (tl.load(kept + match) == token)[:, None]
    theirs = match[:, None] * channels + c[None, :]
    at = here[:, None] * channels + c[None, :]

    # Masks keep rows that are not needed from being read.
    if CACHED:
        now = tl.load(step).to(tl.float32)
        since = tl.load(last + here)[:, None]
        age = now - since
        known = (since >= 0) & (age <= max_age) & (own == 0)
        needs_copy, needs_past = inside & (known == 0), inside & known
        if TAYLOR:
            needs_past = inside & (known | own)
        if BLEND:
            known = known & (tl.load(before_last + match) >= 0)[:, None]
            needs_copy, needs_past = inside, inside & known
        copied = tl.load(update + theirs, mask=needs_copy, other=0.0).to(tl.float32)
        past = tl.load(value + at, mask=needs_past, other=0.0).to(tl.float32)
        guess, changed = past, inside & own
        if TAYLOR:
            trend = tl.load(slope + at, mask=needs_past, other=0.0).to(tl.float32)
            guess = clamp_cast(past + age * trend, limit)
            change = clamp_cast(tl.div_rn(copied - past, tl.maximum(age, 1e-6)), limit)
            # A second call within one step spans no time and says nothing of the slope.
            change = tl.where(since >= 0, tl.where(age > 0, change, trend), 0.0)
            tl.store(slope + at, change.to(slope.dtype.element_ty), mask=inside & own)
        if BLEND:
            was = tl.load(before + theirs, mask=needs_past, other=0.0).to(tl.float32)
            guess = clamp_cast(past + (copied - was), limit)
            # What it used is what the next step builds on, of removed tokens too.
            changed = inside
        used = tl.where(known, guess, copied)
        tl.store(value + at, used.to(value.dtype.element_ty), mask=changed)
    else:
        used = tl.load(update + theirs, mask=inside, other=0.0).to(tl.float32)

    result = used.to(update.dtype.element_ty).to(tl.float32)
    if HAS_X:
        residual = x + batch * xb + token[:, None] * xn + c[None, :] * xc
        needs_x = inside
        if HAS_COMPUTED:
            needs_x = inside & (own == 0)
        given = tl.load(residual, mask=needs_x, other=0.0).to(tl.float32)
        result = given + result.to(x.dtype.element_ty).to(tl.float32)
    if HAS_COMPUTED:
        exact = tl.load(computed + theirs, mask=inside & own, other=0.0)
        result = tl.where(own, exact.to(tl.float32), result)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def _launch(
    update: Tensor,
    kept: Tensor,
    assign: Tensor,
    x: Tensor | None,
    computed: Tensor | None,
    cache: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None,
    how: str = "copy",
    max_age: float | None = None,
) -> Tensor:
    """The kernel for one form. cache: value, slope, last and step, for those that have it."""
    (batch, slots, channels), tokens = update.shape, assign.shape[1]
    like = update if x is None else x
    out = like.new_empty(batch, tokens, channels)
    update, kept = update.contiguous(), kept.contiguous()
    # Stands for pointers that this form does not read.
    unused = out
    value, slope, last, step = (unused, None, unused, unused) if cache is None else cache
    before = before_last = unused
    if how == "blend":
        before, before_last = take_rows(value, kept), last.gather(1, kept)
    cut = row_blocks(channels)
    _unmerge[(triton.cdiv(tokens, cut["ROWS"]), batch)](
        unused if x is None else x,
        update,
        unused if computed is None else computed.contiguous(),
        kept,
        assign.contiguous(),
        value,
        unused if slope is None else slope,
        last,
        step,
        before,
        before_last,
        out,
        tokens,
        slots,
        channels,
        *((0, 0, 0) if x is None else x.stride()),
        torch.finfo(update.dtype).max,
        math.inf if max_age is None else max_age,
        HAS_X=x is not None,
        HAS_COMPUTED=computed is not None,
        CACHED=cache is not None,
        TAYLOR=how == "taylor",
        BLEND=how == "blend",
        **cut,
    )
    if cache is not None:
        # Not in the kernel: every warp of a program reads a token's step, and one might write it before
        # another has.
        last.scatter_(1, kept, step.to(last.dtype).expand(kept.shape))
    return out


@torch.library.custom_op(
    "tofu::unmerge_copy",
    mutates_args=(),
    schema="(Tensor x, Tensor update, Tensor kept, Tensor assign, Tensor? computed) -> Tensor",
)
def unmerge_copy(
    x: Tensor, update: Tensor, kept: Tensor, assign: Tensor, computed: Tensor | None
) -> Tensor:
    """Add to x every token's copy of its kept token's update.

    Args:
        x: [B, N, C], any strides.
        update: [B, K, C].
        kept, assign: the plan's, [B, K] and [B, N] int64.
        computed: [B, K, C], what the kept tokens become, in place of x plus their update.

    Returns:
        [B, N, C] of x's dtype.
    """
    return _launch(update, kept, assign, x, computed)


@torch.library.register_fake("tofu::unmerge_copy")
def _(x: Tensor, update: Tensor, kept: Tensor, assign: Tensor, computed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "tofu::unmerge_cached",
    mutates_args=("value", "slope", "last"),
    schema=(
        "(Tensor update, Tensor kept, Tensor assign, Tensor(a!) value, Tensor(b!)? slope, "
        "Tensor(c!) last, Tensor step, str how, float? max_age, Tensor? x, Tensor? computed) -> Tensor"
    ),
)
def unmerge_cached(
    update: Tensor,
    kept: Tensor,
    assign: Tensor,
    value: Tensor,
    slope: Tensor | None,
    last: Tensor,
    step: Tensor,
    how: str,
    max_age: float | None,
    x: Tensor | None,
    computed: Tensor | None,
) -> Tensor:
    """One of `FORMS` and its record in the cache, in place.

    Args:
        update: [B, K, C] of the cache's dtype.
        value, slope, last: the `UpdateCache`'s, contiguous; slope for taylor only.
        step: 0-d tensor on their device.
        how: one of `FORMS`.
        max_age: a cached update older than this many steps is not used; None: no limit.
        x: [B, N, C] to add to; None: the update alone is returned.
        computed: as of `unmerge_copy`.

    Returns:
        [B, N, C] of x's dtype, without x of the update's.
    """
    return _launch(update, kept, assign, x, computed, (value, slope, last, step), how, max_age)


@torch.library.register_fake("tofu::unmerge_cached")
def _(
    update: Tensor,
    kept: Tensor,
    assign: Tensor,
    value: Tensor,
    slope: Tensor | None,
    last: Tensor,
    step: Tensor,
    how: str,
    max_age: float | None,
    x: Tensor | None,
    computed: Tensor | None,
) -> Tensor:
    return (update if x is None else x).new_empty(value.shape)
