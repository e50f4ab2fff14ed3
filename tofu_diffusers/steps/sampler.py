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
        timesteps: As the scheduler has set them.
        noise: Timesteps as fractions of the training range, 1 is pure noise; angles, where timesteps are
            something else.
        angles: Noise levels: the angle of noise against signal, 1 is pure noise. Other than timesteps, they
            mean the same under every schedule of noise.
        sizes: See `step_sizes`.
        first_order: Whether a step adds its own prediction and no earlier one, so that what forecasts lacked
            can be made up for. A solver of higher order takes such a prediction for a bend of the path and
            passes it on.
        kind: Of the scheduler: its class, and what its denoiser predicts, if it says so.
    """

    timesteps: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    angles: tuple[float, ...] = ()
    sizes: tuple[float, ...] | None = None
    first_order: bool = False
    kind: str = ""

    @classmethod
    def of(cls, scheduler: Any) -> Sampling:
        """Of the generation that a scheduler has set its timesteps for. A few host reads."""
        sizes = step_sizes(scheduler)
        timesteps = timesteps_of(scheduler)
        fractions = _fractions(scheduler, timesteps)
        angles = noise_angles(scheduler, fractions)
        noise = angles if _by_sigma(scheduler) else fractions
        name, order = type(scheduler).__name__, scheduler.config.get("solver_order", 1)
        first_order = order == 1 and not any(word in name for word in MULTISTEP)
        predicts = scheduler.config.get("prediction_type")
        kind = name if predicts is None else f"{name}, {predicts}"
        sizes_ = None if sizes is None else tuple(sizes)
        return cls(timesteps, noise, angles, sizes_, first_order, kind)

    @classmethod
    def evenly(cls, total: int) -> Sampling:
        """Of a loop that tells no more than how many steps it has."""
        levels = tuple(1.0 - i / total for i in range(total))
        return cls(levels, levels, levels)

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def additive_sizes(self) -> tuple[float, ...] | None:
        """The sizes, where a later step can make up for what forecasts lacked; else None."""
        return self.sizes if self.first_order else None

    def part(self, begin: int, count: int) -> Sampling:
        """These steps alone."""
        at = slice(begin, begin + count)
        sizes, angles = self.sizes and self.sizes[at], self.angles[at]
        steps = self.timesteps[at]
        return Sampling(steps, self.noise[at], angles, sizes, self.first_order, self.kind)

    def nearest(self, timestep: Any) -> int:
        """The first step at this timestep, or next to it; of several, the noisiest token's. A host read."""
        value = float(timestep.max().item() if hasattr(timestep, "max") else timestep)
        distances = [abs(each - value) for each in self.timesteps]
        return distances.index(min(distances))


def noise_angles(scheduler: Any, fractions: tuple[float, ...]) -> tuple[float, ...]:
    """The angle of noise against signal at every step, as a fraction of the right angle.

    From sigmas where the scheduler has one a step, from alphas where it has those and its timesteps are
    their places, else from the fractions. Where all of these are alike they say nothing, and steps count as
    even.
    """
    sigmas, alphas = _sigmas(scheduler), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) >= len(fractions):
        signal = float(scheduler.config.get("sigma_data") or 1.0)  # EDM's latents are that wide
        flow = is_flow(scheduler)
        pairs = [(each, 1 - each if flow else signal) for each in sigmas[: len(fractions)]]
    elif alphas is not None and not _by_sigma(scheduler):
        at = scheduler.timesteps.long().clamp(0, len(alphas) - 1).to(alphas.device)
        kept = alphas[at].double().clamp(0, 1).tolist()
        pairs = [(math.sqrt(1 - each), math.sqrt(each)) for each in kept]
    else:
        pairs = [(each, 1 - each) for each in fractions]
    angles = tuple(math.atan2(*pair) / (math.pi / 2) for pair in pairs)
    return angles if len({*angles}) > 1 else Sampling.evenly(len(angles)).angles


def _sigmas(scheduler: Any) -> list[float] | None:
    """The scheduler's sigmas, from noise on; None: it has none."""
    sigmas: Any = getattr(scheduler, "sigmas", None)
    if not hasattr(sigmas, "tolist"):
        return None
    values: list[float] = sigmas.tolist()
    # Some models count from the image to the noise (Mochi).
    inverted = scheduler.config.get("invert_sigmas", False)
    return [1 - each for each in values] if inverted else values


def _by_sigma(scheduler: Any) -> bool:
    """Whether timesteps are a function of sigma, as in EDM, and no places in the training range."""
    config = scheduler.config
    # diffusers heeds the type for velocity alone.
    continuous = config.get("timestep_type") == "continuous"
    velocity = config.get("prediction_type") == "v_prediction"
    return "sigma_data" in config or (continuous and velocity)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler follows a flow from noise to image, with sigmas from 1 to 0."""
    named = "FlowMatch" in type(scheduler).__name__
    return named or bool(scheduler.config.get("use_flow_sigmas", False))


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
    sigmas, alphas = _sigmas(scheduler), getattr(scheduler, "alphas_cumprod", None)
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
        levels = sigmas
    elif alphas is not None:
        kept = alphas[scheduler.timesteps.long().to(alphas.device)].double()
        levels = [*((1 - kept) / kept).sqrt().tolist(), 0.0]
    else:
        return None
    if kind == "v_prediction":
        levels = [math.atan(level) for level in levels]
    found = [before - after for before, after in pairwise(levels)]
    return found if all(move > 0 for move in found) else None


def timesteps_of(scheduler: Any) -> tuple[float, ...]:
    """The timesteps that a scheduler has set, in one host read."""
    timesteps = scheduler.timesteps
    return tuple(float(each) for each in getattr(timesteps, "tolist", lambda: timesteps)())


def _fractions(scheduler: Any, timesteps: tuple[float, ...]) -> tuple[float, ...]:
    """Timesteps as fractions of the training range, 1 is pure noise."""
    most = float(getattr(scheduler.config, "num_train_timesteps", None) or 1000)
    if max(timesteps, default=most) <= 1:  # counted from 1 down to 0, whatever the training range
        most = 1.0
    shares = tuple(min(1.0, max(0.0, each / most)) for each in timesteps)
    inverted = scheduler.config.get("invert_sigmas", False)
    return tuple(1 - each for each in shares) if inverted else shares
