"""What tofu did: tokens per site, FLOPs saved, memory held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..config import StepSkipping, TokenReduction
from ..profiles import origin
from ..runtime.generation import Generation, StepRecord
from ..runtime.setup import Setup
from ..runtime.sites import Site
from ..steps.sampler import Sampling
from .flops import UncountedError, count

NOMINAL_STEPS = 25


@dataclass(frozen=True)
class Row:
    """One site (attention, block or span): tokens of one image per call, averaged over the calls."""

    denoiser: str
    name: str
    scope: str
    merge: str
    unmerge: str
    calls: int
    tokens_in: int
    tokens_kept: float


@dataclass(frozen=True)
class StepCount:
    """Steps of a denoiser whose steps are skipped, and how many of them it computed.

    Attributes:
        plan: A sign a step: "#" was computed, "." skipped.
    """

    denoiser: str
    steps: int
    computed: int
    plan: str


@dataclass(frozen=True)
class TextCount:
    """Text tokens of a denoiser that was to drop their padding, in one call of a step.

    Attributes:
        tokens: How many a prompt was given with, all its texts together.
        dropped: How many of them left the sequence.
    """

    denoiser: str
    tokens: int
    dropped: int


@dataclass(frozen=True)
class Summary:
    """Result of `handle.summary()`; its str() is a table.

    Attributes:
        rows: One a site around which tokens are reduced.
        steps: One a denoiser whose steps are skipped.
        flops_unreduced: FLOPs of the denoiser over the generation's steps without tofu; where they could not
            be counted, and only steps are skipped, its calls.
        flops_run: The same with tofu.
        uncounted: Why FLOPs were not counted; empty if they were.
        cache_bytes: Most that cached updates, keys and values took; freed when a generation ends.
        nominal: Whether no generation has run yet, and the figures are those of a typical one.
        settings: A line on each configuration, and the family.
        encoder: Whether it is of an encoder, and of its last call, instead of a denoiser and a generation.
        texts: One a call of a step, where padding is dropped. FLOPs of a compiled denoiser, which are those
            of a typical size, do not show it.
    """

    rows: tuple[Row, ...]
    steps: tuple[StepCount, ...]
    flops_unreduced: int
    flops_run: int
    uncounted: str
    cache_bytes: int
    nominal: bool
    settings: str
    encoder: bool = False
    texts: tuple[TextCount, ...] = ()

    @property
    def speedup(self) -> float:
        """How many times fewer FLOPs of the denoiser: what was reached, not what was asked for."""
        return self.flops_unreduced / self.flops_run

    @property
    def flops_saved(self) -> float:
        """Share of the denoiser's FLOPs saved over the generation, in [0, 1)."""
        return 1.0 - self.flops_run / self.flops_unreduced

    def _amounts(self, when: str) -> str:
        if self.uncounted:
            return (
                f"denoiser calls ({when}; FLOPs are not counted: {self.uncounted}): "
                f"{self.flops_unreduced} -> {self.flops_run}"
            )
        model = "encoder" if self.encoder else "denoiser"
        return f"{model} FLOPs ({when}): {self.flops_unreduced / 1e9:.2f} G -> {self.flops_run / 1e9:.2f} G"

    def __str__(self) -> str:
        header = ("site", "scope", "merge", "unmerge", "calls", "tokens", "kept")
        table = [
            (
                r.name,
                r.scope,
                r.merge,
                r.unmerge,
                str(r.calls),
                str(r.tokens_in),
                f"{r.tokens_kept:.1f}",
            )
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, *table]
        ]
        if not table:
            lines = []
        lines += [
            f"{s.denoiser}: computed {s.computed} of {s.steps} steps  {s.plan}  (#: computed)"
            for s in self.steps
        ]
        lines += [
            f"{t.denoiser}: dropped {t.dropped} of {t.tokens} text tokens" for t in self.texts
        ]
        run = "call" if self.encoder else "generation"
        when = f"nominal, no {run} yet" if self.nominal else f"last {run}"
        lines += [
            self.settings,
            f"{self._amounts(when)}, {100 * self.flops_saved:.1f} % saved ({self.speedup:.2f}x)",
        ]
        if not self.encoder:
            lines.append(f"caches: {self.cache_bytes / 2**20:.1f} MiB")
        return "\n".join(lines)


def site_stats(generation: Generation) -> list[dict[str, Any]]:
    """A dict a site: name, scope, calls, and tokens in and kept of one image, summed over the calls."""
    return [
        {
            "name": site.name,
            "scope": generation.runtime.setup.scope,
            "calls": calls,
            "tokens_in": calls * tokens,
            "tokens_kept": kept,
        }
        for site, calls, tokens, kept in _counts(generation, generation.steps())
    ]


