"""Knows the denoising step: counts a scheduler's own calls, on the instance, without touching the device.

`set_timesteps` starts a generation (its timesteps are read to the host once), every `step` advances it.
That is right for two-call schedulers, image-to-image and classifier-free guidance in two calls, where
counting the denoiser's calls is not.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Protocol

from .pipelines import SCHEDULER_METHODS, generating
from .reference import Reference

CLOCK = "_tofu_clock"


class StepListener(Protocol):
    """Who is told by a clock: a generation.

    Attributes:
        pipeline: The pipeline that it was made for, or None; copied along with that pipeline only.
        schedulers: Those that tell it.
    """

    schedulers: list[Reference]

    @property
    def pipeline(self) -> Any:
        """The pipeline that it was made for, or None."""

    def start(self, scheduler: Any) -> None:
        """A generation starts: the scheduler has set its timesteps."""

    def advance(self, scheduler: Any, timestep: Any) -> None:
        """A step is over."""


class Entry:
    """A listener, which must not outlive its denoiser, and the pipeline it was made for."""

    def __init__(self, listener: StepListener) -> None:
        self.listener = Reference(listener)
        self.pipeline = Reference(listener.pipeline)


class Clock:
    """Tells listeners when a scheduler starts a generation and when it advances.

    A scheduler is copied without them, and so without their models, unless its pipeline is copied with it.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.entries: list[Entry] = []

    @property
    def listeners(self) -> list[StepListener]:
        """Those that are alive."""
        found = [entry.listener() for entry in self.entries]
        return [each for each in found if each is not None]

    def add(self, listener: StepListener) -> None:
        """Tell this listener too, from now on."""
        self.entries.append(Entry(listener))
        listener.schedulers[:] = [each for each in listener.schedulers if each() is not None]
        if not any(each() is self.scheduler for each in listener.schedulers):
            listener.schedulers.append(Reference(self.scheduler))

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        if id(self.scheduler) not in memo:
            return self  # of the scheduler's attributes alone, to be put back later (Panorama)
        clock = Clock(memo[id(self.scheduler)])
        memo[id(self)] = clock
        for listener in self.listeners:
            if id(listener.pipeline) in memo:
                clock.add(copy.deepcopy(listener, memo))
        return clock

    def __reduce__(self) -> tuple[type[Clock], tuple[Any]]:
        return Clock, (self.scheduler,)

    def start(self) -> None:
        """Tell that the timesteps are set.

        Raises:
            RuntimeError: if the denoiser of the pipeline that is generating was exchanged.
        """
        for entry in list(self.entries):
            listener = entry.listener()
            if listener is not None:
                listener.start(self.scheduler)
            elif entry.pipeline() is None:
                self.entries.remove(entry)
            elif generating(self.scheduler) is entry.pipeline():
                raise exchanged(entry.pipeline())

    def advance(self, timestep: Any) -> None:
        """Tell that a step is over."""
        for listener in self.listeners:
            listener.advance(self.scheduler, timestep)


def exchanged(pipeline: Any) -> RuntimeError:
    """What to raise where a pipeline has another denoiser than the one that tofu was put on."""
    return RuntimeError(
        f"a denoiser of {type(pipeline).__name__} was exchanged after apply_tofu, and the new one runs "
        "without tofu; call apply_tofu on the pipeline again, or remove_tofu to go on without"
    )


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
        """Call the scheduler's method, then tell the clock."""
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
        for name in SCHEDULER_METHODS:
            if hasattr(scheduler, name):
                scheduler.__dict__[name] = Watched(clock, name)
    if not is_watched(scheduler, listener):
        clock.add(listener)


def unwatch(listener: StepListener) -> None:
    """Undo every `watch` of this listener; the last listener out puts a scheduler's methods back."""
    for reference in listener.schedulers:
        scheduler = reference()
        if scheduler is not None:
            clock: Clock = scheduler.__dict__[CLOCK]
            _keep(clock, [entry for entry in clock.entries if entry.listener() is not listener])
    listener.schedulers.clear()


def listeners_of(scheduler: Any, pipeline: Any) -> list[StepListener]:
    """Those that a scheduler tells and that were made for this pipeline. Ones that are gone are forgotten."""
    clock = getattr(scheduler, "__dict__", {}).get(CLOCK)
    if clock is None:
        return []
    _keep(clock, [entry for entry in clock.entries if entry.listener() is not None])
    return [each for each in clock.listeners if each.pipeline is pipeline]


def is_watched(scheduler: Any, listener: StepListener) -> bool:
    """Whether this scheduler already tells this listener its steps."""
    clock = getattr(scheduler, "__dict__", {}).get(CLOCK)
    return clock is not None and listener in clock.listeners


def _keep(clock: Clock, entries: list[Entry]) -> None:
    """Leave these entries; with none left the scheduler gets its methods back."""
    clock.entries = entries
    scheduler = clock.scheduler
    if entries or scheduler.__dict__.get(CLOCK) is not clock:
        return
    del scheduler.__dict__[CLOCK]
    for name in SCHEDULER_METHODS:
        ours = scheduler.__dict__.get(name)
        if isinstance(ours, Watched):
            if ours.inner is None:
                del scheduler.__dict__[name]
            else:
                scheduler.__dict__[name] = ours.inner
