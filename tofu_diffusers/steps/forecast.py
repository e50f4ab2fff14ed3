"""Forecasts what a denoiser would return at skipped steps, from what it returned before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.reference import upcast
from ..tokens.update_cache import clamp_cast
from .fitted import POINTS, FittedForecasts
from .outputs import form_of, tensors_in, with_tensors
from .trajectory import CORRECTED_SHARE, reach_of


@dataclass
class PredictionCache:
    """The last predictions in one branch of guidance.

    Attributes:
        values: [K, numbers] for each tensor of an output, the last one first.
        last: [1] float32, the step at which that was computed.
        form: The last output, without its tensors' numbers.
    """

    values: list[Tensor]
    last: Tensor
    form: Any

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.numel() * each.element_size() for each in (*self.values, self.last))


@dataclass
class Forecaster:
    """The past of every branch of guidance of one generation, and what is made of it.

    TaylorSeer (arXiv 2503.06923) extrapolates every layer; here it is the prediction alone, on a straight
    line as its first order. How far the last change is carried on is fitted to the denoiser's trajectory
    where one is known: a straight line goes astray on paths that bend.

    The corrector looks back. At the first step that is computed after a skip, what was extrapolated can be
    interpolated; how far the latents went wrong in between is known, and that step's prediction is changed
    such that it brings them back: a predictor and a corrector, as solvers of equations have them (and FoCa,
    arXiv 2508.16211, for features inside the denoiser). The prediction that is remembered stays as it was.

    Attributes:
        past: By branch of guidance.
        weights: [N, N, K] float32, see `forecast_weights`.
        corrections: [N, N, K + 1] float32, see `corrector_weights`; None: nothing is corrected.
    """

    past: dict[str, PredictionCache] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1))
    corrections: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(past.nbytes for past in self.past.values())

    def nbytes_for(self, out: Any) -> int:
        """Bytes that one more branch would take, with such outputs."""
        points = self.weights.shape[-1]
        size = sum(each.numel() * each.element_size() for each in tensors_in(out))
        return points * size + torch.float32.itemsize

    def begin(self, weights: NDArray[np.float64], corrections: NDArray[np.float64] | None) -> None:
        """Take note of a generation's forecasts and corrections."""
        self.weights = torch.from_numpy(weights).float()
        self.corrections = None if corrections is None else torch.from_numpy(corrections).float()

    def to(self, device: torch.device) -> None:
        """Where the denoiser is."""
        if self.weights.device != device:
            self.weights = self.weights.to(device)
        if self.corrections is not None and self.corrections.device != device:
            self.corrections = self.corrections.to(device)

    def keep_last(self, branch: str, out: Any) -> None:
        """Of what is remembered [B, S, ...] keep the last rows, if an output has fewer, [B, N, ...]."""
        past, tensors = self.past.get(branch), tensors_in(out)
        if past is None:
            return
        old = [each.shape for each in tensors_in(past.form)]
        if all(ours[1] <= its.shape[1] for ours, its in zip(old, tensors, strict=True)):
            return
        past.values = [
            values.view(-1, *ours)[:, :, -its.shape[1] :].flatten(1)
            for values, ours, its in zip(past.values, old, tensors, strict=True)
        ]
        past.form = form_of(out)

    def record(self, branch: str, out: Any, step: Tensor) -> Any:
        """Remember what the denoiser returned.

        Returns:
            What the pipeline is given.

        Raises:
            TypeError: if there is no tensor in it.
        """
        tensors = tensors_in(out)
        past = self.past.get(branch)
        if past is None or [each.shape for each in tensors_in(past.form)] != [
            each.shape for each in tensors
        ]:
            if not tensors:
                raise TypeError(
                    f"the denoiser returned {type(out).__name__} without a tensor of floats, and so nothing "
                    "that can be forecast; call remove_tofu"
                )
            # As if it had always been so: before there are as many, nothing is made of the others.
            points = self.weights.shape[-1]
            first = [each.detach().reshape(1, -1).repeat(points, 1) for each in tensors]
            # A copy: the step that is handed over is counted on in place.
            last = step.to(torch.float32, copy=True).reshape(1)
            self.past[branch] = PredictionCache(first, last, form_of(out))
            return out
        taken = None if self.corrections is None else at(self.corrections, past.last, step)
        corrected = []
        for values, tensor in zip(past.values, tensors, strict=True):
            row = tensor.reshape(1, -1)
            if taken is not None:
                known = upcast(row[0]) + combined(torch.cat([row, values]), taken)
                corrected.append(known.to(row.dtype).view(tensor.shape))
            # A second call within one step takes the place of the first.
            older = torch.where(step > past.last, values[:-1], values[1:])
            values.copy_(torch.cat([row.detach().to(values.dtype), older]))
        past.last.copy_(step.float().reshape(1))
        return out if taken is None else with_tensors(out, corrected)

    def forecast(self, branch: str, step: Tensor, return_dict: bool | None = None) -> Any:
        """What the denoiser would return at this step.

        Args:
            return_dict: Whether it is asked for an output of fields, or for a tuple of them; None: it has one
                form, or the last one will do.
        """
        past = self.past[branch]
        weights = at(self.weights, past.last, step)
        tensors = [
            clamp_cast(upcast(values[0]) + combined(values, weights), values.dtype).view(each.shape)
            for values, each in zip(past.values, tensors_in(past.form), strict=True)
        ]
        out = with_tensors(past.form, tensors)
        if is_dataclass(out) and return_dict is False:
            parts = (getattr(out, each.name) for each in fields(out))
            return tuple(part for part in parts if part is not None)
        if type(out) is tuple and len(out) == 1 and return_dict:
            # Asked for fields here, and for a tuple when it last ran.
            return Transformer2DModelOutput(*out)
        return out


