"""The mean and the MLERP of every group of tokens, in Triton.

    mean   xbar = 1/n sum_k x_k
    mlerp  xbar / max(||xbar||, eps max_k ||x_k||) * max_k ||x_k||       (ToFu, arXiv 2312.01026)

`merge.mean` and `merge.mlerp` are the definition. Tokens are listed group by group, so that one program adds
a group's members in their order: no atomics, and the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import row_warps


def members(assign: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The tokens group by group, ascending in each, and where each group starts.

    In plain torch and apart from the merges: a graph that merges twice by one plan sorts once.

    Args:
        assign: [B, N] int64, each token's group.

    Returns:
        order [B, N] int64 and offsets [B, groups + 1] int64: those of group k are
        order[offsets[k] : offsets[k + 1]].
    """
    ranked, order = assign.sort(dim=1, stable=True)
    edges = torch.arange(groups + 1, device=assign.device).expand(assign.shape[0], -1)
    return order, torch.searchsorted(ranked, edges.contiguous())


def _cut(channels: int) -> dict[str, int]:
    """Options: several members at once, as most groups are of one to four, but fewer of wide tokens."""
    block = triton.next_power_of_2(channels)
    rows = max(1, min(4, 8192 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": row_warps(rows * block)}


@triton.jit
def _members(x, order, first, stop, channels, sn, sc, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The next members' tokens, zero rows behind the last.  -> [ROWS, BLOCK] float32."""
    member = first + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    token = tl.load(order + member, mask=member < stop, other=0)
    inside = (member < stop)[:, None] & (c < channels)[None, :]
    value = tl.load(x + token[:, None] * sn + (c * sc)[None, :], mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _mean(
    x,
    order,
    offsets,
    out,
    tokens,
    groups,
    channels,
    sb,
    sn,
    sc,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x += batch * sb
    order += batch * tokens
    start = tl.load(offsets + batch * (groups + 1) + group)
    stop = tl.load(offsets + batch * (groups + 1) + group + 1)
    size = (stop - start).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, ROWS):
        value = _members(x, order, first, stop, channels, sn, sc, ROWS, BLOCK)
        # Divided before the sum: the sum of large tokens may not be representable, their mean is.
        total += tl.sum(tl.div_rn(value, size), axis=0)
    c = tl.arange(0, BLOCK)
    there = out + (batch * groups + group) * channels + c
    tl.store(there, total.to(out.dtype.element_ty), mask=c < channels)


@triton.jit
def _mlerp(
    x,
    order,
    offsets,
    out,
    tokens,
    groups,
    channels,
    sb,
    sn,
    sc,
    eps,
    tiny,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x += batch * sb
    order += batch * tokens
    start = tl.load(offsets + batch * (groups + 1) + group)
    stop = tl.load(offsets + batch * (groups + 1) + group + 1)
    # Brought to a largest entry of 1 first: squares neither overflow nor vanish.
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, ROWS):
        value = _members(x, order, first, stop, channels, sn, sc, ROWS, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.abs(value), axis=0))
    scale = tl.maximum(tl.max(largest), tiny)
    total = tl.zeros((BLOCK,), tl.float32)
    longest = tl.zeros((ROWS,), tl.float32)
    for first in range(start, stop, ROWS):
        value = _members(x, order, first, stop, channels, sn, sc, ROWS, BLOCK)
        value = tl.div_rn(value, scale)
        longest = tl.maximum(longest, tl.sqrt_rn(tl.sum(value * value, axis=1)))
        total += tl.sum(value, axis=0)
    norm = tl.max(longest)
    xbar = tl.div_rn(total, (stop - start).to(tl.float32))
    # A NaN must not turn into the bound.
    length = tl.maximum(
        tl.sqrt_rn(tl.sum(xbar * xbar)),
        tl.maximum(eps * norm, tiny),
        propagate_nan=tl.PropagateNan.ALL,
    )
    c = tl.arange(0, BLOCK)
    there = out + (batch * groups + group) * channels + c
    result = tl.div_rn(xbar, length) * norm * scale
    tl.store(there, result.to(out.dtype.element_ty), mask=c < channels)


@torch.library.custom_op(
    "tofu::merge_mean", mutates_args=(), schema="(Tensor x, Tensor order, Tensor offsets) -> Tensor"
)
def merge_mean(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """`merge.mean` of the groups that `members` lists.  [B, N, C], any strides -> [B, K, C]."""
    (batch, tokens, channels), groups = x.shape, offsets.shape[1] - 1
    out = x.new_empty(batch, groups, channels)
    _mean[(groups, batch)](
        x,
        order.contiguous(),
        offsets.contiguous(),
        out,
        tokens,
        groups,
        channels,
        *x.stride(),
        **_cut(channels),
    )
    return out


@torch.library.custom_op(
    "tofu::merge_mlerp",
    mutates_args=(),
    schema="(Tensor x, Tensor order, Tensor offsets, float eps) -> Tensor",
)
def merge_mlerp(x: Tensor, order: Tensor, offsets: Tensor, eps: float) -> Tensor:
    """`merge.mlerp` of the groups that `members` lists; eps is `merge.EPS`."""
    (batch, tokens, channels), groups = x.shape, offsets.shape[1] - 1
    out = x.new_empty(batch, groups, channels)
    _mlerp[(groups, batch)](
        x,
        order.contiguous(),
        offsets.contiguous(),
        out,
        tokens,
        groups,
        channels,
        *x.stride(),
        eps,
        torch.finfo(torch.float32).tiny,
        **_cut(channels),
    )
    return out


@torch.library.register_fake("tofu::merge_mean")
def _(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], offsets.shape[1] - 1, x.shape[2])


@torch.library.register_fake("tofu::merge_mlerp")
def _(x: Tensor, order: Tensor, offsets: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], offsets.shape[1] - 1, x.shape[2])
