"""How an unmerge is asked for what all tokens get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..gather import scatter_rows_
from ..plan import Plan
from ..update_cache import CacheKind, UpdateCache


class Given(NamedTuple):
    """What an unmerge may read besides the update and the plan; what it said that it needs is there.

    Attributes:
        x, merged: The input before [B, N, C] and after [B, K, C] merging.
        cache: Of this site and branch.
        step: 0-d float32, the current step.
        max_age: A cached update older than this many steps is not used; None: no limit.
    """

    x: Tensor | None = None
    merged: Tensor | None = None
    cache: UpdateCache | None = None
    step: Tensor | None = None
    max_age: int | None = None

    @property
    def past(self) -> tuple[UpdateCache, Tensor]:
        """The cache and the step."""
        assert self.cache is not None and self.step is not None
        return self.cache, self.step


Spread = Callable[[Tensor, Plan, Given], Tensor]
"""(update [B, K, C], plan, given) -> [B, N, C]; one with a cache also records the update there."""


@dataclass(frozen=True)
class Unmerge:
    """An unmerge.

    Attributes:
        name: What users say.
        spread: The definition, in torch.
        cache: What it remembers from step to step.
        reads_merge: Whether it compares the input before and after merging.
        own_past: Whether no token that has a past gets another one's update.
        fused: Whether `torch.ops.tofu.unmerge_cached` has it.
    """

    name: str
    spread: Spread
    cache: CacheKind = CacheKind.NONE
    reads_merge: bool = False
    own_past: bool = False
    fused: bool = False

    @property
    def cached(self) -> bool:
        """Whether it remembers anything."""
        return self.cache is not CacheKind.NONE


UNMERGES: dict[str, Unmerge] = {}


def register_unmerge(
    name: str,
    *,
    cache: CacheKind = CacheKind.NONE,
    reads_merge: bool = False,
    own_past: bool = False,
    fused: bool = False,
) -> Callable[[Spread], Spread]:
    """Decorate a function to make it known by its name; see `Unmerge` for the rest."""

    def register(spread: Spread) -> Spread:
        UNMERGES[name] = Unmerge(name, spread, cache, reads_merge, own_past, fused)
        return spread

    return register


def from_past(
    own: Tensor, update: Tensor, plan: Plan, given: Given, known: Tensor | None = None
) -> Tensor:
    """Each removed token's own guess [B, N, C] where its past may be used, else its match's update.

    Args:
        known: [B, N], further tokens that must not use theirs are False.
    """
    cache, step = given.past
    if cache.complete and given.max_age is None and known is None:
        # Without a look at the tokens' ages; the guess is a copy of its own.
        scatter_rows_(own, plan.kept, update)
        return own
    usable = cache.last >= 0
    if given.max_age is not None:
        usable = usable & (cache.age(step) <= given.max_age)
    if known is not None:
        usable = usable & known
    return torch.where((usable & ~plan.is_kept())[..., None], own, plan.broadcast(update))
