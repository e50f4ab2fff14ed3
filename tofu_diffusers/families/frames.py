"""What families share whose blocks see the frames of a video as rows of a batch."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Family, Kwargs


class FramesFamily(Family):
    """Every frame keeps tokens of its own: for everything but the denoiser itself it is an image.

    Attention over time, between these blocks, has all tokens of all frames.
    """

    frames_dim: ClassVar[int] = 2
    """Where frames stand in latents and predictions."""

    def sample(self, named: Kwargs) -> Tensor:
        """The latents as images, one row a frame.  -> [B * F, C, H, W]."""
        return self._rows(super().sample(named))

    def prediction(self, out: Tensor, grid: TokenGrid) -> Tensor:
        return (self._rows(out) if out.ndim == 5 else out).unsqueeze(2)

    def with_prediction(self, out: Tensor, grid: TokenGrid, maps: Tensor) -> Tensor:
        rows = maps.view(out.shape[0], out.shape[self.frames_dim], -1, *out.shape[3:])
        return rows.movedim(1, self.frames_dim)

    def _rows(self, video: Tensor) -> Tensor:
        return video.movedim(self.frames_dim, 1).flatten(0, 1)
