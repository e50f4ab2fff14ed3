"""Forecasts what a denoiser would return at skipped steps, from what it returned before."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..kernels.reference import upcast
from ..tokens.update_cache import CacheKind, UpdateCache
from .outputs import form_of, tensors_in, with_tensors
from .trajectory import CORRECTED


@dataclass
class PredictionCache:
    """The last predictions in one branch of guidance.

    Args:
        caches: One for each tensor of an output, which is the update of a single wide token: [1, 1, numbers].
        form: The last output, without its tensors' numbers.
    """

    caches: list[UpdateCache]
    form: Any


@dataclass
class Forecaster:
    """The past of every branch of guidance of one generation; repeats it or extrapolates it.

    The first order of TaylorSeer (arXiv 2503.06923), on the prediction instead of on every layer. How far the
    last change is carried on is fitted to the denoiser's trajectory where one is known: a straight line goes
    astray on paths that bend.

    The corrector looks back. At the first step that is computed after a skip, what was extrapolated can be
    interpolated; how far the latents went wrong in between is known, and that step's prediction is changed
    such that it brings them back: a predictor and a corrector, as solvers of equations have them (and FoCa,
    arXiv 2508.16211, for features inside the denoiser). The prediction that is remembered stays as it was.

    Args:
        order: 0 repeats the last prediction, 1 extrapolates the last two.
        step_sizes: Of this generation; None: nothing is corrected.
        reach: [N, N] float32, of how many steps the last change is added at step j when step i was computed
            last: entry [i, j]. None: of j - i, a straight line.
        weights: Of its skips, see `corrector_weights`.
    """

    order: int
    past: dict[str, PredictionCache] = field(default_factory=dict)
    step_sizes: list[float] | None = None
    reach: Tensor | None = None
    weights: Tensor | None = None

    @property
    def kept(self) -> CacheKind:
        """What is remembered of a prediction."""
        return CacheKind.SLOPE if self.order else CacheKind.VALUE

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(cache.nbytes for past in self.past.values() for cache in past.caches)

    def nbytes_for(self, out: Any) -> int:
        """Bytes that one more branch would take, with such outputs."""
        numbers = [(each.numel(), each.dtype) for each in tensors_in(out)]
        return sum(UpdateCache.nbytes_for(self.kept, 1, 1, *each) for each in numbers)

    def begin(self, step_sizes: list[float] | None, reach: Tensor | None = None) -> None:
        """Take note of how far the steps of a generation go, see `sampler.step_sizes`, and the forecasts."""
        self.step_sizes, self.reach = step_sizes, reach
        self.weights = None if step_sizes is None else corrector_weights(step_sizes, reach)

    def to(self, device: torch.device) -> None:
        """Where the denoiser is."""
        if self.weights is not None and self.weights.device != device:
            self.weights = self.weights.to(device)
        if self.reach is not None and self.reach.device != device:
            self.reach = self.reach.to(device)

    def record(self, branch: str, out: Any, step: Tensor) -> Any:
        """Remember what the denoiser returned.

        Returns:
            What the pipeline is given.

        Raises:
            TypeError: if there is no tensor in it.
        """
        tensors = tensors_in(out)
        known = self.past.get(branch)
        if known is None or [each.shape for each in tensors_in(known.form)] != [
            each.shape for each in tensors
        ]:
            if not tensors:
                raise TypeError(
                    f"the denoiser returned {type(out).__name__} without a tensor of floats, and so nothing "
                    "that can be forecast; call remove_tofu"
                )
            caches = [
                UpdateCache.empty(self.kept, 1, 1, each.numel(), each.dtype, each.device)
                for each in tensors
            ]
            self.past[branch] = PredictionCache(caches, form_of(out))
        weights = self.weights if self.order else None
        corrected = []
        for cache, tensor in zip(self.past[branch].caches, tensors, strict=True):
            row = tensor.detach().reshape(1, 1, -1)
            if weights is None or cache.slope is None:
                cache.record(row, step)
                continue
            taken, wanted = at(weights, cache.last, step)
            before = upcast(cache.slope) * taken
            cache.record(row, step)
            missing = upcast(cache.slope) * wanted - before
            corrected.append((upcast(row) + missing).to(row.dtype).view(tensor.shape))
        return out if weights is None else with_tensors(out, corrected)

    def forecast(self, branch: str, step: Tensor, return_dict: bool | None = None) -> Any:
        """What the denoiser would return at this step.

        Args:
            return_dict: Whether it is asked for an output of fields, or for a tuple of them; None: it has one
                form, or the last one will do.
        """
        past = self.past[branch]
        tensors = [
            cache.extrapolated(
                step,
                cache.value.dtype,
                None if self.reach is None else at(self.reach, cache.last, step),
            ).view(each.shape)
            for cache, each in zip(past.caches, tensors_in(past.form), strict=True)
        ]
        out = with_tensors(past.form, tensors)
        if is_dataclass(out) and return_dict is False:
            parts = (getattr(out, each.name) for each in fields(out))
            return tuple(part for part in parts if part is not None)
        if type(out) is tuple and len(out) == 1 and return_dict:
            # Asked for fields here, and for a tuple when it last ran.
            return Transformer2DModelOutput(*out)
        return out


def at(table: Tensor, last: Tensor, step: Tensor) -> Tensor:
    """Entries of a table [..., N, N] for what was computed last, and a step.  [..., 1, 1, 1]."""
    last = last.long().clamp(min=0)
    # Expanded: an index without axes would be read by the host.
    return table[..., last, step.long().expand_as(last)][..., None]


def corrector_weights(step_sizes: list[float], reach: Tensor | None = None) -> Tensor:
    """Weights of the slopes, to correct a skip interval from step i to step k that both ran.

    At step j between them p_i + reach_ij s was taken for the prediction. Interpolated it is p_i + (j - i) s'
    with the new slope s', so the latents lack the sum over j of move_j ((j - i) s' - reach_ij s). Step k adds
    half of it, with a prediction that is larger by that over move_k.

    The last step corrects nothing: it goes to latents without noise, where predictions bend too much to be
    interpolated, and under flow matching hardly anywhere.

    Args:
        step_sizes: N.
        reach: See `Forecaster`.

    Returns:
        [2, N, N] float32, of s and of s'; 0 where there is no step between the two.
    """
    move = torch.tensor(step_sizes, dtype=torch.float64)
    place = torch.arange(len(step_sizes), dtype=torch.float64)
    line = (place - place[:, None]).clamp(min=0)
    taken = line if reach is None else reach.double()
    # Sums over the steps behind i and before k.
    moved = torch.stack([taken, line]) * move
    before_k = moved.triu(1).cumsum(-1) - moved.triu(1)
    weights = (CORRECTED * before_k / move).triu(2)
    weights[..., -1] = 0.0
    return weights.float()
