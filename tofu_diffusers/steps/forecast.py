"""Forecasts what a denoiser would return at skipped steps, from what it returned before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..kernels.reference import upcast
from ..tokens.update_cache import CacheKind, UpdateCache


@dataclass
class PredictionCache:
    """The last predictions under one condition, each row of the batch as the update of one wide token.

    Args:
        cache: [B, 1, numbers of a prediction].
        shape: Of a prediction.
        kind: Class of what the denoiser returned, if it was no tuple.
    """

    cache: UpdateCache
    shape: torch.Size
    kind: type


@dataclass
class Forecaster:
    """The past of every condition of one generation; repeats it or extrapolates it linearly.

    The first order of TaylorSeer (arXiv 2503.06923), on the prediction instead of on every layer.

    The corrector looks back. At the first step that is computed after a skip, what was extrapolated can be
    interpolated; how far the latents went wrong in between is known, and that step's prediction is changed
    such that it brings them back: a predictor and a corrector, as solvers of equations have them (and FoCa,
    arXiv 2508.16211, for features inside the denoiser). The prediction that is remembered stays as it was.

    Args:
        order: 0 repeats the last prediction, 1 extrapolates the last two.
        step_sizes: Of this generation; None: nothing is corrected.
        weights: Of its skips, see `corrector_weights`.
    """

    order: int
    past: dict[str, PredictionCache] = field(default_factory=dict)
    step_sizes: list[float] | None = None
    weights: Tensor | None = None

    @property
    def kept(self) -> CacheKind:
        """What is remembered of a prediction."""
        return CacheKind.SLOPE if self.order else CacheKind.VALUE

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(past.cache.nbytes for past in self.past.values())

    def nbytes_for(self, prediction: Tensor) -> int:
        """Bytes that one more condition would take."""
        batch, numbers = prediction.shape[0], prediction[0].numel()
        return UpdateCache.nbytes_for(self.kept, batch, 1, numbers, prediction.dtype)

    def begin(self, step_sizes: list[float] | None) -> None:
        """Take note of how far the steps of a generation go, as `sampler.step_sizes` has it."""
        self.step_sizes = step_sizes
        self.weights = None if step_sizes is None else corrector_weights(step_sizes)

    def to(self, device: torch.device) -> None:
        """Where the denoiser is."""
        if self.weights is not None and self.weights.device != device:
            self.weights = self.weights.to(device)

    def record(self, condition: str, out: Any, step: Tensor, corrects: bool = True) -> Any:
        """Remember what the denoiser returned, a tuple or an output with the prediction first.

        Returns:
            What the pipeline is given.
        """
        rows = out[0].detach().flatten(1)[:, None]
        if condition not in self.past:
            batch, _, numbers = rows.shape
            cache = UpdateCache.empty(self.kept, batch, 1, numbers, rows.dtype, rows.device)
            kind = Transformer2DModelOutput if isinstance(out, tuple) else type(out)
            self.past[condition] = PredictionCache(cache, out[0].shape, kind)
        cache = self.past[condition].cache
        if not corrects or self.weights is None or cache.slope is None:
            cache.record(rows, step)
            return out
        last = cache.last.long().clamp(min=0)
        # Expanded: an index without axes would be read by the host.
        weight = self.weights[last, step.long().expand_as(last)][..., None]
        before = upcast(cache.slope) * weight
        cache.record(rows, step)
        missing = upcast(cache.slope) * weight - before
        prediction = (upcast(rows) + missing).to(rows.dtype).view(out[0].shape)
        return with_prediction(out, prediction)

    def forecast(self, condition: str, step: Tensor, return_dict: bool) -> Any:
        """What the denoiser would return at this step."""
        past = self.past[condition]
        rows = past.cache.extrapolated(step, past.cache.value.dtype)
        prediction = rows.view(past.shape)
        return past.kind(sample=prediction) if return_dict else (prediction,)


def with_prediction(out: Any, prediction: Tensor) -> Any:
    """What a denoiser returned, a tuple or an output, with another prediction."""
    return type(out)(sample=prediction) if hasattr(out, "sample") else (prediction, *out[1:])


def corrector_weights(step_sizes: list[float]) -> Tensor:
    """By what a change of slope is multiplied to correct a rest: from step i to step k that both ran.

    At step j between them p_i + (j - i) s was taken for the prediction. Interpolated it is p_i + (j - i) s'
    with the new slope s', so the latents lack the sum over j of move_j (j - i) (s' - s). Step k adds it
    with a prediction that is larger by that over move_k.

    The last step corrects nothing: it goes to latents without noise, where predictions bend too much to be
    interpolated, and under flow matching hardly anywhere.

    Returns:
        [N, N] float32, 0 where there is no step between the two.
    """
    move = torch.tensor(step_sizes, dtype=torch.float64)
    place = torch.arange(len(step_sizes), dtype=torch.float64)
    # Sums up to, not with, each step: of the moves, and of the moves times their place.
    zero = move.new_zeros(1)
    plain = torch.cat([zero, move.cumsum(0)])
    placed = torch.cat([zero, (move * place).cumsum(0)])
    missing = (placed[:-1] - placed[1:, None]) - place[:, None] * (plain[:-1] - plain[1:, None])
    weights = (missing / move).triu(2)
    weights[:, -1] = 0.0
    return weights.float()
