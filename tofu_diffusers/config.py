"""What tofu does, as frozen values: one type a workflow, validated at construction, JSON both ways."""

from __future__ import annotations

import json
import math
import numbers
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .steps.fitted import FittedForecasts
from .steps.rules import SKIP_RULES
from .steps.schedule import Schedule, quantise
from .steps.trajectory import Trajectory
from .tokens.merge import MERGES
from .tokens.methods import Method, make_method
from .tokens.methods.base import hint
from .tokens.sources import SOURCES
from .tokens.unmerges import UNMERGES

SCOPES = ("attention", "block", "span")
KEYS_VALUES = ("dropped", "fresh", "cached")
SHARES = ("block", "stack", "resolution")
MAX_WHOLE = 2**63 - 1
ENCODER_SCHEDULES = ("constant", "share")
VERSION = 1
"""Of the JSON form."""

AnyConfig = TypeVar("AnyConfig", bound="Config")


def one_of(what: str, value: object, valid: Iterable[str]) -> None:
    """Raise ValueError naming the valid values (and the closest) unless `value` is one of them."""
    valid = sorted(valid)
    if value not in valid:
        close = hint(str(value), valid)
        raise ValueError(f"unknown {what} {value!r}{close}; choose one of {', '.join(valid)}")


class RatioTooHighError(ValueError):
    """A ratio is over what its method can remove."""


@dataclass(frozen=True)
class Config(ABC):
    """What all workflows have: `TokenReduction`, `StepSkipping` and `EncoderReduction` derive from it."""

    file_name: ClassVar[str]
    whole_numbers: ClassVar[Mapping[str, int]]
    """Fields that are whole numbers (or None, where that is the default), with the least value of each."""

    family: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def __post_init__(self) -> None:
        """Check all options, and bring them into the form that JSON gives back."""

    def _check_common(self) -> None:
        """Check whole numbers and what all types have."""
        optional = {each.name for each in fields(self) if each.default is None}
        for name, least in self.whole_numbers.items():
            value = getattr(self, name)
            if value is not None or name not in optional:
                object.__setattr__(self, name, _whole_number(name, value, least))
        if not isinstance(self.family, str | None):
            raise TypeError(f"family must be a name or None, not {self.family!r}")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")

    def _check_tokens(self) -> None:
        """Check what types that reduce tokens have: `ratio` and `method_options`."""
        given: Any = self
        ratio = _number("ratio", given.ratio)
        if not 0.0 <= ratio < 1.0:
            raise ValueError(
                f"ratio {ratio} is outside [0, 1): it is the fraction of tokens removed, 0.5 halves them"
            )
        object.__setattr__(self, "ratio", ratio)
        if not isinstance(given.method_options, Mapping):
            raise TypeError(
                "method_options are options by name, such as {'source': 'change'}, not "
                f"{given.method_options!r}"
            )
        # As JSON has them, so that a configuration read back is equal.
        options = {name: _plain(value) for name, value in dict(given.method_options).items()}
        object.__setattr__(self, "method_options", options)

    def replace(self: AnyConfig, **changes: Any) -> AnyConfig:
        """Copy the configuration with some fields changed, and validate it again."""
        self.check_field_names(changes)
        return type(self)(
            **{item.name: getattr(self, item.name) for item in fields(self)} | changes
        )

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of the options."""
        return [item.name for item in fields(cls)]

    @classmethod
    def check_field_names(cls, names: Iterable[str]) -> None:
        """Raise ValueError naming the closest option unless all are options of this type."""
        for name in names:
            one_of(f"option of {cls.__name__}", name, cls.field_names())

    def to_json(self) -> str:
        """Write the configuration as a JSON object with its type and version."""
        state = {"type": type(self).__name__, "version": VERSION, "data": asdict(self)}
        return json.dumps(state, indent=2) + "\n"

    @classmethod
    def from_json(cls: type[AnyConfig], text: str) -> AnyConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is no such JSON object, of another type or of another version.
        """
        try:
            state = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"the text is no JSON, where {error}; write it with {cls.__name__}.save"
            ) from error
        if not isinstance(state, dict):
            raise ValueError(f"a {cls.__name__} is a JSON object, not a {type(state).__name__}")
        if unknown := sorted({*state} - {"type", "version", "data"}):
            raise ValueError(
                f'a {cls.__name__} has "type", "version" and "data", and the text also '
                f'{", ".join(map(repr, unknown))}; options stand under "data"'
            )
        kind, version, data = (state.get(name) for name in ("type", "version", "data"))
        if kind != cls.__name__:
            holds = "names no type" if kind is None else f"holds a {kind}"
            raise ValueError(f"the text {holds}, not a {cls.__name__}; read it with its own type")
        if type(version) is not int or version != VERSION:
            later = type(version) is int and version > VERSION
            raise ValueError(
                f"the text has version {version!r} of {cls.__name__}, and this reads version {VERSION}; "
                + ("update tofu_diffusers" if later else f"write it anew with {cls.__name__}.save")
            )
        if not isinstance(data, dict):
            raise ValueError(f'the text has no options of a {cls.__name__} under "data"')
        cls.check_field_names(data)
        return cls(**data)

    def save(self, folder: str | Path) -> Path:
        """Write the configuration into a folder, such as a saved pipeline's; returns the file's path."""
        path = Path(folder) / self.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls: type[AnyConfig], folder: str | Path) -> AnyConfig:
        """Read the configuration from a folder.

        Raises:
            FileNotFoundError: if the folder holds none of this type.
            ValueError: if the file is damaged, of another type or of another version.
        """
        path = Path(folder) / cls.file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"no {cls.file_name} in {folder}; write one with {cls.__name__}.save"
            )
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class DenoiserConfig(Config):
    """What the workflows of denoisers have: a bound on caches, and options that a profile fills in."""

    memory_limit: float | None = field(default=None, kw_only=True)

    @abstractmethod
    def resolved(self, profile: Mapping[str, Any]) -> DenoiserConfig:
        """Take the options that are not given from a profile's fields."""

    def _check_common(self) -> None:
        super()._check_common()
        if self.memory_limit is not None:
            limit = _number("memory_limit", self.memory_limit)
            if not limit > 0:
                raise ValueError(f"memory_limit {limit:g} GiB must be above 0; None sets no limit")
            object.__setattr__(self, "memory_limit", limit)