def combined(values: Tensor, weights: Tensor) -> Tensor:
    """w_0 p_0 + w_1 (p_1 - p_0) + ... of predictions [K, numbers].  -> [numbers]."""
    first = upcast(values[0])
    total = weights[0] * first
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * (upcast(value) - first)
    return total


def at(table: Tensor, last: Tensor, step: Tensor) -> Tensor:
    """The entry of a table [N, N, K] for what was computed last, and a step.  [K]."""
    # As tensors with an axis: an index without would be read by the host.
    return table[last.long().clamp(min=0), step.long().reshape(1)][0]


def forecast_weights(
    total: int, computed: Sequence[int], order: int, products: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """How forecasts are made of the last computed predictions.

    Of p_0, and p_1 before it, they are p_0 + w_0 p_0 + w_1 (p_1 - p_0). Behind a step that was not to be
    computed, p_0 is repeated.

    Args:
        total: N, steps of the generation.
        computed: Those that are computed.
        order: 0 repeats the last prediction, 1 carries on the last change.
        products: [N, N], inner products of the unreduced predictions, which say how far, see
            `trajectory.reach_of`; None: on a straight line.

    Returns:
        [N, N, order + 1], for every step computed last, and every step forecast.
    """
    table = np.zeros((total, total, order + 1))
    for before, last in pairwise(computed) if order else ():
        ahead = np.arange(last + 1, total)
        reach = ahead - last if products is None else reach_of(products, before, last, ahead)
        table[last, last + 1 :, 1] = -reach / (last - before)
    return table


def fitted_weights(
    fitted: FittedForecasts,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same of fitted forecasts, and what computed steps are corrected by, see `corrector_weights`."""
    total = len(fitted.levels)
    weights, corrections = np.zeros((total, total, POINTS)), np.zeros((total, total, POINTS + 1))
    for step, row in enumerate(fitted.weights):
        last = fitted.past(step)[0]
        if last == step:
            earlier = fitted.past(step)[1:2]
            # The first one is as it was computed: nothing is known yet.
            if earlier:
                corrections[earlier[0], step, : len(row)] = row
        else:
            weights[last, step, : len(row)] = row
    return weights, corrections


def corrector_weights(
    step_sizes: Sequence[float], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights of the predictions, to correct a skip interval from step i to step k that both ran.

    At step j between them f_ij was taken for the prediction. Interpolated it is p_i + (j - i) / (k - i)
    (p_k - p_i), so the latents lack the sum over j of move_j times the difference. Step k adds half of it,
    with a prediction that is larger by that over move_k.

    The last step corrects nothing: it goes to latents without noise, where predictions bend too much to be
    interpolated, and under flow matching hardly anywhere.

    Args:
        step_sizes: N.
        weights: [N, N, K], of the forecasts.

    Returns:
        [N, N, K + 1]: to p_k are added c_0 p_k, c_1 (p_i - p_k) and so on to the last remembered; 0 where
        there is no step between the two.
    """
    move = np.asarray(step_sizes)
    place = np.arange(len(move))
    distance = np.maximum(place - place[:, None], 0)
    # Of p_i, of p_1 - p_i and so on, and of p_k - p_i.
    line = distance[..., None] * move[:, None]
    terms = np.concatenate([-weights * move[:, None], line], axis=2) * (distance > 0)[..., None]
    # Sums over the steps behind i and before k.
    before_k = np.cumsum(terms, axis=1) - terms
    before_k[..., -1] /= np.maximum(distance, 1)
    own, older, new = before_k[..., :1], before_k[..., 1:-1], before_k[..., -1:]
    last = own - older.sum(axis=-1, keepdims=True) - new
    found = np.concatenate([own, last, older], axis=2) * (CORRECTED_SHARE / move[:, None])
    found[distance < 2] = 0.0
    found[:, -1] = 0.0
    return found
