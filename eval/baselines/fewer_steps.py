"""Fewer steps, with the own scheduler of a pipeline or with another one."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import SchedulerMixin


def add_scheduler_argument(parser: argparse.ArgumentParser) -> None:
    """Ask for what `scheduler_like` takes."""
    parser.add_argument(
        "--scheduler",
        metavar="CLASS[,OPTION=VALUE ...]",
        help="of diffusers, such as FlowMatchEulerDiscreteScheduler,shift=5; default: the pipeline's own",
    )


def scheduler_like(scheduler: Any, asked: str) -> Any:
    """Another of diffusers' schedulers, for models that were trained for the noise of this one.

    Args:
        scheduler: The one at hand.
        asked: A class, and options of its own with their values in JSON, such as
            "FlowMatchEulerDiscreteScheduler,shift=5".

    Raises:
        ValueError: if diffusers has none of that name, it has no such option, or it is for the other kind of
            noise.
    """
    name, *words = asked.split(",")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(
            f"diffusers has no scheduler {name!r}, or lacks a package for it; give the name of a class, such "
            "as DPMSolverMultistepScheduler"
        )
    given = _options(kind, words)
    config, own = dict(scheduler.config), type(scheduler).__name__
    flow = "Flow" in own or config.get("use_flow_sigmas", False)
    shift = config.get("flow_shift" if "use_flow_sigmas" in config else "shift", 1.0)
    if flow == ("Flow" in name):
        return kind.from_config(config, **({"shift": shift} if flow else {}) | given)
    if not flow or "use_flow_sigmas" not in inspect.signature(kind).parameters:
        raise ValueError(
            f"{name} is {'not ' if flow else ''}for flow matching, and {own} is{'' if flow else ' not'}; "
            "choose DPMSolverMultistepScheduler or UniPCMultistepScheduler, which are for both"
        )
    own_options = {
        "num_train_timesteps": config["num_train_timesteps"],
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    return kind(**own_options | given)


def _options(kind: type, words: list[str]) -> dict[str, Any]:
    """Of a scheduler, from `name=value` each."""
    known = [*inspect.signature(kind).parameters]
    given = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(
                f"{word!r} is no option of a scheduler with a value in JSON; write it like shift=5, or "
                'algorithm_type="dpmsolver++"'
            ) from None
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no option {name!r}; choose one of {', '.join(known)}"
            )
    return given


@contextmanager
def rescheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline with another scheduler."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before