@dataclass(frozen=True)
class TokenReduction(DenoiserConfig):
    """Merge or prune image tokens inside every denoising step, and unmerge them behind.

    An option that is None is taken from the token profile of the denoiser's family, which was measured to
    drift least; where a `method` is named, it is that method's own, or what its line below says.

    Args:
        ratio: Fraction of the image tokens removed, in [0, 1). Higher is faster and drifts more.
        method: Which tokens go: a name of `tofu_diffusers.METHODS`.
        method_options: Options of the method, by name.
        merge: What a kept token becomes: "prune" (it stays as it is), "mean" of its group, or "mlerp" (the
            mean's direction at the largest norm of the group).
        unmerge: What a removed token gets back: a name of `tofu_diffusers.UNMERGES`. "copy" and "mlerp"
            need no past; "temporal", "taylor" and "blend" reuse a token's earlier updates and drift less.
        corrector: Whether the latents of a token are corrected when it is computed again, by what was
            predicted for it in between. Drifts less; costs four numbers a latent. Else False.
        scope: Around what tokens shrink: "attention", "block" or "span" (all blocks of a stack). Larger is
            faster. Else "block".
        keys_values: What attention sees of removed tokens: "dropped" (nothing); "fresh" (keys and values of
            their current state); "cached" (those of when they were last computed). "fresh" drifts least and
            saves least. Else "dropped".
        schedule: Factor on the ratio over the noise level (position 0: pure noise, 1: clean image). A
            `Schedule` or what `Schedule.of` takes.
        depth_schedule: The same over the depth (0: first block, 1: last block).
        warmup_steps: Steps at the start that compute all tokens. More drift less and save less. Else 0, or as
            many as the method needs.
        cooldown_steps: Steps at the end that compute all tokens, which takes back what was forecast wrongly
            before. More drift less and save less. Else 0.
        first_blocks, last_blocks: Blocks at the start and the end that compute all tokens.
        share: Which blocks share a plan within a step: each "block" has its own, a "stack" of blocks has one,
            or all blocks of a "resolution" (a token grid) have one. Else "stack".
        share_plan: Whether all images of a batch share one plan, made from all of them. Where positions have
            no batch axis (FLUX, Qwen-Image) images run one after another in the reduced blocks otherwise.
        reuse: Denoising steps that a plan is used for.
        resolutions: Resolutions of a UNet to act on (0: the finest); None: all.
        min_tokens: Token grids smaller than this are not reduced.
        max_age: Steps after which an earlier update counts as too old to be reused; 0: no bound. Else 0.
        memory_limit: Most GiB that caches may take; None: no limit.
        seed: Of the methods that draw; the global generator is never touched.
        family: Family of the denoiser by name; None: found from its class.

    Raises:
        TypeError: if a number is not a number.
        ValueError: if a value is unknown, out of range, or does not go with another.
    """

    file_name: ClassVar[str] = "token_reduction.json"
    whole_numbers: ClassVar[Mapping[str, int]] = {
        "warmup_steps": 0, "cooldown_steps": 0, "first_blocks": 0, "last_blocks": 0, "min_tokens": 0,
        "reuse": 1, "max_age": 0, "seed": 0,
    }  # fmt: skip
    without_profile: ClassVar[Mapping[str, Any]] = {
        "corrector": False, "scope": "block", "keys_values": "dropped", "share": "stack",
        "warmup_steps": 0, "cooldown_steps": 0, "max_age": 0,
    }  # fmt: skip
    """What options are, where a method is named, if they are not given."""

    ratio: float = 0.5
    method: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    merge: str | None = None
    unmerge: str | None = None
    corrector: bool | None = None
    scope: str | None = None
    keys_values: str | None = None
    schedule: Schedule = Schedule()
    depth_schedule: Schedule = Schedule()
    warmup_steps: int | None = None
    cooldown_steps: int | None = None
    first_blocks: int = 0
    last_blocks: int = 0
    share: str | None = None
    share_plan: bool = False
    reuse: int = 1
    resolutions: tuple[int, ...] | None = None
    min_tokens: int = 0
    max_age: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_tokens()
        for name in ("schedule", "depth_schedule"):
            try:
                object.__setattr__(self, name, Schedule.of(getattr(self, name)))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
        choices: dict[str, Iterable[str]] = {
            "merge": MERGES,
            "unmerge": UNMERGES,
            "scope": SCOPES,
            "share": SHARES,
            "keys_values": KEYS_VALUES,
        }
        for name, valid in choices.items():
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), valid)
        self._check_flags("share_plan", *(["corrector"] if self.corrector is not None else []))
        self._check_common()
        if self.resolutions is not None:
            given = self.resolutions
            if isinstance(given, str | bytes) or not isinstance(given, Iterable):
                raise TypeError(f"resolutions are whole numbers, such as (0, 1), not {given!r}")
            numbers = tuple(_whole_number("resolutions", each, 0) for each in given)
            object.__setattr__(self, "resolutions", numbers)
        if self.method is not None:
            for name, value in self.without_profile.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
            self._check_method()
            self._check_combination()

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to a family's profile."""
        return self.method is not None

    def resolved(self, profile: Mapping[str, Any]) -> TokenReduction:
        """Take the options that are not given from a profile's fields, unless a method is named.

        Raises:
            ValueError: if given options do not go with the profile's.
        """
        if self.is_resolved:
            return self
        given = {name: getattr(self, name) for name in self.field_names()}
        empty = {name: value for name, value in given.items() if value is None or value == {}}
        taken = {name: profile[name] for name in profile if name in empty}
        try:
            return TokenReduction(**given | taken)
        except ValueError as error:
            names = ", ".join(f"{name} {value!r}" for name, value in taken.items())
            way = "; name a method to start from its own options instead, such as method='tofu'"
            raise ValueError(
                f"{error}. Not given, and so taken from the family's profile, are {names}"
                f"{'' if isinstance(error, RatioTooHighError) else way}"
            ) from error

    def _check_method(self) -> None:
        limit = self.make_method().max_ratio
        if self.ratio > limit:
            raise RatioTooHighError(
                f"ratio {self.ratio:g} exceeds {limit:g}, the most method {self.method!r} can remove with "
                f"options {dict(self.method_options)}; lower the ratio to at most that, or change the options"
            )

    @property
    def _cached_unmerges(self) -> set[str]:
        """Of its unmerges, those that reuse earlier updates."""
        return {name for name in self.unmerges if UNMERGES[name].cached}

    def _check_combination(self) -> None:
        prunes = self.merges == {"prune"}
        cached = self._cached_unmerges
        needs_prune = [
            f"keys_values {self.keys_values!r}" if self.keys_values != "dropped" else "",
            f"unmerge {min(cached)!r}" if cached else "",
            "corrector True" if self.corrector else "",
        ]
        if any(needs_prune) and not prunes:
            what = next(filter(None, needs_prune))
            merge = repr(self.merge) if self.merge else f"the own one of method {self.method!r}"
            raise ValueError(
                f"{what} needs merge 'prune' at every site (a merged token has no state of its own to keep), "
                f"not {merge}; pass merge='prune'"
            )
        if self.scope == "span" and self.keys_values == "fresh":
            raise ValueError(
                "scope 'span' cannot have keys_values 'fresh': inside a span removed tokens have no current "
                "state; use scope 'block', or keys_values 'cached'"
            )
        if self.scope == "span" and self.share == "block":
            raise ValueError(
                "scope 'span' needs one plan a stack; use share 'stack' or 'resolution', or scope 'block'"
            )

    def make_method(self) -> Method:
        """Make the method with its options.

        Raises:
            ValueError: on an unknown method or option.
        """
        options = dict(self.method_options)
        method = make_method(str(self.method), **options)
        if self.max_age and method.bounds_age:
            # The choice must keep the bound that the unmerge assumes.
            options.setdefault("max_age", self.max_age)
            method = make_method(str(self.method), **options)
        return method

    def merge_at(self, depth: float) -> str:
        """The merge at a depth in [0, 1]: the option, or else the method's own."""
        return self.merge or self.make_method().merge(depth)

    def unmerge_at(self, depth: float) -> str:
        """The unmerge at a depth in [0, 1]: the option, or else the method's own."""
        return self.unmerge or self.make_method().unmerge(depth)

    @property
    def merges(self) -> set[str]:
        """All merges, of whatever depth."""
        return {self.merge_at(depth) for depth in (0.0, *self.make_method().merge_changes)}

    @property
    def unmerges(self) -> set[str]:
        """All unmerges, of whatever depth."""
        return {self.unmerge_at(depth) for depth in (0.0, *self.make_method().merge_changes)}

    def ratio_at(self, position: float, depth: float) -> float:
        """The ratio at a noise level (0: pure noise, 1: clean image) and a depth, by the schedules."""
        factor = self.schedule.factor(position) * self.depth_schedule.factor(depth)
        return self.ratio * (factor if factor == 1.0 else quantise(factor))

    @property
    def past_needed(self) -> int:
        """Steps that must compute all tokens until there is a past."""
        return max(self.make_method().warmup, int(self.keys_values == "cached"))

    @property
    def steps_needed(self) -> int:
        """Steps that must compute all tokens first: as asked, and until there is a past."""
        return max(self.warmup_steps or 0, self.past_needed)

    @property
    def needs_steps(self) -> list[str]:
        """Why this configuration must know the denoising step; empty if each call can stand alone."""
        method = self.make_method()
        reasons = {
            f"unmerge {self.unmerge_at(0.0)!r}": bool(self._cached_unmerges),
            "corrector True": bool(self.corrector),
            f"keys_values {self.keys_values!r}": self.keys_values == "cached",
            f"method {self.method!r} (source {', '.join(method.sources)})": method.warmup > 0,
            f"schedule {self.schedule.kind!r}": not self.schedule.is_constant,
            "warmup_steps and cooldown_steps": (self.warmup_steps or 0) + (self.cooldown_steps or 0)
            > 0,
            f"reuse {self.reuse}": self.reuse > 1,
        }
        return [reason for reason, holds in reasons.items() if holds]