def summarise(
    generations: list[tuple[nn.Module, Generation]],
    attached: Callable[..., Generation],
) -> Summary:
    """Sum up all denoisers of a pipeline.

    Args:
        attached: `attached(model, like=setup)` puts the same tofu on a copy and returns its generation.
    """
    rows: list[Row] = []
    skips: list[StepCount] = []
    texts: list[TextCount] = []
    whole = run = held = calls = computed_calls = 0
    uncounted = ""
    nominal = not any(generation.steps() for _, generation in generations)
    for model, generation in generations:
        runtime, setup = generation.runtime, generation.runtime.setup
        steps = generation.steps()
        if nominal:
            steps = _nominal_steps(setup)
            example = setup.family.example(model)
            runtime.call.grids = {} if example is None else setup.family.grids(model, example)
        if not steps:
            continue
        name = type(model).__name__
        rows += [
            Row(name, site.name, setup.scope, site.merge, site.unmerge, calls, tokens, kept / calls)
            for site, calls, tokens, kept in _counts(generation, steps)
        ]
        if any(isinstance(each, StepSkipping) for each in setup.configs):
            computed = sum(not step.skipped for step in steps)
            plan = "".join("." if step.skipped else "#" for step in steps)
            skips.append(StepCount(name, len(steps), computed, plan))
        texts += [TextCount(name, *each) for each in runtime.text.counts.values()]
        weights = Counter[tuple[str, ...]]()
        for step in steps:
            if step.ran:
                weights[step.ratios] += step.ran * step.batch
        unreduced = tuple("0.0" for _ in setup.sites)
        calls += sum(step.calls for step in steps)
        computed_calls += sum(step.ran for step in steps)
        held += runtime.caches.peak_bytes
        try:
            counts = count(model, runtime, {*weights, unreduced}, partial(attached, like=setup))
        except UncountedError as error:
            if setup.reduction is not None:
                raise UncountedError(f"FLOPs of {name} cannot be counted: {error}") from error
            uncounted = uncounted or f"{name}, {error}"
            continue
        # Counted with the last call's rows; earlier ones may have had more or fewer.
        last = steps[-1].batch
        whole += counts.whole * sum(step.calls * step.batch for step in steps) // last
        run += sum(counts.at[setting] * rows for setting, rows in weights.items()) // last
    if uncounted:
        whole, run = calls, computed_calls
    first = generations[0][1]
    family = first.runtime.setup.family.name
    settings = "\n".join([*_settings(first), f"family {family}"])
    return Summary(
        tuple(rows),
        tuple(skips),
        whole,
        run,
        uncounted,
        held,
        nominal,
        settings,
        texts=tuple(texts),
    )


def _counts(
    generation: Generation, steps: list[StepRecord]
) -> Iterator[tuple[Site, int, int, int]]:
    """Each site in use, its calls, its tokens a call, and the tokens it kept over all calls."""
    setup, call = generation.runtime.setup, generation.runtime.call
    calls = sum(step.ran for step in steps)
    for i, site in enumerate(setup.sites):
        if call.in_use(site) and site.resolution in call.grids:
            grid = call.grids[site.resolution]
            tokens = grid.tokens
            removed = sum(
                step.ran * generation.runtime.tokens_removed(grid, step.ratios[i]) for step in steps
            )
            yield site, calls, tokens, calls * tokens - removed


def _nominal_steps(setup: Setup) -> list[StepRecord]:
    """The steps of a typical generation."""
    if not setup.needs:
        return [StepRecord(1, setup.settings_at(0, 0, Sampling()).ratios)]
    sampling = Sampling.evenly(NOMINAL_STEPS)
    steps: list[StepRecord] = []
    for i in range(NOMINAL_STEPS):
        computed = sum(not step.skipped for step in steps)
        settings = setup.settings_at(i, computed, sampling)
        steps.append(StepRecord(1, settings.ratios, settings.skip))
    return steps


def _settings(generation: Generation) -> list[str]:
    """A line on each configuration, and where it is from."""
    runtime = generation.runtime
    setup, fitted = runtime.setup, runtime.setup.fitted(generation.sampling)
    lines, family = [], setup.family.name
    if setup.drop_text_padding:
        why_not = runtime.text.why_not
        lines.append(f"drop_text_padding{': ' if why_not else ''}{why_not}")
    for config in setup.configs:
        if isinstance(config, TokenReduction):
            corrected = ", corrector" if config.corrector else ""
            without = " (without memory: few steps, or one call alone)" if setup.stands_in else ""
            lines.append(
                f"TokenReduction: ratio {config.ratio:g}, method {config.method}, keys_values "
                f"{config.keys_values}, scope {config.scope}{corrected}{origin(family, config)}{without}"
            )
            lines += [f"it removes {words}" for words in runtime.short_of()]
        elif isinstance(config, StepSkipping):
            corrected = ", corrector" if config.corrector and config.order else ""
            how = (
                f"rule {config.rule}, {config.steps_needed} warm-up steps, order {config.order}"
                if fitted is None
                else f"fitted to these {len(fitted.levels)} steps"
            )
            lines.append(
                f"StepSkipping: speedup {config.speedup:g}, {how}{corrected}{origin(family, config)}"
            )
    return lines
