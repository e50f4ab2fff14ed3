"""What a scheduler's steps are: their noise levels, and how far each moves the latents."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

NOISY = ("Ancestral", "CogVideoXDPM", "DDPM", "LCM", "SASolver", "SDE", "TCD", "UnCLIP")
"""In the names of schedulers that draw noise at every step, which drowns what was wrong before."""


def noise_levels(scheduler: Any) -> list[float]:
    """Timesteps of the coming generation as fractions of the training range, 1 = pure noise.

    One host read a generation.
    """
    values = _values(scheduler)
    return [_level(value, scheduler, values) for value in values]


def step_sizes(scheduler: Any) -> list[float] | None:
    """How far each step of the coming generation moves the latents along the prediction, up to a factor.

    To first order a step adds the prediction times a difference: of sigma under flow matching, of
    sigma / alpha where noise is predicted, of the angle atan(sigma / alpha) where velocity is. One host
    read a generation.

    Returns:
        One number a timestep, all above 0; None where a step is not of this kind: several calls a step,
        noise drawn anew, another thing predicted.
    """
    config, count = scheduler.config, len(scheduler.timesteps)
    sigmas, alphas = (getattr(scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) > 1:
        return None
    noisy = any(word in name for word in NOISY) or config.get("stochastic_sampling", False)
    if noisy or str(config.get("algorithm_type", "")).startswith("sde"):
        return None
    flow = "FlowMatch" in name or config.get("use_flow_sigmas", False)
    kind = "flow_prediction" if flow else config.get("prediction_type")
    if kind not in ("flow_prediction", "epsilon", "v_prediction") or (alphas is None and not flow):
        return None
    if sigmas is not None and len(sigmas) == count + 1:
        levels = sigmas.tolist()
    elif alphas is not None:
        kept = alphas[scheduler.timesteps.long().to(alphas.device)].double()
        levels = [*((1 - kept) / kept).sqrt().tolist(), 0.0]
    else:
        return None
    if kind == "v_prediction":
        levels = [math.atan(level) for level in levels]
    found = [before - after for before, after in pairwise(levels)]
    return found if all(move > 0 for move in found) else None


def noise_level(scheduler: Any, timestep: Any) -> float:
    """A timestep as a fraction of the training range; of several, the noisiest token's. Two host reads."""
    value = timestep.max().item() if hasattr(timestep, "max") else timestep
    return _level(float(value), scheduler, _values(scheduler))


def _values(scheduler: Any) -> list[float]:
    timesteps = scheduler.timesteps
    return [float(each) for each in getattr(timesteps, "tolist", lambda: timesteps)()]


def _level(value: float, scheduler: Any, values: list[float]) -> float:
    most = float(getattr(scheduler.config, "num_train_timesteps", None) or 1000)
    if max(values, default=most) <= 1:  # counted from 1 down to 0, whatever the training range
        most = 1.0
    return min(1.0, max(0.0, value / most))