@dataclass(frozen=True)
class StepSkipping(DenoiserConfig):
    """Skip the denoiser at some steps, and forecast its output there from the steps it computed.

    An option that is None is taken from the profile of the denoiser's family.

    Args:
        speedup: How many times fewer FLOPs of the denoiser: of N steps at most N / speedup are computed, but
            never fewer than the warm-up and one more. Higher is faster and drifts more; 1 skips nothing.
        warmup_steps: Steps at the start that are computed, the first one in any case. More drift less early
            and leave fewer for later.
        cooldown_steps: Steps at the end that are computed.
        rule: Which of the others are skipped: a name of `tofu_diffusers.SKIP_RULES`.
        trajectory: How the denoiser's outputs change along a generation: rule "trajectory" plans by it, and
            forecasts are fitted to it.
        fitted: Steps and forecasts that `tune` fitted to a pipeline. They are for generations of these very
            steps; in others, speedup, rule and order count.
        order: Of the forecast: 0 repeats the last computed output, 1 extrapolates the last two (with a
            trajectory by least squares, else linearly), or repeats the only one.
        corrector: Whether the latents are corrected at the next computed step by half of what the forecasts
            before it turn out to have missed. Drifts less and costs next to nothing; does nothing with order
            0.
        memory_limit: Most GiB that caches may take; None: no limit.
        family: Family of the denoiser by name; None: found from its class.

    Raises:
        TypeError: if a number is not a number.
        ValueError: if a value is unknown or out of range.
    """

    file_name: ClassVar[str] = "step_skipping.json"
    whole_numbers: ClassVar[Mapping[str, int]] = {
        "warmup_steps": 0,
        "cooldown_steps": 0,
        "order": 0,
    }

    speedup: float = 2.0
    warmup_steps: int | None = None
    cooldown_steps: int = 0
    rule: str | None = None
    trajectory: Trajectory | None = None
    fitted: FittedForecasts | None = None
    order: int = 1
    corrector: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "speedup", checked_speedup(self.speedup))
        self._check_common()
        if self.order > 1:
            raise ValueError(f"order {self.order} is above 1; choose 0 (repeat) or 1 (extrapolate)")
        if self.rule is not None:
            one_of("rule", self.rule, SKIP_RULES)
        if self.trajectory is not None:
            object.__setattr__(self, "trajectory", Trajectory.of(self.trajectory))
        if self.fitted is not None:
            object.__setattr__(self, "fitted", FittedForecasts.of(self.fitted))
            self._check_fitted(self.fitted)
        self._check_flags("corrector")

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to a family's profile."""
        planned = self.rule != "trajectory" or self.trajectory is not None
        return self.rule is not None and self.warmup_steps is not None and planned

    def resolved(self, profile: Mapping[str, Any]) -> StepSkipping:
        """Take the options that are not given from a profile's fields."""
        given = {name: getattr(self, name) for name in self.field_names()}
        taken = {name: value for name, value in profile.items() if given[name] is None}
        if (self.rule or taken["rule"]) != "trajectory":
            taken.pop("trajectory", None)
        return StepSkipping(**given | taken)

    def _check_fitted(self, fitted: FittedForecasts) -> None:
        """Raise ValueError if steps must be computed that were fitted to be skipped."""
        total, cooldown = len(fitted.levels), self.cooldown_steps or 0
        must = {*range(self.steps_needed), *range(total - cooldown, total)}
        if not must <= {*fitted.computed}:
            raise ValueError(
                f"warmup_steps {self.steps_needed} and cooldown_steps {cooldown} ask for steps that the "
                f"fitted forecasts skip (of {total} they compute {', '.join(map(str, fitted.computed))}); "
                "leave them out, or fitted"
            )

    @property
    def steps_needed(self) -> int:
        """Steps that must be computed before one can be skipped."""
        return max(self.warmup_steps or 0, 1)


