"""What tofu does, as one frozen value: validated at construction, JSON both ways."""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .steps.schedule import Schedule, quantise
from .tokens.merge import FOLDS
from .tokens.methods import METHODS, Method, make_method
from .tokens.methods.all import All
from .tokens.methods.base import hint
from .tokens.unmerge import CACHED, SITE_RESTORES

SCOPES = ("attention", "block", "span", "step")
CONTEXTS = ("none", "fresh", "cached")
SHARES = ("block", "run", "level")
# What scope "step" has no use for, with all tokens gone at once.
TOKEN_FIELDS = (
    "context", "schedule", "depth_schedule", "max_age", "first_blocks", "last_blocks", "share", "share_plan",
    "reuse", "levels", "min_tokens", "seed",
)  # fmt: skip
# Whole numbers, and the least that each may be.
LEAST = {
    "first_steps": 0, "last_steps": 0, "first_blocks": 0, "last_blocks": 0, "min_tokens": 0, "reuse": 1,
    "max_age": 1, "seed": 0,
}  # fmt: skip
MOST_SEED = 2**63 - 1
FILE_NAME = "tofu_config.json"
FORMAT = 1
CORRECTED = "corrected"
RESTORES = (*SITE_RESTORES, CORRECTED)
STEP_RESTORES = ("temporal", "taylor", CORRECTED)


def one_of(what: str, value: object, valid: Iterable[str]) -> None:
    """Raise ValueError naming the valid values (and the closest) unless `value` is one of them."""
    valid = sorted(valid)
    if value not in valid:
        close = hint(str(value), valid)
        raise ValueError(f"unknown {what} {value!r}{close}; choose one of {', '.join(valid)}")


