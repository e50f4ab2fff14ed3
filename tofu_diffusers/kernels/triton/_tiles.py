"""Cosines of two blocks of rows, in Triton: what `match` and `energy` share.

    cos(q, c) = (2^a q . 2^b c) / (||2^a q|| ||2^b c||)

One small kernel reads each row once and writes it scaled by a power of two (exact, so float16 and bfloat16
stay what they are) with the inverse of its norm. The product then runs on the matrix units in the input's
own dtype with float32 sums, and the norms enter after it: no unit vectors, rounded to 16 bits, are ever made.
"""

# Kernels have no Python types: their arguments are pointers and numbers on the device.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROGRAMS = 1024
"""Candidates are split among programs until there are about so many: several for each of 100-200 SMs."""


class UnitRows(NamedTuple):
    """Rows [B, N, P] near unit length, and the inverses of their norms [B, N].

    The rows are of the input's dtype, P the channels padded with zeros; the inverses are float32, 0 for a
    zero row.
    """

    rows: Tensor
    inverse: Tensor


@triton.jit
def _unit_rows(
    x,
    rows,
    inverse,
    tokens,
    channels,
    sb,
    sn,
    sc,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (c < channels)[None, :]
    at = x + batch * sb + token.to(tl.int64)[:, None] * sn + c[None, :] * sc
    given = tl.load(at, mask=inside, other=0.0)
    value = given.to(tl.float32)
    # 2^-e of the largest entry, by its exponent bits. Not of infinity or NaN, which make NaN below.
    exponent = (tl.max(tl.abs(value), axis=1).to(tl.int32, bitcast=True) >> 23) & 255
    factor = ((254 - tl.minimum(exponent, 253)) << 23).to(tl.float32, bitcast=True)
    value *= factor[:, None]
    norm = tl.sqrt_rn(tl.sum(value * value, axis=1))
    # Of a zero row 0 / 1, so that nothing divides by 0.
    unit = tl.where(norm > 0, 1.0, 0.0) / tl.where(norm > 0, norm, 1.0)
    here = batch * tokens + token
    tl.store(inverse + here, unit, mask=token < tokens)
    there = here[:, None] * PADDED + c[None, :]
    padded = (token < tokens)[:, None] & (c < PADDED)[None, :]
    tl.store(rows + there, value.to(given.dtype), mask=padded)


@triton.jit
def flat_rows(tiles, tile, place, count, offset, TILED: tl.constexpr):
    """Rows in the flattened batch of places in a sequence, or in a tile; the last one beyond its end."""
    row = tl.minimum(place, count - 1).to(tl.int64)
    if TILED:
        row = tl.load(tiles + tile * count + row)
    return offset + row


@triton.jit
def cosines(
    q,
    inverse_q,
    rows,
    c,
    inverse_c,
    columns,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Cosines of the rows [BLOCK_M] of q with the rows `columns` [BLOCK_N] of c.  -> float32."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, PADDED, BLOCK_K):
        a = tl.load(q + rows[:, None] * PADDED + (start + k)[None, :])
        b = tl.load(c + columns[None, :] * PADDED + (start + k)[:, None])
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    # One norm at a time: their product may be 0 * infinity where the row's alone is not.
    return total * tl.load(inverse_q + rows)[:, None] * tl.load(inverse_c + columns)[None, :]


def unit_rows(x: Tensor) -> UnitRows:
    """What `cosines` reads.  [B, N, C], any strides."""
    batch, tokens, channels = x.shape
    step = block_k(x.dtype)
    # Padded, so that the product needs no mask over channels and its loads are aligned.
    padded = -(-channels // step) * step
    rows = x.new_empty(batch, tokens, padded)
    inverse = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    cut = row_blocks(padded)
    _unit_rows[(triton.cdiv(tokens, cut["ROWS"]), batch)](
        x,
        rows,
        inverse,
        tokens,
        channels,
        *x.stride(),
        PADDED=padded,
        **cut,
    )
    return UnitRows(rows, inverse)


def row_warps(block: int) -> int:
    """Warps for so many numbers: 8 a thread, one 16-byte access of 16-bit ones."""
    return max(1, min(8, block // 256))


def row_blocks(channels: int) -> dict[str, int]:
    """Options of a kernel that moves whole rows: several short ones, or one long one, a program."""
    block = triton.next_power_of_2(channels)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": row_warps(rows * block)}


def block_k(dtype: torch.dtype) -> int:
    """Channels that one turn of the product takes: 128 bytes a row."""
    return 128 // dtype.itemsize


class Launch(NamedTuple):
    """How a product of [M] by [D] rows in each of `groups` is cut.

    Attributes:
        grid: Programs: groups times blocks of queries, splits of the candidates.
        run: Candidates that one program looks at.
        options: Of the kernel: block sizes, precision, warps.
    """

    grid: tuple[int, int]
    run: int
    options: dict[str, Any]

    @property
    def splits(self) -> int:
        """Parts of each result, one for each run of candidates."""
        return self.grid[1]


def launch(unit: UnitRows, groups: int, queries: int, candidates: int) -> Launch:
    """The cut for these sizes, from shapes and dtype alone."""
    wide = unit.rows.dtype == torch.float32
    # 16 bits: the usual block of a matrix product on tensor cores, 96 KiB in three stages. float32 takes
    # three tf32 products for one of about float32's precision, and half the block for registers.
    most = 64 if wide else 128
    block_m, block_n = (
        max(16, min(most, triton.next_power_of_2(side))) for side in (queries, candidates)
    )
    blocks, turns = groups * -(-queries // block_m), -(-candidates // block_n)
    each = -(-turns // min(turns, max(1, PROGRAMS // max(1, blocks))))
    options = {
        "PADDED": unit.rows.shape[2],
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k(unit.rows.dtype),
        "PRECISION": "tf32x3" if wide else "ieee",
        # The interpreter holds bfloat16 as integers and would multiply those.
        "WIDEN": INTERPRETED,
        "num_warps": 8 if block_m * block_n > 64 * 64 else 4,
        "num_stages": 3,
    }
    return Launch((blocks, -(-turns // each)), each * block_n, options)
