"""Measures a denoiser's trajectory, by which rule "trajectory" plans the steps to compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.patch import state_of
from ..steps.pipelines import components, schedulers, unwrap
from ..steps.sampler import Sampling, timesteps_of
from ..steps.trajectory import Trajectory
from .calibrate import as_prompts, latents

LEAST_STEPS = 10
"""Of a measurement. Planned by one of three steps, 12 steps of a pipeline drifted more than by any rule."""


def measure_trajectory(
    pipe: Any, prompts: str | Sequence[Any], *, seed: int = 0, **options: Any
) -> Trajectory:
    """Measure how a pipeline's predictions change along generations of its own.

    Every prompt is generated once, without tofu, and not decoded. What the scheduler is given at each step is
    kept on the CPU until the generation is over. One trajectory serves any number of steps and any speed-up;
    measured with 50 steps it is known finely enough for all.

    Example:
        >>> trajectory = measure_trajectory(pipe, ["a cat", "a red apple"], num_inference_steps=50)
        >>> apply_tofu(pipe, StepSkipping(speedup=3.0, rule="trajectory", trajectory=trajectory))

    Args:
        pipe: A pipeline without tofu, whose scheduler is told its steps.
        prompts: One or more (four are plenty), each what the pipeline takes as its first argument.
        seed: Of the images; the n-th prompt has seed + n.
        options: Further arguments of the pipeline, as it will be called: guidance, size, number of steps.

    Raises:
        TypeError: if `pipe` is no pipeline with a scheduler.
        ValueError: if there is no prompt, the pipeline has tofu, or fewer than ten steps were seen.
    """
    prompts = as_prompts(prompts)
    if not prompts:
        raise ValueError("no prompts to measure a trajectory from; give at least one")
    scheduler = scheduler_without_tofu(pipe)
    paths = []
    for n, prompt in enumerate(prompts):
        _, path = followed(scheduler, partial(latents, pipe, prompt, seed + n, options))
        path.check()
        paths.append(path)
    return mean_trajectory(paths)


def scheduler_without_tofu(pipe: Any) -> Any:
    """The scheduler of a pipeline that has no tofu.

    Raises:
        TypeError: if `pipe` is no pipeline with a scheduler.
        ValueError: if it has tofu.
    """
    found = schedulers(pipe)
    if not found:
        raise TypeError(f"{type(pipe).__name__} is no pipeline with a scheduler")
    models = [part for part in components(pipe).values() if isinstance(part, nn.Module)]
    if any(state_of(unwrap(each)) is not None for each in models):
        raise ValueError("the pipeline has tofu; call remove_tofu(pipe) before measuring")
    return found[0]


@dataclass(frozen=True)
class PredictionPath:
    """What is kept of one generation's predictions.

    Attributes:
        levels: Noise levels of the steps.
        products: [L, L] float64, their inner products over the sum of their squares.
    """

    levels: tuple[float, ...]
    products: Tensor

    def check(self) -> None:
        """Raise ValueError if there are fewer than ten steps."""
        if len(self.levels) < LEAST_STEPS:
            raise ValueError(
                f"{len(self.levels)} steps of descending noise were seen, and a trajectory needs "
                f"{LEAST_STEPS} or more, whatever it is used for: fewer know the path too coarsely; ask for "
                "more steps, best 50"
            )


def followed(scheduler: Any, generate: Callable[[], Any]) -> tuple[Any, PredictionPath]:
    """Run a generation; what it returns, and the path of what its scheduler is given."""
    seen: list[tuple[float, Tensor]] = []

    def note(prediction: Tensor, timestep: Any, after: Any) -> None:
        at = float(timestep.max() if isinstance(timestep, Tensor) else timestep)
        seen.append((at, prediction.detach().float().cpu()))

    with told_of_steps(scheduler, note):
        made = generate()
    levels, kept = descending(scheduler, seen)
    if not kept:
        return made, PredictionPath((), torch.zeros(0, 0, dtype=torch.float64))
    rows = torch.stack([each.flatten() for each in kept]).double()
    products = rows @ rows.T
    # So that each generation counts alike, however large its numbers.
    return made, PredictionPath(levels, products / products.trace())


def mean_trajectory(paths: Sequence[PredictionPath]) -> Trajectory:
    """The mean of generations with the same steps; raises ValueError as `PredictionPath.check`."""
    paths[0].check()
    total = torch.stack([each.products for each in paths]).mean(dim=0)
    return Trajectory.from_products(paths[0].levels, total.numpy())


@contextmanager
def told_of_steps(scheduler: Any, note: Callable[[Tensor, Any, Any], None]) -> Iterator[None]:
    """Call `note` at every step of a scheduler: with the prediction, the timestep, and what it returned."""
    step = scheduler.step

    def noted(prediction: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        after = step(prediction, timestep, *args, **kwargs)
        note(prediction, timestep, after)
        return after

    with stepping_by(scheduler, noted):
        yield


@contextmanager
def stepping_by(scheduler: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand in for a scheduler's `step`, whose arguments it takes."""
    own = scheduler.__dict__.get("step")
    scheduler.step = _StandIn(scheduler, step)
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


class _StandIn:
    """A function in the place of a scheduler's `step`; a copy of the scheduler steps as it did before."""

    def __init__(self, scheduler: Any, step: Callable[..., Any]) -> None:
        self._scheduler, self._step = scheduler, step
        # Pipelines read from its arguments what they may give it, such as a generator.
        self.__wrapped__ = scheduler.step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Pipelines of video and sound copy their scheduler; the copy would step the original.
        twin = memo.get(id(self._scheduler))
        if twin is None:
            return self  # of the scheduler's attributes alone, to be put back later (Panorama)
        return copy.deepcopy(self.__wrapped__, memo)


def descending(
    scheduler: Any, seen: list[tuple[float, Tensor]]
) -> tuple[tuple[float, ...], list[Tensor]]:
    """The noise levels and predictions of steps that are less noisy than all before them.

    A sampler of two calls a step is at most levels twice.
    """
    sampling = Sampling.of(scheduler)
    places = timesteps_of(scheduler)
    levels: list[float] = []
    kept: list[Tensor] = []
    for timestep, prediction in seen:
        nearest = min(range(len(places)), key=lambda i: abs(places[i] - timestep))
        angle = sampling.angles[nearest]
        if not levels or angle < levels[-1]:
            levels.append(angle)
            kept.append(prediction)
    return tuple(levels), kept
