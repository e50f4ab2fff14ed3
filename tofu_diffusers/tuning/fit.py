"""Fits what each step of a generation is made of, so that its latents stay near the unreduced ones.

A forecast that is fitted to the unreduced predictions (`steps.trajectory`) does not know that latents which
went astray change what the denoiser predicts next. Here the generation runs as it will: at each step, the sum
of the predictions computed so far is taken that brings the latents nearest to the unreduced ones, by least
squares, and the generation goes on from there. Learned solvers of diffusion's equation are fitted likewise
(S4S, arXiv 2502.17423), for steps instead of forecasts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..steps.fitted import FittedForecasts, past_of
from ..steps.outputs import tensors_in
from ..steps.sampler import Sampling
from .references import LatentsOfSteps
from .trajectory import stepping_by

RIDGE = 1e-4
"""Of the mean square of the last prediction, added to the least squares."""

BUMP = 1e-2
"""Share by which a prediction is made larger, to see how far a step moves the latents."""


class Fit:
    """The least squares of one schedule, summed over the generations seen.

    Args:
        computed: The steps that are computed, the first one among them.
        total: All steps.
    """

    def __init__(self, computed: Sequence[int], total: int) -> None:
        self.computed, self.total = tuple(computed), total
        sizes = [len(past_of(self.computed, step)) for step in range(total)]
        self._squares = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
        self._products = [torch.zeros(size, dtype=torch.float64) for size in sizes]

    def weights(self, step: int) -> Tensor:
        """Of a step, see `FittedForecasts`.  -> [K] float64."""
        squares, products = self._squares[step], self._products[step]
        if not step:
            return torch.zeros_like(products)
        # The last prediction's square is 1 in every generation; before the first one, nothing is added.
        ridge = RIDGE * squares[0, 0].clamp(min=1.0) * torch.eye(len(products))
        found: Tensor = torch.linalg.solve(squares + ridge, products)
        return found

    def forecasts(self, sampling: Sampling) -> FittedForecasts:
        """What was fitted, for generations with these steps."""
        rows = [tuple(self.weights(step).tolist()) for step in range(self.total)]
        return FittedForecasts(sampling.angles, self.computed, tuple(rows), sampling.kind)

    @contextmanager
    def watching(self, scheduler: Any, wanted: LatentsOfSteps) -> Iterator[None]:
        """Fit to a generation, which goes on with what is fitted by then.

        Args:
            scheduler: That is told its steps. It must be given the last computed prediction at skipped steps.
            wanted: The unreduced latents behind every step.
        """
        before = scheduler.step
        past: list[Tensor] = []
        index = 0

        def step(
            prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            nonlocal index
            if index in self.computed:
                past.insert(0, prediction)
            known = past[: len(past_of(self.computed, index))]
            basis = torch.stack([known[0], *(each - known[0] for each in known[1:])]).double()

            def after(given: Tensor) -> Tensor:
                return _tried(scheduler, given, timestep, sample, args, kwargs)

            self._add(index, basis, missing(after, known[0], wanted[index]))
            weights = self.weights(index).to(basis.device)
            sum_ = torch.einsum("k,k...->...", weights, basis)
            index += 1
            return before(
                (known[0].double() + sum_).to(prediction.dtype), timestep, sample, *args, **kwargs
            )

        with stepping_by(scheduler, step):
            yield

    def _add(self, step: int, basis: Tensor, missing: Tensor) -> None:
        rows = basis.flatten(1)
        # Each generation counts alike, however large its numbers.
        scale = rows[0].square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        self._squares[step] += (rows @ rows.T / scale).cpu()
        self._products[step] += (rows @ missing.flatten().double() / scale).cpu()


def missing(after: Callable[[Tensor], Tensor], prediction: Tensor, wanted: Tensor) -> Tensor:
    """What a prediction lacks for the latents behind its step to be as wanted.

    Args:
        after: Gives the latents behind the step for a prediction: the more of it, the further, in proportion.
        prediction: That is known.
        wanted: Latents, on the CPU.
    """
    base = after(prediction).double()
    bump = BUMP * prediction.double()
    moved = after((prediction.double() + bump).to(prediction.dtype)).double() - base
    move = (moved * bump).sum() / bump.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (wanted.to(base.device).double() - base) / move


def _tried(
    scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor, args: Any, kwargs: Any
) -> Tensor:
    """The latents behind a step of a sampler, which does not notice."""
    twin = copy.copy(scheduler)
    # Solvers of higher order keep their past in lists, which are changed in place.
    vars(twin).update(
        {name: list(each) for name, each in vars(scheduler).items() if isinstance(each, list)}
    )
    vars(twin).pop("step", None)
    return tensors_in(twin.step(prediction, timestep, sample, *args, **kwargs))[0]
