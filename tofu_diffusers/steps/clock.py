"""Knows the denoising step: counts a scheduler's own calls, on the instance, without touching the device.

`set_timesteps` starts a generation (its timesteps are read to the host once), every `step` advances it.
That is right for two-call schedulers, image-to-image and classifier-free guidance in two calls, where
counting the denoiser's calls is not.
"""

from __future__ import annotations

import copy
import inspect
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.session import Session

CLOCK = "_tofu_clock"
WATCHED = ("set_timesteps", "step")
NOISY = ("Ancestral", "DDPM", "LCM", "SASolver", "SDE", "TCD")
"""In the names of schedulers that draw noise at every step, which drowns what was wrong before."""


class Clock:
    """Tells sessions when a scheduler starts a generation and when it advances.

    A scheduler is copied without them, and so without their models, unless its pipeline is copied with it.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.sessions: list[Session] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        if id(self.scheduler) not in memo:
            return self  # of the scheduler's attributes alone, to be put back later (Panorama)
        clock = Clock(memo[id(self.scheduler)])
        memo[id(self)] = clock
        clock.sessions = [
            copy.deepcopy(session, memo)
            for session in self.sessions
            if id(session.pipeline.get()) in memo
        ]
        return clock

    def __reduce__(self) -> tuple[type[Clock], tuple[Any]]:
        return Clock, (self.scheduler,)

    def start(self) -> None:
        for session in self.sessions:
            session.follow(self.scheduler)

    def advance(self, timestep: Any) -> None:
        for session in self.sessions:
            session.advance(self.scheduler, timestep)


class Watched:
    """One method of one scheduler: calls it, then tells the clock. Survives a deepcopy of the pipeline."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock = clock
        self.name = name
        self.inner = clock.scheduler.__dict__.get(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        clock = copy.deepcopy(self.clock, memo)
        if clock is self.clock:
            return self
        watched = Watched.__new__(Watched)
        watched.__dict__.update(clock=clock, name=self.name, inner=copy.deepcopy(self.inner, memo))
        return watched

    @property
    def _method(self) -> Any:
        scheduler = self.clock.scheduler
        return self.inner or getattr(type(scheduler), self.name).__get__(scheduler)

    @property
    def __signature__(self) -> inspect.Signature:
        # Pipelines look up which arguments a scheduler takes.
        return inspect.signature(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        if self.name == "set_timesteps":
            self.clock.start()
        else:
            self.clock.advance(args[1] if len(args) > 1 else kwargs.get("timestep"))
        return result


def watch(scheduler: Any, session: Session) -> None:
    """Let a scheduler tell this session its steps."""
    clock = scheduler.__dict__.get(CLOCK)
    if clock is None:
        clock = Clock(scheduler)
        scheduler.__dict__[CLOCK] = clock
        for name in WATCHED:
            if hasattr(scheduler, name):
                scheduler.__dict__[name] = Watched(clock, name)
    if session not in clock.sessions:
        clock.sessions.append(session)
        session.schedulers.append(scheduler)


def unwatch(session: Session) -> None:
    """Undo every `watch` of this session; the last session out puts a scheduler's methods back."""
    for scheduler in session.schedulers:
        clock: Clock = scheduler.__dict__[CLOCK]
        clock.sessions = [other for other in clock.sessions if other is not session]
        if not clock.sessions:
            _restore(scheduler)
    session.schedulers.clear()


def _restore(scheduler: Any) -> None:
    del scheduler.__dict__[CLOCK]
    for name in WATCHED:
        ours = scheduler.__dict__.get(name)
        if isinstance(ours, Watched):
            if ours.inner is None:
                del scheduler.__dict__[name]
            else:
                scheduler.__dict__[name] = ours.inner


def is_watched(scheduler: Any, session: Session) -> bool:
    """Whether this scheduler already tells this session its steps."""
    clock = getattr(scheduler, "__dict__", {}).get(CLOCK)
    return clock is not None and session in clock.sessions


def noise_levels(scheduler: Any) -> list[float]:
    """Timesteps of the coming generation as fractions of the training range, 1 = pure noise.

    One host read a generation.
    """
    timesteps = scheduler.timesteps
    values = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
    return [noise_level(scheduler, value) for value in values]


def moves(scheduler: Any) -> list[float] | None:
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
    """A timestep as a fraction of the training range; of several, the noisiest token's. A host read."""
    value = timestep.max().item() if hasattr(timestep, "max") else timestep
    most = float(getattr(scheduler.config, "num_train_timesteps", None) or 1000)
    return min(1.0, max(0.0, float(value) / most))
