"""One way to generate: unreduced, with tofu, or by one of the baselines, behind one interface."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from eval.baselines import (
    broadcast_attention,
    deep_cached,
    extrapolated,
    first_block_cached,
    merged_by_tomesd,
    rescheduled,
    scheduler_like,
    step_cached,
)
from tofu_diffusers import Handle, apply_tofu

KINDS = (
    "unreduced",
    "tofu",
    "fewer_steps",
    "step_cache",
    "tomesd",
    "pab",
    "taylorseer",
    "first_block_cache",
    "deepcache",
    "stack",
)
DENOISERS = ("unet", "transformer")


def denoiser_name(pipe: Any) -> str:
    """Where a pipeline keeps what it calls at every step.

    Raises:
        ValueError: if it has none by a usual name.
    """
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}")


def denoiser_of(pipe: Any) -> Any:
    """What a pipeline calls at every step; raises as `denoiser_name`."""
    return getattr(pipe, denoiser_name(pipe))


@dataclass(frozen=True)
class Setting:
    """A way to generate.

    Args:
        name: Of its folder and rows: letters, digits and "-_.+=".
        kind: "unreduced"; "tofu" (options of apply_tofu); "fewer_steps" (steps; scheduler: None or
            "multistep"); "step_cache" (total, computed, first, order); "tomesd" (its own options); "pab"
            (skip, first, last); "taylorseer" (interval, first, order, modules); "first_block_cache"
            (threshold); "deepcache" (interval, branch); "stack" (of: settings as dictionaries, the first
            innermost).
        options: Of the kind.

    Raises:
        ValueError: on an unknown kind, or a name that is no folder's.
    """

    name: str
    kind: str = "unreduced"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        rest = self.name.translate(str.maketrans("", "", "-_.+="))
        if not (rest.isascii() and rest.isalnum()):
            raise ValueError(f"name {self.name!r} may hold letters, digits and -_.+= only")
        object.__setattr__(self, "options", dict(self.options))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Setting:
        """What `to_dict` gave."""
        return cls(**data)

    def parts(self) -> list[Setting]:
        """Itself, or what it is a stack of, the first innermost."""
        if self.kind != "stack":
            return [self]
        inner = (Setting.from_dict(each).parts() for each in self.options["of"])
        return [part for parts in inner for part in parts]

    def applied(self, pipe: Any) -> AbstractContextManager[Applied]:
        """Inside it the pipeline generates this way, if it is called with the `call` of what it yields."""
        return _applied(self, pipe)


@dataclass
class Applied:
    """What a setting did to a pipeline.

    Attributes:
        call: Arguments that the pipeline is to be called with, beside or instead of others.
        handles: Of tofu; their summaries know the FLOPs saved.
    """

    call: dict[str, Any] = field(default_factory=dict)
    handles: list[Handle] = field(default_factory=list)


def known_saving(setting: Setting, applied: Applied, steps: int) -> float | None:
    """FLOPs of the unreduced denoiser over those of the generation just made, where they need no counting.

    Args:
        steps: Of the unreduced generation.

    Returns:
        None for what other packages did to the pipeline: count it, as `eval.speed` does.
    """
    summaries = [handle.summary() for handle in applied.handles]
    saving = math.prod(each.flops_whole / each.flops_run for each in summaries)
    for each in setting.parts():
        if each.kind == "fewer_steps":
            saving *= steps / int(each.options["steps"])
        elif each.kind == "step_cache":
            saving *= each.options["total"] / each.options["computed"]
        elif each.kind not in ("unreduced", "tofu"):
            return None
    return saving


@contextmanager
def _applied(setting: Setting, pipe: Any) -> Iterator[Applied]:
    options = dict(setting.options)
    done = Applied()
    with ExitStack() as stack:
        if setting.kind == "tofu":
            done.handles.append(stack.enter_context(apply_tofu(pipe, **options)))
        elif setting.kind == "fewer_steps":
            done.call["num_inference_steps"] = options["steps"]
            if options.get("scheduler") == "multistep":
                second = scheduler_like(pipe.scheduler, "DPMSolverMultistepScheduler")
                stack.enter_context(rescheduled(pipe, second))
        elif setting.kind == "step_cache":
            stack.enter_context(step_cached(denoiser_of(pipe), **options))
        elif setting.kind == "tomesd":
            stack.enter_context(merged_by_tomesd(pipe, **options))
        elif setting.kind == "pab":
            stack.enter_context(broadcast_attention(denoiser_of(pipe), **options))
        elif setting.kind == "taylorseer":
            stack.enter_context(extrapolated(denoiser_of(pipe), **options))
        elif setting.kind == "first_block_cache":
            stack.enter_context(first_block_cached(denoiser_of(pipe), **options))
        elif setting.kind == "deepcache":
            stack.enter_context(deep_cached(pipe, **options))
        elif setting.kind == "stack":
            for inner in options["of"]:
                each = stack.enter_context(Setting.from_dict(inner).applied(pipe))
                done.call |= each.call
                done.handles += each.handles
        yield done
