"""Merge the most similar (source, destination) pairs, one destination a cell: ToMe for SD.

Bipartite soft matching (arXiv 2303.17604) on 2-D and 3-D grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..grid import TokenGrid
from ..plan import Plan, complement, highest
from ..random_bits import uniform
from .base import Evidence, Method, as_sides, register
from .matching import as_window, match, merging


@register
@dataclass(frozen=True)
class Tome(Method):
    """One token of every whole cell is a destination, the rest are sources; the best pairs merge.

    Rows and columns left over at the end of a side belong to no cell: they are sources only.

    Options:
        stride: cell height and width, (rows, columns) or one int for both.
        frame_stride: cell length in frames.
        random: take the destination at a seeded place in each cell, new at every step, instead
            of the first.
        window: match only inside tiles: an int, or (frames, rows, columns)
            with None for a whole side.
    """

    name = "tome"

    stride: int | tuple[int, int] = (2, 2)
    frame_stride: int = 1
    random: bool = False
    window: int | tuple[int | None, int | None, int | None] | None = None

    def __post_init__(self) -> None:
        stride, window = as_sides("stride", self.stride, 2), as_window(self.window)
        cell = (*as_sides("frame_stride", self.frame_stride, 1), *stride)
        if prod(cell) == 1:
            raise ValueError("stride 1 makes every token a destination; use 2 or more on one axis")
        if not isinstance(self.random, bool):
            raise ValueError(f"random is {self.random!r}; give True or False")
        if window is not None and any(w < c for w, c in zip(window, cell, strict=True)):
            raise ValueError(
                f"window {window} is smaller than the cell {cell} (frames, rows, columns), so "
                "tiles would hold no destination; enlarge the window or lower the stride"
            )
        object.__setattr__(self, "frame_stride", cell[0])
        object.__setattr__(self, "stride", stride)
        object.__setattr__(self, "window", window)

    def _cell(self, grid: TokenGrid) -> tuple[int, ...]:
        """(frames, rows, columns) of a cell; a side shorter than the stride is one cell long."""
        stride = (self.frame_stride, *as_sides("stride", self.stride, 2))
        return tuple(min(c, s) for c, s in zip(stride, grid.sides, strict=True))

    @property
    def max_ratio(self) -> float:
        return 1 - 1 / (self.frame_stride * prod(as_sides("stride", self.stride, 2)))

    def max_remove(self, grid: TokenGrid) -> int:
        # A list: dynamo traces no generator into prod.
        return grid.tokens - prod(
            [s // c for s, c in zip(grid.sides, self._cell(grid), strict=True)]
        )

    def merge(self, depth: float) -> str:
        return "mean"

    def destinations(self, evidence: Evidence) -> Tensor:
        """One position in every whole cell, ascending.  -> [D] int64."""
        grid, cell = evidence.grid, self._cell(evidence.grid)
        device = evidence.metric.device
        position = torch.zeros(1, dtype=torch.int64, device=device)
        for side, size in zip(grid.sides, cell, strict=True):
            first = torch.arange(side // size, device=device) * size
            position = (position[:, None] * side + first).flatten()
        if not self.random:
            return position
        # The draw belongs to the cell's first position; below 2^24 numbers it stays below `prod`.
        draw = uniform(evidence.seed, evidence.step, position) * prod(cell)
        place = draw.to(torch.int64).clamp(max=prod(cell) - 1)
        column, row = place % cell[2], place // cell[2] % cell[1]
        frame = place // (cell[1] * cell[2])
        return (position + (frame * grid.height + row) * grid.width + column).sort().values

    def _sides(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Destinations [1, D] and sources [1, N - D]."""
        targets = self.destinations(evidence)[None]
        return targets, complement(targets, evidence.grid.tokens)

    def choose(self, evidence: Evidence) -> Plan:
        batch = evidence.metric.shape[0]
        if self.random:
            targets, sources = self._sides(evidence)
        else:
            cell = self._cell(evidence.grid)
            targets, sources = evidence.once(("cells", cell), lambda: self._sides(evidence))
        targets, sources = targets.expand(batch, -1), sources.expand(batch, -1)
        value, position = match(evidence, sources, targets, as_window(self.window))
        return merging(evidence, sources, highest(value, evidence.remove), position)
