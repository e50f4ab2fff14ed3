"""What one call of the denoiser looks like: read inside it, also while it is traced.

Python values here choose the graph of a compiled denoiser; what changes from step to step is a tensor
(`step`) or one of few values (`skip`, and `Site.ratio`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .setup import Setup
from .sites import Site

CALLS_LIMIT = 8
CHECKPOINTING = "gradient checkpointing"


def untold(how: str) -> RuntimeError:
    """What to raise where a denoiser goes from step to step, and nobody tells them."""
    return RuntimeError(
        f"the denoiser was called {how} without a scheduler step; in a loop of your own, call "
        "handle.step(i, n) before each step, and handle.reset() before a call that is none; for a pipeline "
        "that does not step its `scheduler` (some inversions, or SkyReels' diffusion forcing, which steps "
        "copies of it: SkyReelsV2Pipeline takes the same components and steps its own), call remove_tofu "
        "before it"
    )


@dataclass(eq=False)
class Call:
    """The running call; the first group is handed over by the generation, the rest is found at its start.

    Attributes:
        step: 0-d float32, the step's index; None before the first generation.
        step_known: Whether anybody tells the step.
        skip: Whether the denoiser is skipped.
        caches_are_warm: Whether the step builds on what caches hold.
        cfg_branches: How many branches of guidance a batch holds, as a string; "0": not known yet.
        told_by_pipeline: Whether a pipeline calls, whose scheduler tells its steps.
        told_by_hand: Whether the user tells the steps and branches of guidance, in a loop of his own.
        conditional_first: Whether the conditional rows stand before the others.
        number: How many calls of this step there were, the running one among them.
        forecast: How many of them were forecast.
        cfg_branch: Which of the step's calls this is, the key of what is remembered.
        images, branches_in_batch: The batch holds so many images, each so many times.
        per_block: Whether blocks of a stack shrink one by one, because something acts between them.
        per_image: Whether reduced blocks run the images one by one.
        all_tokens: Whether all tokens are computed whatever the ratio, because something is not known yet.
        grids: The token grid of every resolution.
        starts: Where the image's tokens begin in each row [B], by resolution; see `Family.image_starts`.
        open_span: Of the span that tokens have left: all tokens, the kept ones, the plan.
        shapes: Of every branch's latents, and its numbers of tokens, to see when they change.
        beside_rested: Whether a network beside the denoiser did not run, because the step is skipped.
        began_anew: Whether a branch had no past in this step: the first one, or one whose shapes changed.
        conditions: How many calls a step has by the pipeline's guider; 0: there is none.
        inputs: By branch, arguments of the last call, on the meta device, for counted FLOPs: those that it
            ran with, and those that were given.
    """

    step: Tensor | None = None
    step_known: bool = False
    skip: bool = False
    caches_are_warm: bool = False
    cfg_branches: str = "1"
    conditional_first: bool = False
    told_by_pipeline: bool = False
    told_by_hand: bool = False
    conditions: int = 0

    number: int = 0
    forecast: int = 0
    cfg_branch: str = "0"
    images: int = 1
    branches_in_batch: int = 1
    per_block: bool = False
    per_image: bool = False
    all_tokens: bool = False
    grids: dict[int, TokenGrid] = field(default_factory=dict)
    starts: dict[int, Tensor] = field(default_factory=dict)
    open_span: tuple[Tensor, Tensor, Plan | None] | None = None
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    beside_rested: bool = False
    began_anew: bool = False
    inputs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)

    def count(self, setup: Setup) -> None:
        """Note that a call begins, the first of its step or another one.

        Raises:
            RuntimeError: if there are too many in one step, so that nobody seems to tell it.
        """
        if self.step_known and self.number >= CALLS_LIMIT and setup.reduces:
            raise untold(f"{self.number} times")
        self.cfg_branch = str(self.number)
        self.number += 1

    def know_tokens(self, tokens: int) -> None:
        """Note that so many tokens are the image's, of all that were taken for its own until now."""
        for branch, (*rest, sizes) in self.shapes.items():
            self.shapes[branch] = (*rest, tuple((tokens, total) for _, total in sizes))

    def in_use(self, site: Site) -> bool:
        """Whether the site shrinks in this call: some only where stacks are split, some only where not."""
        return site.split is None or site.split == self.per_block

    def conditional(self, x: Tensor) -> Tensor:
        """The conditional rows of a batch.  [B, ...] -> [I, ...]."""
        return x[: self.images] if self.conditional_first else x[-self.images :]
