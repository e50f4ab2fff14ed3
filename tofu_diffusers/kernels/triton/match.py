"""The most similar candidate of every query by cosine, in Triton.

    value_i = max_j cos(q_i, c_j),  index_i = the lowest such j

`reference.best_match` and `best_match_tiles` are the definition. The maximum is kept beside the running
product: no matrix of similarities reaches memory, only one pair of numbers a query and run of candidates.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import UnitRows, cosines, flat_rows, launch, unit_rows


@triton.jit
def _match(
    q,
    inverse_q,
    c,
    inverse_c,
    tiles,
    allowed,
    value,
    index,
    queries,
    candidates,
    tokens_q,
    tokens_c,
    count,
    run,
    TILED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    batch, tile = group // count, group % count
    place = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = flat_rows(tiles, tile, place, queries, batch * tokens_q, TILED)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    found = tl.zeros((BLOCK_M,), tl.int32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, candidates), BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        columns = flat_rows(tiles, tile, slot, candidates, batch * tokens_c, TILED)
        cosine = cosines(
            q,
            inverse_q,
            rows,
            c,
            inverse_c,
            columns,
            PADDED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
            WIDEN,
        )
        # To torch, NaN is the largest number.
        cosine = tl.where(cosine == cosine, cosine, float("inf"))
        inside = slot < candidates
        if TILED:
            inside &= tl.load(allowed + columns) != 0
        cosine = tl.where(inside[None, :], cosine, -float("inf"))
        top, at = tl.max(cosine, axis=1, return_indices=True)
        # Strictly better: of equals the first block's, and in a block the first one's, stays.
        better = top > best
        best = tl.where(better, top, best)
        found = tl.where(better, start + at, found)
    best = tl.where(best == float("inf"), float("nan"), best)
    position = found.to(tl.int64)
    if TILED:
        position = tl.load(tiles + tile * candidates + position)
    out = (group * queries + place) * tl.num_programs(1) + tl.program_id(1)
    tl.store(value + out, best, mask=place < queries)
    tl.store(index + out, position, mask=place < queries)


def _best(
    q: UnitRows,
    c: UnitRows,
    sides: tuple[int, int, int],
    tiles: Tensor | None,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernel, and the best of its splits.  sides: groups a batch row, queries and candidates of each."""
    count, queries, candidates = sides
    groups = q.rows.shape[0] * count
    cut = launch(q, groups, queries, candidates)
    shape = (groups, queries, cut.splits)
    value = torch.empty(shape, dtype=torch.float32, device=q.rows.device)
    index = torch.empty(shape, dtype=torch.int64, device=q.rows.device)
    _match[cut.grid](
        q.rows,
        q.inverse,
        c.rows,
        c.inverse,
        index if tiles is None else tiles,
        index if allowed is None else allowed,
        value,
        index,
        queries,
        candidates,
        q.rows.shape[1],
        c.rows.shape[1],
        count,
        cut.run,
        TILED=tiles is not None,
        **cut.options,
    )
    if cut.splits == 1:
        return value[..., 0], index[..., 0]
    # Splits are in the order of the candidates, and max takes the first of equals.
    top, split = value.max(dim=-1)
    return top, index.gather(-1, split[..., None])[..., 0]


@torch.library.custom_op(
    "tofu::best_match",
    mutates_args=(),
    schema="(Tensor queries, Tensor candidates) -> (Tensor, Tensor)",
)
def best_match(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.best_match`.  [B, M, C], [B, D, C] -> float32 [B, M], int64 [B, M]."""
    sides = (1, queries.shape[1], candidates.shape[1])
    value, index = _best(unit_rows(queries), unit_rows(candidates), sides, None, None)
    return value.contiguous(), index.contiguous()


@torch.library.register_fake("tofu::best_match")
def _(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    shape = queries.shape[:2]
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(
        shape, dtype=torch.int64
    )


@torch.library.custom_op(
    "tofu::best_match_tiles",
    mutates_args=(),
    schema="(Tensor metric, Tensor candidate, Tensor tiles) -> (Tensor, Tensor)",
)
def best_match_tiles(metric: Tensor, candidate: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.best_match_tiles`.  [B, N, C], bool [B, N], int64 [T, S] -> [B, T, S] twice."""
    unit, (count, side) = unit_rows(metric), tiles.shape
    allowed = candidate.contiguous().view(torch.uint8)
    value, position = _best(unit, unit, (count, side, side), tiles.contiguous(), allowed)
    shape = (metric.shape[0], count, side)
    return value.reshape(shape).contiguous(), position.reshape(shape).contiguous()


@torch.library.register_fake("tofu::best_match_tiles")
def _(metric: Tensor, candidate: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    shape = (metric.shape[0], *tiles.shape)
    return metric.new_empty(shape, dtype=torch.float32), metric.new_empty(shape, dtype=torch.int64)
