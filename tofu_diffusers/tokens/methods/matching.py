"""Finding each removed token's best kept token, over the whole grid or inside its tile.

Tiles partition the grid. Where a side is no multiple of the tile's, the last tile is shifted
inside, so that every tile is full and the cost is O(N * tile) with one static shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import best_match, best_match_tiles, energy, energy_tiles
from ..gather import gather_rows
from ..grid import TokenGrid
from ..plan import Plan, make_plan, positions_of
from .base import Evidence, as_sides

Window = tuple[int, int, int]
WHOLE_SIDE = 2**31


def as_window(value: object) -> Window | None:
    """The `window` option: None, an int for every axis, or (frames, rows, columns).

    A None among the three is the whole side: (1, None, None) matches inside every frame of a video.
    """
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        value = [WHOLE_SIDE if side is None else side for side in value]
    frames, rows, columns = as_sides("window", value, 3)
    return frames, rows, columns


def _axis(side: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis cut into tiles.

    Returns:
        members [T, tile], owner [side] (the tile of each place), slot [side] (its place in it).
    """
    place = torch.arange(side, device=device)
    owner = place // tile
    starts = (torch.arange(-(-side // tile), device=device) * tile).clamp(max=side - tile)
    members = starts[:, None] + torch.arange(tile, device=device)
    return members, owner, place - starts[owner]


def tiles_of(grid: TokenGrid, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tiles of a grid and each token's place among their members.

    Returns:
        members [T, S] int64, positions, ascending in each tile;
        place [N] int64, index of each token into the flattened members, in its own tile.
    """
    sides = grid.sides
    tile = tuple(min(w, s) for w, s in zip(window, sides, strict=True))
    axes = [_axis(s, t, device) for s, t in zip(sides, tile, strict=True)]
    members = torch.zeros(1, 1, dtype=torch.int64, device=device)
    owner = slot = torch.zeros(1, dtype=torch.int64, device=device)
    for side, size, (ms, own, at) in zip(sides, tile, axes, strict=True):
        members = members[:, None, :, None] * side + ms[None, :, None, :]
        members = members.flatten(2).flatten(0, 1)
        owner = (owner[:, None] * ms.shape[0] + own).flatten()
        slot = (slot[:, None] * size + at).flatten()
    return members, owner * members.shape[1] + slot


def _is_global(grid: TokenGrid, window: Window | None) -> bool:
    """Whether one tile covers the grid."""
    return window is None or all(w >= s for w, s in zip(window, grid.sides, strict=True))


def match(
    evidence: Evidence, queries: Tensor, candidates: Tensor, window: Window | None
) -> tuple[Tensor, Tensor]:
    """For each query, its most similar candidate; the lowest position of equals.

    Args:
        evidence: of N tokens and their metric [B, N, C].
        queries: [B, M] int64, positions.
        candidates: [B, D] int64, ascending positions, D >= 1.
        window: look only inside the query's tile. In a tile without candidates the match is the
            nearest candidate before the query in token order, or the first one of all.

    Returns:
        value [B, M] in float32 or float64, -inf where the tile had no candidate;
        position [B, M] int64.
    """
    metric, grid = evidence.metric, evidence.grid
    if window is None or _is_global(grid, window):
        value, index = best_match(gather_rows(metric, queries), gather_rows(metric, candidates))
        return value, candidates.gather(1, index)
    members, place = _tiles(evidence, window)
    flag = torch.zeros(metric.shape[:2], dtype=torch.int64, device=metric.device)
    flag = flag.scatter(1, candidates, torch.ones_like(candidates))
    values, positions = best_match_tiles(metric, flag.bool(), members)
    here = place[queries]
    value = values.flatten(1).gather(1, here)
    position = positions.flatten(1).gather(1, here)
    before = (flag.cumsum(1) - 1).clamp(min=0).gather(1, queries)
    return value, torch.where(value == -torch.inf, candidates.gather(1, before), position)


def _tiles(evidence: Evidence, window: Window) -> tuple[Tensor, Tensor]:
    grid, device = evidence.grid, evidence.metric.device
    return evidence.once(("tiles", window), lambda: tiles_of(grid, window, device))


def assign_to_kept(evidence: Evidence, keep: Tensor, window: Window | None) -> Plan:
    """The plan that keeps the tokens flagged [B, N] and assigns every other to its best of them."""
    tokens, removed = evidence.grid.tokens, evidence.remove
    count = tokens - removed
    if not evidence.matched:
        return make_plan(keep, None, count)
    others = positions_of(~keep, removed)
    _, position = match(evidence, others, positions_of(keep, count), window)
    everyone = torch.zeros_like(keep, dtype=torch.int64)
    return make_plan(keep, everyone.scatter(1, others, position), count)


def merging(evidence: Evidence, sources: Tensor, merges: Tensor, position: Tensor) -> Plan:
    """The plan in which some tokens merge into their matches and all others are kept.

    Args:
        sources: [B, M] int64, positions of those that may merge.
        merges: [B, M] bool, which of them do, `evidence.remove` a row. Of equally similar pairs
            `highest` names the earlier.
        position: [B, M] int64, of their matches, none of them a source.
    """
    batch, tokens = sources.shape[0], evidence.grid.tokens
    keep = torch.ones(batch, tokens, dtype=torch.bool, device=sources.device)
    match = torch.zeros(batch, tokens, dtype=torch.int64, device=sources.device)
    return make_plan(
        keep.scatter(1, sources, ~merges),
        match.scatter(1, sources, position),
        tokens - evidence.remove,
    )


def energies(evidence: Evidence, margin: float, alpha: float, window: Window | None) -> Tensor:
    """PiToMe's energy of every token over the grid, or over its tile.  -> [B, N]."""
    metric = evidence.metric
    if window is None or _is_global(evidence.grid, window):
        return energy(metric, margin, alpha)
    members, place = _tiles(evidence, window)
    return energy_tiles(metric, members, margin, alpha).flatten(1)[:, place]