@dataclass(frozen=True)
class EncoderReduction(Config):
    """Merge or prune the tokens of an image or text encoder, more of them from block to block.

    They leave between a block's attention and its feed-forward, matched by the attention's keys, and do not
    come back: behind the last block each has the row of the kept token that it went into (Bolya et al.,
    arXiv 2210.09461).

    Args:
        ratio: Fraction of the tokens that have left behind the last block, in [0, 1), of those that may
            leave. Higher is faster and drifts more.
        method: Which tokens go: a name of `tofu_diffusers.METHODS`.
        method_options: Options of the method, by name.
        merge: What a kept token becomes: "prune", "mean" or "mlerp", weighted by the tokens that are already
            in each. None: the method's own, which may change with the depth.
        schedule: "constant": the same number leaves at every block (ToMe); "share": the same share of those
            that are left (PiToMe), which removes more early, is faster and drifts more. Or a weight of
            every block, 0 or more, such as `learn_schedule` finds: with w the weight of a block and W the sum
            of all, the share (1 - ratio) ** (w / W) of the tokens that are left stays there. Equal weights
            are "share".
        proportional_attention: Whether a token weighs as many as went into it, merged or pruned, in the
            attention of the blocks behind. False: one each, so that what is pruned counts nothing.
        first_block: Blocks before this one let no token leave. Higher drifts less and saves less.
        seed: Of the methods that draw; the global generator is never touched.
        family: Family of the encoder by name; None: found from its class.

    Raises:
        TypeError: if a number is not a number.
        ValueError: if a value is unknown, out of range, or needs denoising steps.
    """

    file_name: ClassVar[str] = "encoder_reduction.json"
    whole_numbers: ClassVar[Mapping[str, int]] = {"first_block": 0, "seed": 0}

    ratio: float = 0.5
    method: str = "tome"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    merge: str | None = None
    schedule: str | tuple[float, ...] = "constant"
    proportional_attention: bool = True
    first_block: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_tokens()
        self._check_common()
        self._check_flags("proportional_attention")
        if isinstance(self.schedule, str):
            one_of("schedule", self.schedule, ENCODER_SCHEDULES)
        else:
            self._check_weights()
        if self.merge is not None:
            one_of("merge", self.merge, MERGES)
        method = self.make_method()
        sources = [name for name in method.sources if SOURCES[name].score is None]
        ages = [name for name in ("max_age", "age_exponent") if self.method_options.get(name)]
        if sources or ages:
            what = f"source {sources[0]!r}" if sources else f"option {ages[0]!r}"
            raise ValueError(
                f"{what} of method {self.method!r} needs denoising steps, and an encoder has none; leave it "
                "out, or choose a source that is read of the tokens: method_options={'source': 'attention'} "
                "or 'key_norm'"
            )

    def make_method(self) -> Method:
        """Make the method with its options.

        Raises:
            ValueError: on an unknown method or option.
        """
        return make_method(self.method, **self.method_options)

    def merge_at(self, depth: float) -> str:
        """The merge at a depth in [0, 1]: the option, or else the method's own."""
        return self.merge or self.make_method().merge(depth)

    def _check_weights(self) -> None:
        """Check a schedule of weights."""
        given: Any = self.schedule
        try:
            weights = tuple(_number("a weight of schedule", each) for each in given)
        except TypeError as error:
            raise TypeError(
                f"schedule must be one of {', '.join(ENCODER_SCHEDULES)} or a weight of every block, not "
                f"{given!r}"
            ) from error
        if not weights or not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise ValueError(
                f"schedule is {weights}; give a weight of every block, 0 or more, and one above 0"
            )
        if self.first_block:
            raise ValueError(
                f"first_block {self.first_block} and a schedule of weights both say where tokens leave; "
                "leave first_block out, and give the first blocks weight 0"
            )
        object.__setattr__(self, "schedule", weights)

    def removed(self, tokens: int, blocks: int) -> list[int]:
        """How many of so many tokens leave at each block."""
        acting = max(0, blocks - self.first_block)
        whole = int(tokens * self.ratio)
        if isinstance(self.schedule, str):
            done = [0.0] * (blocks - acting) + [i / max(1, acting) for i in range(acting + 1)]
        else:
            done = [part / sum(self.schedule) for part in accumulate(self.schedule, initial=0.0)]
        if self.schedule == "constant":
            gone = [round(whole * part) for part in done]
        else:
            stay = 1.0 - whole / max(1, tokens)
            gone = [round(tokens * (1.0 - stay**part)) for part in done]
        return [after - before for before, after in pairwise(gone)]


CONFIGS: tuple[type[DenoiserConfig], ...] = (TokenReduction, StepSkipping)


def checked_speedup(value: object) -> float:
    """A speed-up as a float.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is below 1, infinite or NaN.
    """
    speedup = _number("speedup", value)
    if not 1.0 <= speedup < math.inf:
        raise ValueError(
            f"speedup {speedup} is below 1 or no number: 2.0 halves the FLOPs, 1 skips nothing"
        )
    return speedup


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _plain(value: Any) -> Any:
    """Turn an option's value into what JSON has for it."""
    if isinstance(value, tuple):
        return list(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_whole(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")


def _whole_number(name: str, value: Any, least: int) -> int:
    check_whole(name, value)
    whole = int(value)
    if whole < least:
        raise ValueError(f"{name} {whole} is below {least}")
    if whole > MAX_WHOLE:
        raise ValueError(f"{name} {whole} is above {MAX_WHOLE}, the largest of 64 bits")
    return whole
