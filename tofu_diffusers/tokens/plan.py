"""Which tokens are kept and where every token goes: two index tensors of static shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gather import gather_rows


class Plan(NamedTuple):
    """A partition of N tokens into K groups, each named by the one token that is kept.

    A named tuple, so a pytree: it crosses `torch.compile` boundaries and can be stored as it is.

    Attributes:
        kept: [B, K] int64, positions of the kept tokens, ascending.
        assign: [B, N] int64, for every token the slot in `kept` of its group; a kept token has
            its own slot.
    """

    kept: Tensor
    assign: Tensor

    def sizes(self) -> Tensor:
        """Tokens in each group, the kept one included.  -> [B, K] int64, rows sum to N."""
        batch, slots = self.kept.shape
        row = torch.arange(batch, device=self.kept.device)[:, None] * slots
        index = (self.assign + row).flatten()
        # index_add over a flat index: scatter_add has no deterministic form on every torch.
        counts = self.kept.new_zeros(batch * slots).index_add(0, index, torch.ones_like(index))
        return counts.view(batch, slots)

    def is_kept(self) -> Tensor:
        """Whether each token is kept.  -> [B, N] bool."""
        position = torch.arange(self.assign.shape[1], device=self.assign.device)
        return self.kept.gather(1, self.assign) == position

    def removed(self) -> Tensor:
        """Positions of the removed tokens, ascending.  -> [B, N - K] int64."""
        return positions_of(~self.is_kept(), self.assign.shape[1] - self.kept.shape[1])

    def repeat(self, times: int) -> Plan:
        """The same plan for `times` copies of the batch, tiled as `Tensor.repeat` tiles rows."""
        return Plan(self.kept.repeat(times, 1), self.assign.repeat(times, 1))

    def padded(self, before: int, after: int) -> Plan:
        """The same plan for a sequence with so many more tokens around it, all of them kept."""
        if not before and not after:
            return self
        device, (batch, slots), tokens = self.kept.device, self.kept.shape, self.assign.shape[1]
        head = torch.arange(before, device=device).expand(batch, -1)
        tail = torch.arange(after, device=device).expand(batch, -1) + before
        return Plan(
            torch.cat([head, self.kept + before, tail + tokens], dim=1),
            torch.cat([head, self.assign + before, tail + slots], dim=1),
        )

    def placed(self, starts: Tensor, total: int) -> Plan:
        """The same plan in sequences of so many tokens, where it begins at `starts` [B]; others are kept."""
        slots, tokens = self.kept.shape[1], self.assign.shape[1]
        here = starts[:, None] + torch.arange(tokens, device=starts.device)
        everywhere = torch.arange(total, device=starts.device).expand(len(starts), -1)
        match = everywhere.scatter(1, here, self.kept.gather(1, self.assign) + starts[:, None])
        keep = torch.ones_like(everywhere, dtype=torch.bool).scatter(1, here, self.is_kept())
        return make_plan(keep, match, total - tokens + slots)

    def rows(self, x: Tensor) -> Tensor:
        """The kept tokens of x.  [B, N, C] -> [B, K, C]."""
        return gather_rows(x, self.kept)

    def broadcast(self, y: Tensor) -> Tensor:
        """To every token, the row of its group.  [B, K, C] -> [B, N, C]."""
        return gather_rows(y, self.assign)

    def check(self) -> None:
        """Read every index and raise ValueError on a broken invariant. Waits for the device."""
        kept, assign = self.kept, self.assign
        if kept.dtype != torch.int64 or assign.dtype != torch.int64:
            raise ValueError(f"plan indices are {kept.dtype} and {assign.dtype}; use torch.int64")
        if kept.ndim != 2 or assign.ndim != 2 or kept.shape[0] != assign.shape[0]:
            raise ValueError(
                f"kept is {tuple(kept.shape)} and assign {tuple(assign.shape)}; "
                "they must be [B, K] and [B, N] of one batch"
            )
        slots, tokens = kept.shape[1], assign.shape[1]
        if not 1 <= slots <= tokens:
            raise ValueError(f"plan keeps {slots} of {tokens} tokens; keep 1 to {tokens}")
        if bool((kept.diff(dim=1) <= 0).any()):
            raise ValueError("kept positions must ascend without repeats; sort them")
        if bool((kept < 0).any()) or bool((kept >= tokens).any()):
            raise ValueError(f"kept holds a position outside 0..{tokens - 1}")
        if bool((assign < 0).any()) or bool((assign >= slots).any()):
            raise ValueError(f"assign holds a slot outside 0..{slots - 1}")
        own = torch.arange(slots, device=kept.device).expand_as(kept)
        if not torch.equal(assign.gather(1, kept), own):
            raise ValueError("a kept token is assigned to another slot than its own")


def make_plan(keep: Tensor, match: Tensor | None, count: int) -> Plan:
    """Build a plan from the tokens to keep and, for every other, the position of its match.

    Args:
        keep: [B, N] bool, `count` set in every row.
        match: [B, N] int64, for every removed token the position of a kept one. What it says of
            kept tokens is ignored: they match themselves. None: they all go to the first kept one.
    """
    slot, place = keep.cumsum(1) - 1, torch.arange(keep.shape[1], device=keep.device)
    kept = _at_slots(place, torch.where(keep, slot, count), count)
    if match is None:
        return Plan(kept, torch.where(keep, slot, 0))
    return Plan(kept, slot.gather(1, torch.where(keep, place, match)))


def complement(positions: Tensor, tokens: int) -> Tensor:
    """The positions not listed, ascending.  [B, M] int64, distinct -> [B, tokens - M] int64."""
    others = torch.ones(positions.shape[0], tokens, dtype=torch.bool, device=positions.device)
    others = others.scatter(1, positions, torch.zeros_like(positions, dtype=torch.bool))
    return positions_of(others, tokens - positions.shape[1])


def positions_of(flags: Tensor, count: int) -> Tensor:
    """Where the flags are set, ascending.  [B, N] bool, `count` set in every row -> [B, count] int64."""
    # A running count gives each its slot: nonzero() would have a dynamic shape, and to sort costs more.
    place = torch.arange(flags.shape[1], device=flags.device)
    return _at_slots(place, torch.where(flags, flags.cumsum(1) - 1, count), count)


def _at_slots(place: Tensor, slot: Tensor, count: int) -> Tensor:
    """Each place [N] at its slot [B, N]; what has slot `count` is left out.  -> [B, count]."""
    found = slot.new_zeros(slot.shape[0], count + 1)
    return found.scatter(1, slot, place.expand_as(slot))[:, :count]


def highest(score: Tensor, count: int) -> Tensor:
    """Flags the `count` highest of a row, of equals the first.  [B, N] -> [B, N] bool.

    NaN counts as the highest. There is no full sort in it, which costs more the more tokens there are.
    """
    inf = float("inf")
    score = score.nan_to_num(nan=inf, posinf=inf, neginf=-inf)
    least = score.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, level = score > least, score == least
    return above | (level & (level.cumsum(1) <= count - above.sum(1, keepdim=True)))
