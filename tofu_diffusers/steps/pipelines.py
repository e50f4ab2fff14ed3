"""Pipelines, seen from outside: their parts, and which of them is generating."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

SCHEDULER_METHODS = ("set_timesteps", "step")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a `torch.compile` wrapper."""
    return getattr(model, "_orig_mod", model)


def cached_by_cache_dit(model: nn.Module) -> bool:
    """Whether cache-dit is on this model: it replaces the forward, with tofu's inside or without."""
    return "_context_manager" in vars(model) and bool(vars(model).get("_is_cached"))


def components(target: object) -> dict[str, Any]:
    """The named parts of a pipeline (modular ones too); empty if the target is none."""
    parts = getattr(target, "components", None)
    return dict(parts) if isinstance(parts, dict) else {}


def holds(pipeline: object, part: object) -> bool:
    """Whether a model or scheduler is one of the pipeline's parts, compiled or not."""
    return any(
        (unwrap(each) if isinstance(each, nn.Module) else each) is part
        for each in components(pipeline).values()
    )


def schedulers(pipeline: object) -> list[Any]:
    """The pipeline's parts that count denoising steps, its `scheduler` first.

    Some have one for each of several denoisers, or one for pictures and one for sound.
    """
    found = [
        part
        for part in components(pipeline).values()
        if all(callable(getattr(part, name, None)) for name in SCHEDULER_METHODS)
    ]
    first = getattr(pipeline, "scheduler", None)
    return sorted(found, key=lambda each: each is not first)


def generating(part: object, known: object = None) -> Any:
    """The pipeline with this part that is running now, the innermost one; None if there is none.

    Any number of pipelines may share a denoiser, and servers copy one for every request. None of them says
    that it generates, and a denoiser is not told who calls it: that is read from the call stack, where a
    pipeline is the `self` of a method. A pipeline takes a while to name its parts, so that `known`, which had
    the part at an earlier call, is not asked again. No tensor is read.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            caller = frame.f_locals.get("self")
            may_be = not isinstance(caller, nn.Module | None)
            if may_be and (caller is known or holds(caller, part)):
                return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None
