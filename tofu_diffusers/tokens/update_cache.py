"""What is remembered of updates from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..kernels.reference import upcast
from .gather import gather_rows, scatter_rows_


class CacheKind(Enum):
    """What an unmerge remembers of every token."""

    NONE = "none"
    VALUE = "value"
    SLOPE = "value and slope"


def clamp_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, within the dtype's range: an extrapolation of finite values may leave it. Overwrites x."""
    limit = torch.finfo(dtype).max
    return x.clamp_(-limit, limit).to(dtype)


@dataclass
class UpdateCache:
    """The last computed updates of one site in one branch of guidance; changed in place only.

    Attributes:
        value: [B, N, C], each token's last computed update (blend: its last used one).
        slope: [B, N, C], its change per step between the last two computed; None but for kind SLOPE.
        last: [B, N] float32, the step at which it was last computed; -1: never.
        complete: whether every token has a past, known without a look at `last`: a step computed all.
    """

    value: Tensor
    slope: Tensor | None
    last: Tensor
    complete: bool = False

    @classmethod
    def empty(
        cls,
        kind: CacheKind,
        batch: int,
        tokens: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> UpdateCache:
        """A cache that knows nothing yet.

        Raises:
            ValueError: if the kind is that nothing is remembered.
        """
        if kind is CacheKind.NONE:
            raise ValueError("there is no cache of kind NONE; ask for VALUE or SLOPE")
        value = torch.zeros(batch, tokens, channels, dtype=dtype, device=device)
        last = torch.full((batch, tokens), -1.0, dtype=torch.float32, device=device)
        return cls(value, torch.zeros_like(value) if kind is CacheKind.SLOPE else None, last)

    @staticmethod
    def nbytes_for(
        kind: CacheKind, batch: int, tokens: int, channels: int, dtype: torch.dtype
    ) -> int:
        """Bytes that `empty` would take; 0 where nothing is remembered."""
        if kind is CacheKind.NONE:
            return 0
        tensors = 2 if kind is CacheKind.SLOPE else 1
        return batch * tokens * (tensors * channels * dtype.itemsize + torch.float32.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        held = (self.value, self.slope, self.last)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def age(self, step: Tensor) -> Tensor:
        """Steps since each token was computed; of one that never was, more.  [B, N] float32."""
        return step.to(torch.float32) - self.last

    def extrapolated(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """Each token's last update, extrapolated where slopes are kept, else repeated.

        Args:
            step: 0-d float32 tensor.
            dtype: Of the result.

        Returns:
            [B, N, C], a copy.
        """
        if self.slope is None:
            return self.value.to(dtype, copy=True)
        age = self.age(step)[..., None]
        return clamp_cast(torch.addcmul(upcast(self.value), age, upcast(self.slope)), dtype)

    def record(self, update: Tensor, step: Tensor, kept: Tensor | None = None) -> None:
        """Store computed updates, in place.

        Args:
            update: [B, K, C], or [B, N, C] where the step computed all tokens.
            step: 0-d float32 tensor.
            kept: [B, K] int64, whose updates these are; None: every token's.
        """
        if kept is None and update.shape != self.value.shape:
            raise ValueError(
                f"an update of all tokens is {tuple(self.value.shape)}, this one is "
                f"{tuple(update.shape)}; give kept for a reduced one"
            )
        # An unreduced step is the same as keeping every token, without taking rows out and putting them back.
        since = self.last if kept is None else self.last.gather(1, kept)
        now = step.to(torch.float32).expand_as(since)
        update = update.to(self.value.dtype)
        slope = None
        if self.slope is not None:
            old = self.value if kept is None else gather_rows(self.value, kept)
            before = self.slope if kept is None else gather_rows(self.slope, kept)
            span = now - since
            change = (upcast(update) - upcast(old)).div_(span.clamp(min=1e-6)[..., None])
            # A second call within one step spans no time and says nothing of the slope.
            slope = torch.where((span > 0)[..., None], clamp_cast(change, before.dtype), before)
            slope = slope.masked_fill_((since < 0)[..., None], 0)
        if kept is None:
            self.value.copy_(update)
            self.last.copy_(now)
            if self.slope is not None and slope is not None:
                self.slope.copy_(slope)
            self.complete = True
        else:
            scatter_rows_(self.value, kept, update)
            self.last.scatter_(1, kept, now)
            if self.slope is not None and slope is not None:
                scatter_rows_(self.slope, kept, slope)
