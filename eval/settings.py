"""One way to generate: unreduced, with tofu, or by one of the baselines, behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from eval.baselines import (
    broadcast_attention,
    merged_by_tomesd,
    multistep,
    rescheduled,
    step_cached,
)
from tofu_diffusers import apply_tofu

KINDS = ("unreduced", "tofu", "fewer_steps", "step_cache", "tomesd", "pab", "stack")
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
            (skip, first, last); "stack" (of: settings as dictionaries, the first innermost).
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

    def applied(self, pipe: Any) -> AbstractContextManager[dict[str, Any]]:
        """Inside it the pipeline generates this way, if it is called with what the context yields."""
        return _applied(self, pipe)


@contextmanager
def _applied(setting: Setting, pipe: Any) -> Iterator[dict[str, Any]]:
    options = dict(setting.options)
    call: dict[str, Any] = {}
    with ExitStack() as stack:
        if setting.kind == "tofu":
            stack.enter_context(apply_tofu(pipe, **options))
        elif setting.kind == "fewer_steps":
            call["num_inference_steps"] = options["steps"]
            if options.get("scheduler") == "multistep":
                stack.enter_context(rescheduled(pipe, multistep(pipe.scheduler)))
        elif setting.kind == "step_cache":
            stack.enter_context(step_cached(denoiser_of(pipe), **options))
        elif setting.kind == "tomesd":
            stack.enter_context(merged_by_tomesd(pipe, **options))
        elif setting.kind == "pab":
            stack.enter_context(broadcast_attention(denoiser_of(pipe), **options))
        elif setting.kind == "stack":
            for inner in options["of"]:
                call |= stack.enter_context(Setting.from_dict(inner).applied(pipe))
        yield call
