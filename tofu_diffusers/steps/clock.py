"""Knows the denoising step: counts a scheduler's own calls, on the instance, without touching the device.

`set_timesteps` starts a generation (its timesteps are read to the host once), every `step` advances it.
That is right for two-call schedulers, image-to-image and classifier-free guidance in two calls, where
counting the denoiser's calls is not.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Protocol

CLOCK = "_tofu_clock"
WATCHED = ("set_timesteps", "step")


class StepListener(Protocol):
    """Who is told by a clock: a generation.

    Attributes:
        pipeline: The pipeline it serves, or None; copied along with that pipeline only.
        schedulers: Those that tell it.
    """

    schedulers: list[Any]

    @property
    def pipeline(self) -> Any: ...

    def start(self, scheduler: Any) -> None:
        """A generation starts: the scheduler has set its timesteps."""

    def advance(self, scheduler: Any, timestep: Any) -> None:
        """A step is over."""


class Clock:
    """Tells listeners when a scheduler starts a generation and when it advances.

    A scheduler is copied without them, and so without their models, unless its pipeline is copied with it.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.listeners: list[StepListener] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        if id(self.scheduler) not in memo:
            return self  # of the scheduler's attributes alone, to be put back later (Panorama)
        clock = Clock(memo[id(self.scheduler)])
        memo[id(self)] = clock
        clock.listeners = [
            copy.deepcopy(listener, memo)
            for listener in self.listeners
            if id(listener.pipeline) in memo
        ]
        return clock

    def __reduce__(self) -> tuple[type[Clock], tuple[Any]]:
        return Clock, (self.scheduler,)

    def start(self) -> None:
        for listener in self.listeners:
            listener.start(self.scheduler)

    def advance(self, timestep: Any) -> None:
        for listener in self.listeners:
            listener.advance(self.scheduler, timestep)


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


def watch(scheduler: Any, listener: StepListener) -> None:
    """Let a scheduler tell this listener its steps."""
    clock = scheduler.__dict__.get(CLOCK)
    if clock is None:
        clock = Clock(scheduler)
        scheduler.__dict__[CLOCK] = clock
        for name in WATCHED:
            if hasattr(scheduler, name):
                scheduler.__dict__[name] = Watched(clock, name)
    if listener not in clock.listeners:
        clock.listeners.append(listener)
        listener.schedulers.append(scheduler)


def unwatch(listener: StepListener) -> None:
    """Undo every `watch` of this listener; the last listener out puts a scheduler's methods back."""
    for scheduler in listener.schedulers:
        clock: Clock = scheduler.__dict__[CLOCK]
        clock.listeners = [other for other in clock.listeners if other is not listener]
        if not clock.listeners:
            _restore(scheduler)
    listener.schedulers.clear()


def _restore(scheduler: Any) -> None:
    del scheduler.__dict__[CLOCK]
    for name in WATCHED:
        ours = scheduler.__dict__.get(name)
        if isinstance(ours, Watched):
            if ours.inner is None:
                del scheduler.__dict__[name]
            else:
                scheduler.__dict__[name] = ours.inner


def is_watched(scheduler: Any, listener: StepListener) -> bool:
    """Whether this scheduler already tells this listener its steps."""
    clock = getattr(scheduler, "__dict__", {}).get(CLOCK)
    return clock is not None and listener in clock.listeners
