"""What tofu did: tokens per site, FLOPs saved, memory held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..profiles import origin
from ..runtime.generation import Generation, StepRecord
from ..runtime.setup import Setup
from ..runtime.sites import Site
from .flops import count

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
    """Steps of a denoiser whose steps are skipped, and how many of them it computed."""

    denoiser: str
    steps: int
    computed: int


@dataclass(frozen=True)
class Summary:
    """Result of `handle.summary()`; its str() is a table.

    Attributes:
        rows: One a site around which tokens are reduced.
        steps: One a denoiser whose steps are skipped.
        flops_whole: FLOPs of the denoiser over the generation's steps without tofu.
        flops_run: The same with tofu.
        cache_bytes: Most that cached updates, keys and values took; freed when a generation ends.
        nominal: Whether no generation has run yet, and the figures are those of a typical one.
        settings: A line on each configuration, and the family.
    """

    rows: tuple[Row, ...]
    steps: tuple[StepCount, ...]
    flops_whole: int
    flops_run: int
    cache_bytes: int
    nominal: bool
    settings: str

    @property
    def speedup(self) -> float:
        """How many times fewer FLOPs of the denoiser: what was reached, not what was asked for."""
        return self.flops_whole / self.flops_run

    @property
    def flops_saved(self) -> float:
        """Share of the denoiser's FLOPs saved over the generation, in [0, 1)."""
        return 1.0 - self.flops_run / self.flops_whole

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
        lines += [f"{s.denoiser}: computed {s.computed} of {s.steps} steps" for s in self.steps]
        when = "nominal, no generation yet" if self.nominal else "last generation"
        lines += [
            self.settings,
            f"denoiser FLOPs ({when}): {self.flops_whole / 1e9:.2f} G -> {self.flops_run / 1e9:.2f} G, "
            f"{100 * self.flops_saved:.1f} % saved ({self.flops_whole / self.flops_run:.2f}x)",
            f"caches: {self.cache_bytes / 2**20:.1f} MiB",
        ]
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
    whole = run = held = 0
    nominal = not any(generation.steps() for _, generation in generations)
    for model, generation in generations:
        runtime, setup = generation.runtime, generation.runtime.setup
        steps = generation.steps()
        if nominal:
            steps = _nominal_steps(setup)
            runtime.call.grids = setup.family.grids(model, setup.family.example(model))
        if not steps:
            continue
        name = type(model).__name__
        rows += [
            Row(name, site.name, setup.scope, site.merge, site.unmerge, calls, tokens, kept / calls)
            for site, calls, tokens, kept in _counts(generation, steps)
        ]
        if setup.skipping is not None:
            computed = sum(not step.skipped for step in steps)
            skips.append(StepCount(name, len(steps), computed))
        weights = Counter[tuple[str, ...]]()
        for step in steps:
            if not step.skipped:
                weights[step.ratios] += step.calls
        unreduced = tuple("0.0" for _ in setup.sites)
        counts = count(model, runtime, {*weights, unreduced}, partial(attached, like=setup))
        whole += counts[unreduced] * sum(step.calls for step in steps)
        run += sum(counts[setting] * calls for setting, calls in weights.items())
        held += runtime.caches.peak_bytes
    first = generations[0][1].runtime.setup
    settings = "\n".join([*_settings(first), f"family {first.family.name}"])
    return Summary(tuple(rows), tuple(skips), whole, run, held, nominal, settings)


def _counts(
    generation: Generation, steps: list[StepRecord]
) -> Iterator[tuple[Site, int, int, int]]:
    """Each site in use, its calls, its tokens a call, and the tokens it kept over all calls."""
    setup, call = generation.runtime.setup, generation.runtime.call
    steps = [step for step in steps if not step.skipped]
    calls = sum(step.calls for step in steps)
    for i, site in enumerate(setup.sites):
        if call.in_use(site) and site.resolution in call.grids:
            tokens = call.grids[site.resolution].tokens
            removed = sum(
                step.calls * setup.tokens_removed(tokens, step.ratios[i]) for step in steps
            )
            yield site, calls, tokens, calls * tokens - removed


def _nominal_steps(setup: Setup) -> list[StepRecord]:
    """The steps of a typical generation."""
    if not setup.needs:
        return [StepRecord(1, setup.settings_at(0, 0, []).ratios)]
    noise = [1.0 - i / NOMINAL_STEPS for i in range(NOMINAL_STEPS)]
    steps: list[StepRecord] = []
    for i in range(NOMINAL_STEPS):
        computed = sum(not step.skipped for step in steps)
        settings = setup.settings_at(i, computed, noise)
        steps.append(StepRecord(1, settings.ratios, settings.skip))
    return steps


def _settings(setup: Setup) -> list[str]:
    """A line on each configuration, and where it is from."""
    lines, family = [], setup.family.name
    if setup.reduction is not None:
        tokens = setup.reduction
        corrected = ", corrector" if tokens.corrector else ""
        without = " (without memory: few steps, or one call alone)" if setup.stands_in else ""
        lines.append(
            f"TokenReduction: ratio {tokens.ratio:g}, method {tokens.method}, keys_values "
            f"{tokens.keys_values}, scope {tokens.scope}{corrected}{origin(family, tokens)}{without}"
        )
    if setup.skipping is not None:
        steps = setup.skipping
        corrected = ", corrector" if steps.corrector and steps.order else ""
        lines.append(
            f"StepSkipping: speedup {steps.speedup:g}, rule {steps.rule}, {steps.steps_needed} warm-up "
            f"steps, order {steps.order}{corrected}{origin(family, steps)}"
        )
    return lines
