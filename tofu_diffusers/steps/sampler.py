"""What a scheduler's steps are: their noise levels, and how far each moves the latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NOISY = ("Ancestral", "CogVideoXDPM", "DDPM", "LCM", "SASolver", "SDE", "TCD", "UnCLIP")
"""In the names of schedulers that draw noise at every step, which drowns what was wrong before."""
MULTISTEP = ("LMSDiscrete", "PNDM")
"""In the names of schedulers whose steps build on earlier predictions, whatever their `solver_order`."""


@dataclass(frozen=True)
class Sampling:
    """The steps of a generation, as its scheduler has set them.

    Attributes:
        noise: Timesteps as fractions of the training range, 1 is pure noise.
        angles: Noise levels: the angle of noise against signal, 1 is pure noise. Other than timesteps, they
            mean the same under every schedule of noise.
        sizes: See `step_sizes`.
        first_order: Whether a step adds its own prediction and no earlier one, so that what forecasts lacked
            can be made up for. A solver of higher order takes such a prediction for a bend of the path and
            passes it on.
        kind: Of the scheduler: its class, and what its denoiser predicts, if it says so.
    """

    noise: tuple[float, ...] = ()
    angles: tuple[float, ...] = ()
    sizes: tuple[float, ...] | None = None
    first_order: bool = False
    kind: str = ""

    @classmethod
    def of(cls, scheduler: Any) -> Sampling:
        """Of the generation that a scheduler has set its timesteps for. A few host reads."""
        sizes = step_sizes(scheduler)
        noise = tuple(noise_levels(scheduler))
        name, order = type(scheduler).__name__, scheduler.config.get("solver_order", 1)
        first_order = order == 1 and not any(word in name for word in MULTISTEP)
        angles = noise_angles(scheduler, noise)
        predicts = scheduler.config.get("prediction_type")
        kind = name if predicts is None else f"{name}, {predicts}"
        return cls(noise, angles, None if sizes is None else tuple(sizes), first_order, kind)

    @classmethod
    def evenly(cls, total: int) -> Sampling:
        """Of a loop that tells no more than how many steps it has."""
        levels = tuple(1.0 - i / total for i in range(total))
        return cls(levels, levels)

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def additive_sizes(self) -> tuple[float, ...] | None:
        """The sizes, where a later step can make up for what forecasts lacked; else None."""
        return self.sizes if self.first_order else None

    def part(self, begin: int, count: int) -> Sampling:
        """These steps alone."""
        at = slice(begin, begin + count)
        sizes = self.sizes and self.sizes[at]
        return Sampling(self.noise[at], self.angles[at], sizes, self.first_order, self.kind)


def noise_angles(scheduler: Any, noise: tuple[float, ...]) -> tuple[float, ...]:
    """The angle of noise against signal at every step, as a fraction of the right angle.

    From sigmas under flow matching, from alphas where the scheduler has those, else from the timesteps.
    """
    sigmas, alphas = (getattr(scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
    if is_flow(scheduler) and sigmas is not None and len(sigmas) >= len(noise):
        pairs = [(each, 1 - each) for each in sigmas[: len(noise)].tolist()]
    elif alphas is not None and not is_flow(scheduler):
        at = scheduler.timesteps.long().clamp(0, len(alphas) - 1).to(alphas.device)
        kept = alphas[at].double().clamp(0, 1).tolist()
        pairs = [(math.sqrt(1 - each), math.sqrt(each)) for each in kept]
    else:
        pairs = [(each, 1 - each) for each in noise]
    return tuple(math.atan2(*pair) / (math.pi / 2) for pair in pairs)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler follows a flow from noise to image, with sigmas from 1 to 0."""
    named = "FlowMatch" in type(scheduler).__name__
    return named or bool(scheduler.config.get("use_flow_sigmas", False))


def noise_levels(scheduler: Any) -> list[float]:
    """Timesteps of the coming generation as fractions of the training range, 1 = pure noise.

    One host read a generation.
    """
    values = timesteps_of(scheduler)
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
    flow = is_flow(scheduler)
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
    return _level(float(value), scheduler, timesteps_of(scheduler))


def timesteps_of(scheduler: Any) -> list[float]:
    """The timesteps that a scheduler has set, in one host read."""
    timesteps = scheduler.timesteps
    return [float(each) for each in getattr(timesteps, "tolist", lambda: timesteps)()]


def _level(value: float, scheduler: Any, values: list[float]) -> float:
    most = float(getattr(scheduler.config, "num_train_timesteps", None) or 1000)
    if max(values, default=most) <= 1:  # counted from 1 down to 0, whatever the training range
        most = 1.0
    return min(1.0, max(0.0, value / most))
