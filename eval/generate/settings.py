"""One way to generate: unreduced, with tofu, or by one of the baselines, behind one interface."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from eval.baselines.cache_dit import dual_block_cached
from eval.baselines.deepcache import deep_cached
from eval.baselines.diffusers_caches import (
    broadcast_attention,
    extrapolated,
    first_block_cached,
    magnitude_cached,
)
from eval.baselines.fewer_steps import rescheduled, scheduler_like
from eval.baselines.options import check_types
from eval.baselines.seacache import sea_cached
from eval.baselines.step_cache import step_cached
from eval.baselines.tomesd import merged_by_tomesd
from eval.denoiser import denoiser_of
from tofu_diffusers import Config, Handle, StepSkipping, TokenReduction, apply_tofu

KINDS = (
    "unreduced",
    "tofu",
    "both",
    "fewer_steps",
    "step_cache",
    "tomesd",
    "pab",
    "taylorseer",
    "first_block_cache",
    "magcache",
    "seacache",
    "dbcache",
    "deepcache",
    "stack",
)
# Of kinds that are one context manager around a denoiser, or around the pipeline.
AROUND: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "step_cache": step_cached,
    "pab": broadcast_attention,
    "taylorseer": extrapolated,
    "first_block_cache": first_block_cached,
    "magcache": magnitude_cached,
    "seacache": sea_cached,
    "dbcache": dual_block_cached,
    "tomesd": merged_by_tomesd,
    "deepcache": deep_cached,
}
AROUND_PIPELINE = ("tomesd", "deepcache", "magcache", "seacache", "dbcache")


@dataclass(frozen=True)
class Setting:
    """A way to generate.

    Args:
        name: Of its folder and rows: letters, digits and "-_.+=".
        kind: "unreduced"; "tofu" (options of apply_tofu: ratio or speedup, and more of that workflow);
            "both" (tokens, steps: the options of each); "fewer_steps" (steps; scheduler: None or
            "multistep"); "step_cache" (total, computed, first, order); "tomesd" (its own options); "pab"
            (skip, first, last); "taylorseer" (interval, first, order, modules); "first_block_cache"
            (threshold); "magcache" (threshold, steps, most, retention, prompt); "seacache" (threshold, order,
            most); "dbcache" (threshold, steps, first, warmup, forecast); "deepcache" (interval, branch);
            "stack" (of: settings as dictionaries, the first innermost).
        options: Of the kind.

    Raises:
        ValueError: on an unknown kind, options that are not its own, or a name that is no folder's.
    """

    name: str
    kind: str = "unreduced"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        plain = isinstance(self.name, str)  # JSON may have anything
        rest = self.name.translate(str.maketrans("", "", "-_.+=")) if plain else ""
        if not (rest.isascii() and rest.isalnum()):
            raise ValueError(f"name {self.name!r} may hold letters, digits and -_.+= only")
        object.__setattr__(self, "options", dict(self.options))
        try:
            self._check_options()
        except TypeError as error:
            raise ValueError(f"options of {self.name!r}, kind {self.kind!r}: {error}") from error

    def _check_options(self) -> None:
        """Bind them as they will be; of tofu, `apply_tofu` says more than could be said here."""
        options = self.options
        functions: dict[str, Callable[..., Any]] = {
            "both": _both,
            "fewer_steps": _fewer_steps,
            "stack": _stack,
        }
        own = functions.get(self.kind)
        if self.kind in AROUND:
            inspect.signature(AROUND[self.kind]).bind(None, **options)
            check_types(AROUND[self.kind], options)
        elif own is not None:
            inspect.signature(own).bind(**options)
            check_types(own, options)
            own(**options)
        elif self.kind == "unreduced" and options:
            raise TypeError(f"it has none, not {', '.join(options)}")

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
        return [part for inner in _stack(**self.options) for part in inner.parts()]

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


def config_of(options: Mapping[str, Any]) -> Config:
    """The configuration that these options of kind "tofu" ask for, as far as they say.

    Raises:
        TypeError, ValueError: if they are none of it.
    """
    return StepSkipping(**options) if "speedup" in options else TokenReduction(**options)


def _both(*, tokens: dict[str, Any], steps: dict[str, Any]) -> tuple[Config, Config]:
    return TokenReduction(**tokens), StepSkipping(**steps)


def _fewer_steps(*, steps: int, scheduler: str | None = None) -> int:
    if scheduler not in (None, "multistep"):
        raise ValueError(f"unknown scheduler {scheduler!r}; choose multistep, or leave it out")
    return steps


def _stack(*, of: list[dict[str, Any]]) -> list[Setting]:
    settings = [Setting.from_dict(each) for each in of]
    parts = [part for each in settings for part in each.parts()]
    own = [part.name for part in parts if part.kind in ("tofu", "both")]
    if len(own) > 1:
        raise ValueError(
            f"a stack with {len(own)} settings of tofu, {' and '.join(own)}: applied again, tofu takes the "
            'place of the earlier; kind "both" has tokens and steps together'
        )
    return settings


def known_saving(setting: Setting, applied: Applied, pipe: Any, steps: int) -> float | None:
    """FLOPs of the unreduced denoiser over those of the generation just made, where they need no counting.

    Args:
        pipe: As the setting has left it.
        steps: Of the unreduced generation.

    Returns:
        None for what other packages did to the pipeline, and for fewer steps where a sampler's steps are
        not its calls of the denoiser: count it, as `eval.bench.pipeline` does.
    """
    plain = len(pipe.scheduler.timesteps) == applied.call.get("num_inference_steps", steps)
    summaries = [handle.summary() for handle in applied.handles]
    saving = math.prod(each.flops_unreduced / each.flops_run for each in summaries)
    for each in setting.parts():
        if each.kind == "fewer_steps" and plain:
            saving *= steps / _fewer_steps(**each.options)
        elif each.kind == "step_cache" and plain:
            saving *= each.options["total"] / each.options["computed"]
        elif each.kind not in ("unreduced", "tofu", "both"):
            return None
    return saving


@contextmanager
def _applied(setting: Setting, pipe: Any) -> Iterator[Applied]:
    options = dict(setting.options)
    done = Applied()
    with ExitStack() as stack:
        if setting.kind == "tofu":
            try:
                handle = apply_tofu(pipe, **options)
            except TypeError as error:
                raise ValueError(f"options of {setting.name!r}: {error}") from error
            done.handles.append(stack.enter_context(handle))
        elif setting.kind == "both":
            done.handles.append(stack.enter_context(apply_tofu(pipe, *_both(**options))))
        elif setting.kind == "fewer_steps":
            done.call["num_inference_steps"] = options["steps"]
            if options.get("scheduler") == "multistep":
                second = scheduler_like(pipe.scheduler, "DPMSolverMultistepScheduler")
                stack.enter_context(rescheduled(pipe, second))
        elif setting.kind in AROUND:
            target = pipe if setting.kind in AROUND_PIPELINE else denoiser_of(pipe)
            stack.enter_context(AROUND[setting.kind](target, **options))
        elif setting.kind == "stack":
            for inner in _stack(**options):
                each = stack.enter_context(inner.applied(pipe))
                done.call |= each.call
                done.handles += each.handles
        yield done
