"""What shrinks and returns as one, what sites share, and what is remembered of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..tokens.plan import Plan
from ..tokens.update_cache import UpdateCache


@dataclass(eq=False)
class PlanCache:
    """The plans that some sites share, by tokens removed (and "/" branches of guidance, for a whole batch).

    Plans without "/" are those of the images, over the grid's tokens. Those with it have a row for every
    row of the batch and also keep what stands around the grid; `removed` holds the positions [B, N - K]
    that they do not keep, where these are asked for.

    An object of its own, reached from the site: looked up by name in one dictionary, plans would make a
    compiled block depend on its name, and every block would need a graph of its own.
    """

    resolution: int
    plans: dict[str, Plan] = field(default_factory=dict)
    removed: dict[str, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget all plans."""
        self.plans.clear()
        self.removed.clear()

    def kept(self) -> list[Tensor]:
        """Kept positions [I, K] of the plans, one row an image."""
        return [plan.kept for key, plan in self.plans.items() if "/" not in key]


@dataclass(eq=False)
class Site:
    """What shrinks and returns once: an attention, a block, or a span of blocks.

    Args:
        name: Of the module, or of the span's first block and last index.
        resolution: Of the token grid.
        plan_cache: Where its plans are, shared with other sites.
        depth: Position in the denoiser, in [0, 1].
        merge, unmerge: Names, resolved for this depth.
        width: Channels of its tokens.
        split: True: used only where stacks are run block by block; False: only where not; None: always.
        ratio: This step's ratio. A string because Dynamo makes a changing number symbolic, but guards on
            a string: one graph per distinct ratio, with static shapes.
        updates: Cached updates, by branch of guidance.
    """

    name: str
    resolution: int
    plan_cache: PlanCache
    depth: float
    merge: str
    unmerge: str
    width: int
    split: bool | None = None
    ratio: str = "0.0"
    updates: dict[str, UpdateCache] = field(default_factory=dict)


@dataclass(eq=False)
class Projection:
    """A key or value projection whose rows the caches keep (keys_values "cached")."""

    name: str
    resolution: int
    width: int
    rows: dict[str, Tensor] = field(default_factory=dict)
