"""Measures a denoiser's trajectory, by which rule "trajectory" plans the steps to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    found = schedulers(pipe)
    if not found:
        raise TypeError(f"{type(pipe).__name__} is no pipeline with a scheduler")
    models = [part for part in components(pipe).values() if isinstance(part, nn.Module)]
    if any(state_of(unwrap(each)) is not None for each in models):
        raise ValueError("the pipeline has tofu; call remove_tofu(pipe) before measuring")
    total: Tensor | None = None
    levels: tuple[float, ...] = ()
    for n, prompt in enumerate(prompts):
        with predictions_of(found[0]) as seen:
            latents(pipe, prompt, seed + n, options)
        levels, kept = descending(found[0], seen)
        if len(kept) < LEAST_STEPS:
            raise ValueError(
                f"{len(kept)} steps of descending noise were seen, and a trajectory needs {LEAST_STEPS} or "
                "more, whatever it is used for: fewer know the path too coarsely; ask for more steps, best 50"
            )
        rows = torch.stack([each.flatten() for each in kept]).double()
        products = rows @ rows.T
        total = products / products.trace() + (0 if total is None else total)
    assert total is not None
    return Trajectory.from_products(levels, total.numpy())


@contextmanager
def predictions_of(scheduler: Any) -> Iterator[list[tuple[float, Tensor]]]:
    """The timestep and the prediction of every step that a scheduler is told, on the CPU."""
    seen: list[tuple[float, Tensor]] = []
    step, own = scheduler.step, scheduler.__dict__.get("step")

    def note(prediction: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        at = float(timestep.max() if isinstance(timestep, Tensor) else timestep)
        seen.append((at, prediction.detach().float().cpu()))
        return step(prediction, timestep, *args, **kwargs)

    scheduler.step = note
    try:
        yield seen
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


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
