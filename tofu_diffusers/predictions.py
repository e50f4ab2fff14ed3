"""What a denoiser predicted at the steps before, for the steps at which it does not run (scope "step")."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .restore import UpdateCache, own_update


@dataclass
class Past:
    """The last predictions under one condition, each row of the batch as the update of one wide token.

    Args:
        cache: [B, 1, numbers of a prediction].
        shape: Of a prediction.
        kind: Class of what the denoiser returned.
    """

    cache: UpdateCache
    shape: torch.Size
    kind: type


@dataclass
class Predictions:
    """The past of every condition of one generation; repeats it or extrapolates it linearly.

    The first order of TaylorSeer (arXiv 2503.06923), on the prediction instead of on every layer.

    Args:
        restore: "temporal" (repeat the last) or "taylor" (extrapolate the last two).
    """

    restore: str
    past: dict[str, Past] = field(default_factory=dict)

    @property
    def needed(self) -> int:
        """Steps that must run before one can be left out."""
        return 2 if self.restore == "taylor" else 1

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(past.cache.nbytes for past in self.past.values())

    def nbytes_for(self, prediction: Tensor) -> int:
        """Bytes that one more condition would take."""
        batch, numbers = prediction.shape[0], prediction[0].numel()
        return UpdateCache.nbytes_for(self.restore, batch, 1, numbers, prediction.dtype)

    def record(self, condition: str, out: Any, step: Tensor) -> None:
        """Remember what the denoiser returned, a tuple or an output with the prediction first."""
        rows = out[0].detach().flatten(1)[:, None]
        if condition not in self.past:
            batch, _, numbers = rows.shape
            cache = UpdateCache.empty(self.restore, batch, 1, numbers, rows.dtype, rows.device)
            self.past[condition] = Past(cache, out[0].shape, type(out))
        self.past[condition].cache.record(rows, step)

    def restored(self, condition: str, step: Tensor, return_dict: bool) -> Any:
        """What the denoiser would return at this step."""
        past = self.past[condition]
        rows = own_update(self.restore, past.cache, step, past.cache.value.dtype)
        prediction = rows.view(past.shape)
        return past.kind(sample=prediction) if return_dict else (prediction,)