@dataclass(frozen=True)
class TofuConfig:
    """Configuration of token reduction.

    Args:
        ratio: Fraction of the image tokens removed where tofu acts, in [0, 1); in scope "step", fraction of
            the steps that are left out.
        method: Which tokens go: a name of `tofu_diffusers.METHODS`; in scope "step" "all", the only one
            there. None: "tofu", or "all" in scope "step".
        method_options: Options of the method, by name.
        fold: What a kept token becomes: "prune", "mean", "mlerp"; None: the method's own.
        restore: What a removed token gets back: "copy", "mlerp", "temporal", "taylor", "blend", "corrected"
            (what "taylor" got wrong is taken back at the next step that computes it); None: the method's
            own. In scope "step": "temporal", "taylor", "corrected".
        scope: Around what tokens shrink: "attention", "block", "span" (a run of blocks) or "step" (the whole
            denoiser: at some steps it does not run, and its prediction is restored from its past).
        context: What attention sees of removed tokens: "none"; "fresh" (keys and values from their
            current state); "cached" (their last keys and values).
        schedule: Factor on the ratio over the noise level (position 0: pure noise, 1: clean image). A
            `Schedule` or what `Schedule.of` takes.
        depth_schedule: The same over the depth (0: first block, 1: last block).
        first_steps, last_steps: Denoiser evaluations left whole at the start and the end.
        first_blocks, last_blocks: Blocks never reduced at the start and the end of the denoiser.
        share: Who shares a plan within a step: each "block" has its own, a "run" of blocks one, or all
            blocks of a "level" (a token grid) one.
        share_plan: Whether all images of a batch share one plan, made from all of them. Where positions have
            no batch axis (FLUX, Qwen-Image) images run one after another in the reduced blocks otherwise.
        reuse: Denoising steps that a plan is used for.
        levels: UNet resolution levels to act on (0 = finest); None: all.
        min_tokens: Leave token grids smaller than this whole.
        max_age: Staleness bound of the cached restores, in steps; None: unbounded.
        memory_limit: Most GiB that caches may take; None: no limit.
        seed: Seed of the methods that draw; the global generator is never touched.
        family: Family of the denoiser by name; None: found from its class.

    Raises:
        TypeError: if a number is not a number.
        ValueError: if a value is unknown, out of range, or does not go with another.
    """

    ratio: float = 0.5
    method: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    fold: str | None = None
    restore: str | None = None
    scope: str = "block"
    context: str = "none"
    schedule: Schedule = Schedule()
    depth_schedule: Schedule = Schedule()
    first_steps: int = 0
    last_steps: int = 0
    first_blocks: int = 0
    last_blocks: int = 0
    share: str = "run"
    share_plan: bool = False
    reuse: int = 1
    levels: tuple[int, ...] | None = None
    min_tokens: int = 0
    max_age: int | None = None
    memory_limit: float | None = None
    seed: int = 0
    family: str | None = None

    def __post_init__(self) -> None:
        _check_number("ratio", self.ratio)
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(
                f"ratio {self.ratio} is outside [0, 1): it is the fraction of tokens removed, 0.5 halves them"
            )
        object.__setattr__(self, "ratio", float(self.ratio))
        object.__setattr__(self, "schedule", Schedule.of(self.schedule))
        object.__setattr__(self, "depth_schedule", Schedule.of(self.depth_schedule))
        one_of("scope", self.scope, SCOPES)
        if self.method is None:
            object.__setattr__(self, "method", All.name if self.scope == "step" else "tofu")
        # As JSON has them, so that a configuration read back is equal.
        options = {name: _plain(value) for name, value in dict(self.method_options).items()}
        object.__setattr__(self, "method_options", options)
        if self.fold is not None:
            one_of("fold", self.fold, FOLDS)
        if self.restore is not None:
            one_of("restore", self.restore, RESTORES)
        one_of("context", self.context, CONTEXTS)
        one_of("share", self.share, SHARES)
        for name, least in LEAST.items():
            if getattr(self, name) is not None:
                whole = _whole(name, getattr(self, name), least)
                object.__setattr__(self, name, whole)
        if self.seed > MOST_SEED:
            raise ValueError(f"seed {self.seed} is above {MOST_SEED}, the largest of 64 bits")
        if not isinstance(self.share_plan, bool):
            raise TypeError(f"share_plan must be True or False, not {self.share_plan!r}")
        if self.levels is not None:
            levels = tuple(_whole("levels", level, 0) for level in self.levels)
            object.__setattr__(self, "levels", levels)
        if self.memory_limit is not None:
            _check_number("memory_limit", self.memory_limit)
            if self.memory_limit <= 0:
                raise ValueError(
                    f"memory_limit {self.memory_limit} GiB must be above 0; None sets no limit"
                )
        limit = self.make_method().max_ratio
        if self.ratio > limit:
            raise ValueError(
                f"ratio {self.ratio:g} exceeds {limit:g}, the most method {self.method!r} can remove with "
                f"options {dict(self.method_options)}; lower the ratio or change the options"
            )
        self._check_combination()

    def _check_combination(self) -> None:
        if self.scope == "step":
            self._check_step()
        prunes = {self.fold_at(depth) for depth in (0.0, 1.0)} == {"prune"}
        cached = {self.restore_at(depth) for depth in (0.0, 1.0)} & {*CACHED, CORRECTED}
        if (self.context != "none" or cached) and not prunes:
            what = (
                f"context {self.context!r}"
                if self.context != "none"
                else f"restore {min(cached)!r}"
            )
            fold = repr(self.fold) if self.fold else f"the own one of method {self.method!r}"
            raise ValueError(
                f"{what} needs fold 'prune' at every site (a folded token has no state of its own to keep), "
                f"not {fold}; pass fold='prune'"
            )
        if self.scope == "span" and self.context == "fresh":
            raise ValueError(
                "scope 'span' cannot have context 'fresh': inside a span removed tokens have no current "
                "state; use scope 'block', or context 'cached'"
            )
        if self.scope == "span" and self.share == "block":
            raise ValueError(
                "scope 'span' needs one plan a run; use share 'run' or 'level', or scope 'block'"
            )

    def _check_step(self) -> None:
        kept = {
            "fold": self.fold in (None, "prune"),
            "restore": self.restore_at(0.0) in STEP_RESTORES,
        }
        defaults = {item.name: item.default for item in fields(self)}
        kept |= {name: getattr(self, name) == defaults[name] for name in TOKEN_FIELDS}
        for name, holds in kept.items():
            if not holds:
                raise ValueError(
                    "scope 'step' leaves out all tokens of a step and extrapolates ('taylor', 'corrected') "
                    f"or repeats ('temporal') its prediction; {name} {getattr(self, name)!r} does nothing "
                    "there: leave it out, or use scope='block'"
                )

    def make_method(self) -> Method:
        """The method with its options.

        Raises:
            ValueError: on an unknown method or option, or one that is not of this scope.
        """
        options = dict(self.method_options)
        if (self.scope == "step") != (self.method == All.name):
            raise ValueError(
                f"scope {self.scope!r} cannot have method {self.method!r}: scope 'step' and method 'all' go "
                f"together; leave method out, or choose one of {', '.join(sorted(METHODS))} and another scope"
            )
        if self.scope == "step":
            if options:
                raise ValueError(
                    f"method 'all' has no options, not {', '.join(options)}; leave them out"
                )
            return All()
        if self.max_age is not None and self.method == "importance":
            # The choice must keep the bound that the restores assume.
            options.setdefault("max_age", self.max_age)
        return make_method(str(self.method), **options)

    def fold_at(self, depth: float) -> str:
        """The fold at a depth in [0, 1]: the field, or else the method's own."""
        return self.fold or self.make_method().fold(depth)

    def restore_at(self, depth: float) -> str:
        """The restore at a depth in [0, 1]: the field, or else the method's own."""
        return self.restore or self.make_method().restore(depth)

    def ratio_at(self, position: float, depth: float) -> float:
        """The ratio at a noise level (0: pure noise, 1: clean image) and a depth, by the schedules."""
        factor = self.schedule.factor(position) * self.depth_schedule.factor(depth)
        return self.ratio * (factor if factor == 1.0 else quantise(factor))

    @property
    def needs_steps(self) -> list[str]:
        """Why this configuration must know the denoising step; empty if each call can stand alone."""
        method = self.make_method()
        reasons = {
            f"restore {self.restore_at(0.0)!r}": bool(
                {self.restore_at(0.0), self.restore_at(1.0)} & {*CACHED, CORRECTED}
            ),
            f"context {self.context!r}": self.context == "cached",
            f"method {self.method!r} (source {', '.join(method.sources)})": method.warmup > 0,
            f"schedule {self.schedule.kind!r}": not self.schedule.is_constant,
            "first_steps and last_steps": self.first_steps + self.last_steps > 0,
            f"reuse {self.reuse}": self.reuse > 1,
        }
        return [reason for reason, holds in reasons.items() if holds]

    def replace(self, **changes: Any) -> TofuConfig:
        """A copy with some fields changed, validated again."""
        check_field_names(changes)
        return TofuConfig(
            **{item.name: getattr(self, item.name) for item in fields(self)} | changes
        )

    def to_json(self) -> str:
        """The configuration as a JSON object."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TofuConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: if the text is no such JSON object, or of another format.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a TofuConfig is a JSON object, not a {type(data).__name__}")
        if data.pop("format", FORMAT) != FORMAT:
            raise ValueError(
                f"this version reads TofuConfig format {FORMAT}; update tofu_diffusers"
            )
        check_field_names(data)
        return cls(**data)

    def save(self, folder: str | Path) -> Path:
        """Write `tofu_config.json` into a folder, such as a saved pipeline's; returns the file's path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> TofuConfig:
        """Read `tofu_config.json` from a folder.

        Raises:
            FileNotFoundError: if the folder holds none.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {FILE_NAME} in {folder}; write one with TofuConfig.save")
        return cls.from_json(path.read_text(encoding="utf-8"))


def check_field_names(names: Iterable[str]) -> None:
    """Raise ValueError naming the closest field unless all are fields of TofuConfig."""
    valid = [item.name for item in fields(TofuConfig)]
    for name in names:
        one_of("option", name, valid)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")


def _plain(value: Any) -> Any:
    """An option's value as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} {value} is below {least}")
    return int(value)
