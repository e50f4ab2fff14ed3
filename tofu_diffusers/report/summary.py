"""What tofu did: tokens per site, FLOPs saved, memory held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..profiles import origin
from ..runtime.session import Session, StepRecord
from ..runtime.units import Unit
from .flops import count

NOMINAL_STEPS = 20


@dataclass(frozen=True)
class Row:
    """One unit (attention, block or span): tokens of one image per call, averaged over the calls."""

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
        rows: One a unit around which tokens are reduced.
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


def site_stats(session: Session) -> list[dict[str, Any]]:
    """A dict a unit: name, scope, calls, and tokens in and kept of one image, summed over the calls."""
    return [
        {
            "name": unit.name,
            "scope": session.scope,
            "calls": calls,
            "tokens_in": calls * tokens,
            "tokens_kept": kept,
        }
        for unit, calls, tokens, kept in _counts(session, session.steps())
    ]


def summarise(
    sessions: list[tuple[nn.Module, Session]],
    attached: Callable[..., Session],
) -> Summary:
    """The summary over all denoisers of a pipeline.

    Args:
        attached: `attached(model, like=session)` puts the same tofu on a copy and returns its session.
    """
    rows: list[Row] = []
    skips: list[StepCount] = []
    whole = run = held = 0
    nominal = not any(session.steps() for _, session in sessions)
    for model, session in sessions:
        steps = session.steps()
        if nominal:
            steps = _nominal_steps(session)
            session.grids = session.family.grids(model, session.family.example(model))
        if not steps:
            continue
        rows += _rows(type(model).__name__, session, steps)
        if session.skipping is not None:
            computed = sum(not step.skipped for step in steps)
            skips.append(StepCount(type(model).__name__, len(steps), computed))
        weights = Counter[tuple[str, ...]]()
        for step in steps:
            if not step.skipped:
                weights[step.ratios] += step.calls
        unreduced = tuple("0.0" for _ in session.units)
        counts = count(model, session, {*weights, unreduced}, partial(attached, like=session))
        whole += counts[unreduced] * sum(step.calls for step in steps)
        run += sum(counts[setting] * calls for setting, calls in weights.items())
        held += session.held
    settings = "\n".join([*_settings(sessions[0][1]), f"family {sessions[0][1].family.name}"])
    return Summary(tuple(rows), tuple(skips), whole, run, held, nominal, settings)


def _rows(denoiser: str, session: Session, steps: list[StepRecord]) -> list[Row]:
    return [
        Row(
            denoiser,
            unit.name,
            session.scope,
            unit.merge,
            unit.unmerge,
            calls,
            tokens,
            kept / calls,
        )
        for unit, calls, tokens, kept in _counts(session, steps)
    ]


def _counts(session: Session, steps: list[StepRecord]) -> Iterator[tuple[Unit, int, int, int]]:
    """Each unit in use, its calls, its tokens a call, and the tokens it kept over all calls."""
    steps = [step for step in steps if not step.skipped]
    calls = sum(step.calls for step in steps)
    for i, unit in enumerate(session.units):
        if session.in_use(unit) and unit.level in session.grids:
            tokens = session.grids[unit.level].tokens
            removed = sum(step.calls * session.removal(tokens, step.ratios[i]) for step in steps)
            yield unit, calls, tokens, calls * tokens - removed


def _nominal_steps(session: Session) -> list[StepRecord]:
    """The steps of a typical generation, without disturbing the session."""
    if not session.needs:
        return [StepRecord(1, tuple(unit.ratio for unit in session.units))]
    index, done, noise, told = session.index, session.done, session.noise, session.told
    session.noise = [1.0 - i / NOMINAL_STEPS for i in range(NOMINAL_STEPS)]
    steps = []
    session.done, session.told = 0, True
    for i in range(NOMINAL_STEPS):
        session.index = i
        session._set_ratios()
        steps.append(StepRecord(1, tuple(unit.ratio for unit in session.units), session.skip))
        session.done += not session.skip
    session.index, session.done, session.noise, session.told = index, done, noise, told
    session._set_ratios()
    return steps


def _settings(session: Session) -> list[str]:
    """A line on each configuration, and where it is from."""
    lines = []
    if session.reduction is not None:
        each: Any = session.reduction
        corrected = ", corrector" if each.corrector else ""
        lines.append(
            f"TokenReduction: ratio {each.ratio:g}, method {each.method}, keys_values {each.keys_values}, "
            f"scope {each.scope}{corrected}{origin(session.family.name, each)}"
            f"{' (without memory: few steps, or one call alone)' if session.stands_in else ''}"
        )
    if session.skipping is not None:
        each = session.skipping
        corrected = ", corrector" if each.corrector else ""
        lines.append(
            f"StepSkipping: speedup {each.speedup:g}, rule {each.rule}, {each.steps_needed} warm-up steps, "
            f"order {each.order}{corrected}{origin(session.family.name, each)}"
        )
    return lines
