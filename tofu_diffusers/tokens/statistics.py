"""What the last steps tell about each token: when it was computed, and how its prediction changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import TokenGrid


class TokenStatistics:
    """Ages and importance of the tokens of one batch of images, changed in place.

    Predictions are compared at the resolution of the latents and pooled to each resolution's grid.

    Args:
        sources: Of "change" (norm of the difference of a token's last two computed predictions, per step of
            age) and "cfg" (norm of the difference of conditional and unconditional prediction of the last
            step, as IBTM, ICCV 2025) those to track; for others there are ages only.
        images: Rows that stand for one image each.
        grids: The token grid of every resolution, as predictions have it.
        device: Of the latents.
    """

    def __init__(
        self,
        sources: Collection[str],
        images: int,
        grids: Mapping[int, TokenGrid],
        device: torch.device,
    ) -> None:
        self.grids = dict(grids)
        # Resolutions are numbered from the finest.
        self.finest = min(grids)
        self.last = {
            resolution: torch.zeros(images, grid.tokens, device=device)
            for resolution, grid in grids.items()
        }
        self.prediction: Tensor | None = None
        self.first: Tensor | None = None
        self.guided = False
        finest = grids[self.finest].tokens
        tracked: tuple[str, ...] = ("change", "cfg")
        self.scores = {
            source: torch.zeros(images, finest, device=device)
            for source in tracked
            if source in sources
        }

    @property
    def sides(self) -> dict[int, tuple[int, int, int]]:
        """The sides of every resolution's grid, whatever stands around it."""
        return {resolution: grid.sides for resolution, grid in self.grids.items()}

    def halve(self, conditional_first: bool) -> None:
        """Take what seemed 2 I images for the two guidance branches of I, after unreduced steps."""

        def conditional(x: Tensor) -> Tensor:
            first, second = x.chunk(2)
            return (first if conditional_first else second).clone()

        self.last = {resolution: conditional(last) for resolution, last in self.last.items()}
        self.scores = {source: conditional(score) for source, score in self.scores.items()}
        if self.prediction is not None:
            self.prediction = conditional(self.prediction)
        if self.first is not None:
            self._note_guidance(*self.first.chunk(2))
            self.first = conditional(self.first)

    def keep_tokens(self, start: int, tokens: int) -> None:
        """Of predictions that are rows of tokens: only so many from this one on are the image's."""

        def own(x: Tensor) -> Tensor:
            return x[..., start : start + tokens].clone()

        self.grids = {
            resolution: replace(grid, width=tokens) for resolution, grid in self.grids.items()
        }
        self.last = {resolution: own(last) for resolution, last in self.last.items()}
        self.scores = {source: own(score) for source, score in self.scores.items()}
        self.prediction = None if self.prediction is None else own(self.prediction)
        self.first = None if self.first is None else own(self.first)

    def age(self, resolution: int, step: Tensor) -> Tensor:
        """Steps since each token of the resolution was computed.  -> [I, N] float32."""
        return step - self.last[resolution]

    def importance(self, resolution: int) -> dict[str, Tensor]:
        """The scores pooled to the resolution's grid.  -> source -> [I, N] float32."""
        sides, grid = self.grids[self.finest].sides, self.grids[resolution]
        return {
            source: _pool(score.view(-1, 1, *sides), grid) for source, score in self.scores.items()
        }

    def note(
        self,
        prediction: Tensor,
        other: Tensor | None,
        kept: Mapping[int, Sequence[Tensor]],
        step: Tensor,
    ) -> None:
        """The step's first call is done.

        Args:
            prediction: [I, C, F, H, W], the denoiser's, conditional rows only.
            other: The unconditional ones, if they were in the same call.
            kept: By resolution, the kept positions [I, K] of every plan used; none: all tokens ran.
            step: 0-d float32.
        """
        if "change" in self.scores:
            self._note_change(prediction, kept[self.finest], step)
        if "cfg" in self.scores:
            self.first = prediction
            if other is not None:
                self._note_guidance(prediction, other)
        for resolution, positions in kept.items():
            last = self.last[resolution]
            if not positions:
                last.copy_(step.expand_as(last))
            for rows in positions:
                last.scatter_(1, rows, step.expand(rows.shape))

    def note_second(self, prediction: Tensor) -> None:
        """The step's second call is done: with guidance in two calls, the other branch."""
        if (
            "cfg" in self.scores
            and self.first is not None
            and prediction.shape[0] == self.first.shape[0]
        ):
            self._note_guidance(self.first, prediction)

    def _note_change(self, prediction: Tensor, kept: Sequence[Tensor], step: Tensor) -> None:
        grid = self.grids[self.finest]
        score = self.scores["change"]
        computed = flags_of(kept, score)
        if self.prediction is None:
            self.prediction = torch.zeros_like(prediction)
        squares = (prediction.float() - self.prediction.float()).square().sum(1, keepdim=True)
        change = _pool(squares, grid).sqrt() / self.age(self.finest, step).clamp(min=1.0)
        score.copy_(torch.where(computed, change, score))
        # Each token is compared with what it was when it was last computed, not with its stale self.
        mask = on_maps(computed, grid, prediction)
        self.prediction.copy_(torch.where(mask, prediction, self.prediction))

    def _note_guidance(self, conditional: Tensor, unconditional: Tensor) -> None:
        self.guided = True
        squares = (conditional.float() - unconditional.float()).square().sum(1, keepdim=True)
        self.scores["cfg"].copy_(_pool(squares, self.grids[self.finest]).sqrt())


def flags_of(kept: Sequence[Tensor], like: Tensor) -> Tensor:
    """The tokens that any of these plans [I, K] keeps; none: all of them.  -> [I, N] bool, as `like`."""
    flags = torch.full_like(like, not kept, dtype=torch.bool)
    for rows in kept:
        flags = flags.scatter(1, rows, True)
    return flags


def on_maps(flags: Tensor, grid: TokenGrid, maps: Tensor) -> Tensor:
    """Where flagged tokens stand on maps [B, C, F, H, W].  [I, N] bool -> [I, 1, F, H, W] bool."""
    volume = flags.float().view(-1, 1, *grid.sides)
    return F.interpolate(volume, size=maps.shape[2:], mode="nearest").bool()


def _pool(volume: Tensor, grid: TokenGrid) -> Tensor:
    """Average onto a grid.  [B, 1, F, H, W] -> [B, N]."""
    pooled: Tensor = F.adaptive_avg_pool3d(volume, (grid.frames, grid.height, grid.width))
    return pooled.flatten(1)
