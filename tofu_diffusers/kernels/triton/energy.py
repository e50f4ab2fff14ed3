"""PiToMe's energy of every token, in Triton.

    E_i = mean_j f_m(cos(v_i, v_j)),  f_m(c) = c if c >= m else alpha (exp(c - m) - 1)   (arXiv 2405.16148)

`reference.energy` and `energy_tiles` are the definition. The sum is taken beside the running product: no
N x N matrix reaches memory, only one number a token and run of tokens, added in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import cosines, flat_rows, launch, unit_rows


@triton.jit
def _energy(
    x,
    inverse,
    tiles,
    total,
    margin,
    alpha,
    side,
    tokens,
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
    blocks = tl.cdiv(side, BLOCK_M)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    batch, tile = group // count, group % count
    place = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = flat_rows(tiles, tile, place, side, batch * tokens, TILED)
    energy = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, side), BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        columns = flat_rows(tiles, tile, slot, side, batch * tokens, TILED)
        cosine = cosines(
            x,
            inverse,
            rows,
            x,
            inverse,
            columns,
            PADDED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
            WIDEN,
        )
        pull = tl.where(cosine >= margin, cosine, alpha * (tl.exp(cosine - margin) - 1.0))
        energy += tl.sum(tl.where((slot < side)[None, :], pull, 0.0), axis=1)
    out = (group * side + place) * tl.num_programs(1) + tl.program_id(1)
    tl.store(total + out, energy, mask=place < side)


def _mean(metric: Tensor, tiles: Tensor | None, margin: float, alpha: float) -> Tensor:
    """The kernel; without tiles the sequence is one tile.  [B, N, C] -> [B, T, S]."""
    batch, tokens, _ = metric.shape
    count, side = (1, tokens) if tiles is None else tiles.shape
    unit = unit_rows(metric)
    cut = launch(unit, batch * count, side, side)
    total = torch.empty(batch, count, side, cut.splits, dtype=torch.float32, device=metric.device)
    _energy[cut.grid](
        *unit,
        total if tiles is None else tiles.contiguous(),
        total,
        margin,
        alpha,
        side,
        tokens,
        count,
        cut.run,
        TILED=tiles is not None,
        **cut.options,
    )
    return total.sum(dim=-1) / side


@torch.library.custom_op(
    "tofu::energy", mutates_args=(), schema="(Tensor metric, float margin, float alpha) -> Tensor"
)
def energy(metric: Tensor, margin: float, alpha: float) -> Tensor:
    """`reference.energy`.  [B, N, C] -> float32 [B, N]."""
    return _mean(metric, None, margin, alpha)[:, 0].contiguous()


@torch.library.register_fake("tofu::energy")
def _(metric: Tensor, margin: float, alpha: float) -> Tensor:
    return metric.new_empty(metric.shape[:2], dtype=torch.float32)


@torch.library.custom_op(
    "tofu::energy_tiles",
    mutates_args=(),
    schema="(Tensor metric, Tensor tiles, float margin, float alpha) -> Tensor",
)
def energy_tiles(metric: Tensor, tiles: Tensor, margin: float, alpha: float) -> Tensor:
    """`reference.energy_tiles`.  [B, N, C], int64 [T, S] -> float32 [B, T, S]."""
    return _mean(metric, tiles, margin, alpha)


@torch.library.register_fake("tofu::energy_tiles")
def _(metric: Tensor, tiles: Tensor, margin: float, alpha: float) -> Tensor:
    return metric.new_empty((metric.shape[0], *tiles.shape), dtype=torch.float32)
