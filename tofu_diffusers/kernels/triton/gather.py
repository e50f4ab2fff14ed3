"""Rows taken out of a batch and written into it in place, in Triton.

`gather_rows` and `scatter_rows_` are the definition. One launch each, where they need four: the
positions in the flattened batch, and a cast or a copy of strided rows, are part of the copy.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import row_blocks


@triton.jit
def _take(x, positions, out, count, channels, sb, sn, sc, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (c < channels)[None, :]
    position = tl.load(positions + batch * count + row, mask=row < count, other=0)
    value = tl.load(x + batch * sb + position[:, None] * sn + c[None, :] * sc, mask=inside)
    here = (batch * count + row)[:, None] * channels + c[None, :]
    tl.store(out + here, value, mask=inside)


@triton.jit
def _put(
    x,
    positions,
    rows,
    count,
    channels,
    xb,
    xn,
    xc,
    sb,
    sn,
    sc,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (c < channels)[None, :]
    position = tl.load(positions + batch * count + row, mask=row < count, other=0)
    given = rows + batch * sb + row.to(tl.int64)[:, None] * sn + c[None, :] * sc
    value = tl.load(given, mask=inside)
    there = x + batch * xb + position[:, None] * xn + c[None, :] * xc
    tl.store(there, value, mask=inside)  # cast to what x holds


@torch.library.custom_op(
    "tofu::take_rows", mutates_args=(), schema="(Tensor x, Tensor positions) -> Tensor"
)
def take_rows(x: Tensor, positions: Tensor) -> Tensor:
    """`gather_rows`.  [B, N, C] of any strides, int64 [B, M] -> [B, M, C]."""
    (batch, count), channels = positions.shape, x.shape[2]
    out = x.new_empty(batch, count, channels)
    cut = row_blocks(channels)
    _take[(triton.cdiv(count, cut["ROWS"]), batch)](
        x,
        positions.contiguous(),
        out,
        count,
        channels,
        *x.stride(),
        **cut,
    )
    return out


@torch.library.register_fake("tofu::take_rows")
def _(x: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty(*positions.shape, x.shape[2])


@torch.library.custom_op(
    "tofu::put_rows_",
    mutates_args=("x",),
    schema="(Tensor(a!) x, Tensor positions, Tensor rows) -> ()",
)
def put_rows_(x: Tensor, positions: Tensor, rows: Tensor) -> None:
    """`scatter_rows_` with a cast to x's dtype.  [B, N, C], distinct int64 [B, M], [B, M, C], any strides."""
    (batch, count), channels = positions.shape, x.shape[2]
    cut = row_blocks(channels)
    _put[(triton.cdiv(count, cut["ROWS"]), batch)](
        x,
        positions.contiguous(),
        rows,
        count,
        channels,
        *x.stride(),
        *rows.stride(),
        **cut,
    )


@torch.library.register_fake("tofu::put_rows_")
def _(x: Tensor, positions: Tensor, rows: Tensor) -> None:
    return None
