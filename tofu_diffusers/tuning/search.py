"""One search of `tune`: references, settings tried, forecasts fitted, and the comparison in the end."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from statistics import fmean
from typing import Any, TypeVar

from torch import distributed
from tqdm import tqdm

from ..api import Handle, apply_tofu, denoisers_of
from ..config import StepSkipping, TokenReduction
from ..families import ANY
from ..steps.fitted import FittedForecasts
from ..steps.sampler import Sampling
from ..steps.trajectory import Trajectory
from ..tuned import DEFAULT, FEWER, TUNED, Measured, Tuned
from .candidates import Candidate, candidates, default, fitted, raised
from .fit import Fit
from .ledger import Ledger, Score
from .references import Example, Generated, Reference, Workload, latents_db, psnr_db
from .trajectory import LEAST_STEPS, mean_trajectory

Found = TypeVar("Found")

RAISES = 3
"""How often a setting that reduces tokens may skip more steps until it reaches its speed-up."""

SAME_DB = 30.0
"""Of one generation twice: devices round differently from run to run, other weights make other latents."""

FITS = 3
"""Choices of steps that forecasts are fitted to, of those that did best without."""

BEHIND = 10**6
"""Turns from which on forecasts are fitted: behind all others."""


class Search:
    """One call of `tune`.

    Args:
        pipe: The pipeline.
        workload: How it is called.
        ledger: What was measured before.
        searched: To choose by.
        held_out: To compare on.
        behind_db: At which a setting is broken off.
        progress: Whether a bar is shown.
    """

    def __init__(
        self,
        pipe: Any,
        workload: Workload,
        ledger: Ledger,
        searched: list[Example],
        held_out: list[Example],
        behind_db: float,
        progress: bool,
    ) -> None:
        self.pipe, self.workload, self.ledger = pipe, workload, ledger
        self.searched, self.held_out, self.behind_db = searched, held_out, behind_db
        self.progress = progress and rank() == 0
        self.references: dict[Example, Reference] = {}
        self.left_out: dict[str, str] = {}
        self.counted: dict[str, float] = {}
        self.short_of: dict[float, float] = {}
        self.began = time.monotonic()

    def run(self, speedups: list[float], minutes: float) -> Tuned:
        """Search, compare, and sum up."""
        with self._bar(len(self.searched) + len(self.held_out), "references") as bar:
            self._refer(bar)
        paths = [self.references[each].path for each in self.searched]
        steps = len(paths[0].levels)
        trajectory = mean_trajectory(paths) if steps >= LEAST_STEPS else None
        found = denoisers_of(self.pipe)
        tokens = all(kind is not ANY for _, kind in found)
        late = self.began + 60 * minutes
        tried = self._tried(speedups, trajectory, tokens, late)
        sampling = self._sampling() if len(found) == 1 else None
        if sampling is not None:
            self._fit(tried, sampling, trajectory, late)
        # Of equals the one that was tried first.
        best = {
            speedup: max(scored, key=lambda each: (each.mean_db, -each.number))
            for speedup, scored in tried.items()
        }
        mine: dict[float, list[Measured]] = {}
        with self._bar(len(speedups), "held out") as bar:
            for number, (speedup, scored) in enumerate(best.items()):
                if number % processes() == rank():
                    mine[speedup] = self._compared(speedup, scored)
                bar.update()
        rows = {speedup: each for part in gathered(mine) for speedup, each in part.items()}
        choices, overfitted = {}, []
        for speedup, scored in best.items():
            plain = [each for each in tried[speedup] if each.candidate == default(speedup)]
            db = {row.kind: fmean(row.held_out_db) for row in rows[speedup]}
            # What was chosen of many is flattered where it was searched; both sets of prompts are few.
            won = scored.mean_db - plain[0].mean_db if plain else math.inf
            lost = db[DEFAULT] - db[TUNED] > won
            choices[speedup] = (default(speedup) if lost else scored.candidate).configs
            overfitted += [speedup] if lost else []
        left_out = {name: why for part in gathered(self.left_out) for name, why in part.items()}
        size = sum(each.nbytes for each in self.references.values())
        about = {
            "overfitted": overfitted,
            "pipeline": type(self.pipe).__name__,
            "scheduler": type(self.workload.scheduler).__name__,
            "steps": steps,
            "prompts": f"{len(self.searched)} searched on, {len(self.held_out)} kept apart",
            "settings generated on all prompts": sum(map(len, tried.values())),
            "references": f"{size / 2**20:.1f} MiB",
            **{f"left out, {name}": why for name, why in left_out.items()},
            "minutes": round((time.monotonic() - self.began) / 60, 1),
        }
        names = tuple(type(model).__name__ for model, _ in found)
        return Tuned(choices, tuple(row for each in best for row in rows[each]), names, about)

    def _refer(self, bar: tqdm[Any]) -> None:
        """Generate all references, or read them.

        The first one is generated again, to see that what was kept is of this very model, and that a prompt
        and a seed make one picture.
        """
        examples = [*self.searched, *self.held_out]
        files = [self.ledger.reference_file(number) for number in range(len(examples))]
        known = files[0].is_file()
        for number, (example, file) in enumerate(zip(examples, files, strict=True)):
            if number % processes() == rank() and not file.is_file():
                self.workload.reference(example, number >= len(self.searched), file)
            bar.update()
        if processes() > 1:
            distributed.barrier()
        for example, file in zip(examples, files, strict=True):
            self.references[example] = Reference.load(file)
        again = self.workload.generated(examples[0]).latents
        if latents_db(again, self.references[examples[0]].made.latents) < SAME_DB:
            raise ValueError(
                f"{self.ledger.folder} holds a search on another model: the first prompt's latents are "
                "others by now (weights, LoRA, dtype or inputs); choose another folder"
                if known or rank() > 0
                else "the first prompt, generated twice with one seed, has other latents: nothing can be "
                "compared; let generate=... pass on the generator that it is given"
            )

    def _tried(
        self,
        speedups: list[float],
        trajectory: Trajectory | None,
        tokens: bool,
        late: float,
    ) -> dict[float, list[Scored]]:
        """By speed-up, the settings that were generated on all prompts searched on; none that none reaches.

        Raises:
            ValueError: if no setting reaches any speed-up.
        """
        lists = {each: [default(each), *candidates(each, trajectory, tokens)] for each in speedups}
        # A place of each list by turns: whatever the time, each speed-up gets its share.
        each_own = (product([each], lists[each]) for each in lists)
        turns = list(chain.from_iterable(zip(*each_own, strict=True)))
        sure = 2 * len(speedups)  # the default and the own trajectory
        found: dict[float, list[Scored]] = {each: [] for each in speedups}
        with self._bar(len(turns), "search") as bar:
            for number, (speedup, candidate) in enumerate(turns):
                in_time = number < sure or time.monotonic() < late
                if in_time and number % processes() == rank():
                    # The first two of each are gone through: forecasts are fitted to their steps.
                    rivals = found[speedup] if number >= sure else []
                    scored = self._scored(candidate, speedup, number, rivals)
                    if scored is not None:
                        found[speedup].append(scored)
                        top = max(found[speedup], key=lambda each: each.mean_db)
                        bar.set_postfix_str(
                            f"{speedup:g}x: {top.mean_db:.1f} dB, {top.candidate.name}"
                        )
                bar.update()
        everyone: dict[float, list[Scored]] = {each: [] for each in speedups}
        for part, short_of in gathered((found, self.short_of)):
            for speedup, each in part.items():
                everyone[speedup] += each
            for speedup, flops in short_of.items():
                self.short_of[speedup] = max(flops, self.short_of.get(speedup, 1.0))
        reached = {speedup: each for speedup, each in everyone.items() if each}
        steps = self.references[self.searched[0]].made.steps
        for speedup in everyone.keys() - reached.keys():
            why = (
                f"no setting reaches speedup {speedup:g} in {steps} steps, the highest had "
                f"{self.short_of[speedup]:.2f}x: too many must be computed; ask for more steps or a lower "
                "speedup"
            )
            if not reached:
                raise ValueError(why)
            warnings.warn(f"{why}; it is left out", stacklevel=4)
            self.left_out[f"speedup {speedup:g}"] = why
        return reached

    def _sampling(self) -> Sampling | None:
        """The steps that a generation executes, if forecasts of one denoiser can be fitted to them.

        It is called once a step, under a sampler that draws no noise.
        """
        first = self.references[self.searched[0]]
        sampling, levels = Sampling.of(self.workload.scheduler), first.path.levels
        # Image-to-image leaves out the first ones.
        executed = sampling.part(len(sampling) - len(levels), len(levels))
        each_once = len(first.behind) == len(levels) and executed.angles == levels
        additive = executed.sizes is not None and not first.made.draws_noise
        return executed if each_once and additive else None

    def _fit(
        self,
        tried: dict[float, list[Scored]],
        sampling: Sampling,
        trajectory: Trajectory | None,
        late: float,
    ) -> None:
        """Fit forecasts to the best choices of steps, and add them to what was tried."""
        plans: list[tuple[int, float, str]] = []
        for speedup, scored in tried.items():
            ordered = sorted(scored, key=lambda each: (-each.mean_db, each.number))
            # Not with tokens reduced: without that, their steps would be too many.
            distinct = {each.plan: None for each in ordered if len(each.candidate.configs) == 1}
            plans += [(place, speedup, plan) for place, plan in enumerate([*distinct][:FITS])]
        plans.sort()  # the best of each speed-up first
        found: dict[float, list[Scored]] = {each: [] for each in tried}
        with self._bar(len(plans), "fit") as bar:
            for number, (_, speedup, plan) in enumerate(plans):
                in_time = number < len(tried) or time.monotonic() < late
                if in_time and number % processes() == rank():
                    forecasts = self._fitted(plan, sampling)
                    candidate = fitted(speedup, forecasts, trajectory)
                    scored_ = self._scored(candidate, speedup, BEHIND + number, tried[speedup])
                    if scored_ is not None:
                        found[speedup].append(scored_)
                        top = max([*tried[speedup], *found[speedup]], key=lambda each: each.mean_db)
                        bar.set_postfix_str(
                            f"{speedup:g}x: {top.mean_db:.1f} dB, {top.candidate.name}"
                        )
                bar.update()
        for part in gathered(found):
            for speedup, more in part.items():
                tried[speedup] += more

    def _fitted(self, plan: str, sampling: Sampling) -> FittedForecasts:
        """The forecasts of a choice of steps, fitted to the prompts searched on, or what was kept of them."""
        kept = self.ledger.fitted(plan)
        if kept is not None:
            return kept
        computed = [step for step, sign in enumerate(plan) if sign == "#"]
        fit = Fit(computed, len(plan))
        # With weights of nothing the last computed prediction is handed on.
        still = Fit(computed, len(plan)).forecasts(sampling)
        config = StepSkipping(
            speedup=len(plan) / len(computed),
            rule="even",
            warmup_steps=1,
            fitted=still,
            corrector=False,
        )
        for example in self.searched:
            behind = self.references[example].behind
            # Inside the steps that tofu follows: what is handed on is of the fit.
            with (
                apply_tofu(self.pipe, config),
                quiet(),
                fit.watching(self.workload.scheduler, behind),
            ):
                self.workload.run(example)
        forecasts = fit.forecasts(sampling)
        self.ledger.keep_fitted(plan, forecasts)
        return forecasts

    def _scored(
        self, candidate: Candidate, speedup: float, number: int, others: list[Scored]
    ) -> Scored | None:
        """A setting on all prompts; None: it does not reach the speed-up, or is far behind the best."""
        best = max(others, key=lambda each: each.mean_db, default=None)
        mine: list[float] = []
        plan = ""
        for n, example in enumerate(self.searched):
            try:
                score = self._generated(candidate, f"{speedup:g}/{candidate.name}/{n}", example)
            except ValueError as error:
                if len(candidate.configs) == 1:
                    raise
                # Whether tokens can be reduced in this pipeline shows when it is tried.
                self.left_out[candidate.name] = str(error)
                return None
            for _ in range(RAISES if len(candidate.configs) > 1 and n == 0 else 0):
                if score.flops >= speedup - 1e-6:
                    break
                candidate = raised(candidate, 1.01 * speedup / score.flops)
                key = f"{speedup:g}/{candidate.name} {candidate.configs[-1]}/{n}"
                score = self._generated(candidate, key, example)
            if score.flops < speedup - 1e-6:
                self.short_of[speedup] = max(score.flops, self.short_of.get(speedup, 1.0))
                return None
            plan = plan or score.plan
            mine.append(score.latents_db)
            if (
                best is not None
                and n
                and fmean(mine) < fmean(best.all_db[: n + 1]) - self.behind_db
            ):
                return None
        return Scored(candidate, tuple(mine), number, plan)

    def _generated(
        self, candidate: Candidate, key: str, example: Example, decoded: bool = False
    ) -> Score:
        """One generation of a setting, or what was kept of it."""
        known = self.ledger.scores.get(key)
        if known is not None:
            return known
        with apply_tofu(self.pipe, *candidate.configs) as handle, quiet():
            made = self.workload.generated(example, decoded)
            plan = plan_of(handle)
            # As counting takes a while: the same settings and steps take as much for every prompt.
            same = f"{candidate.configs} {plan}"
            if same not in self.counted:
                self.counted[same] = flops_of(handle)
            flops = self.counted[same]
        return self._noted(example, made, flops, plan, key)

    def _noted(self, example: Example, made: Generated, flops: float, plan: str, key: str) -> Score:
        """Compare a generation with the unreduced one, and keep the score."""
        wanted = self.references[example].made
        pixels = None
        if made.pictures is not None and wanted.pictures is not None:
            pixels = psnr_db(made.pictures, wanted.pictures)
        score = Score(latents_db(made.latents, wanted.latents), flops, plan, pixels)
        self.ledger.add(key, score)
        return score

    def _compared(self, speedup: float, best: Scored) -> list[Measured]:
        """The default, the best and fewer steps on the prompts kept apart."""
        rows = []
        for kind, candidate in ((DEFAULT, default(speedup)), (TUNED, best.candidate)):
            key = f"{speedup:g}/{candidate.name} {candidate.configs[-1]}/held out"
            scores = [
                self._generated(candidate, f"{key} {n}", example, decoded=True)
                for n, example in enumerate(self.held_out)
            ]
            searched = best.all_db if kind == TUNED else ()
            rows.append(measured(kind, candidate.name, speedup, scores, searched))
        fewer = self._fewer_steps(speedup, rows[-1].plan.replace(" ", ""))
        return rows if fewer is None else [*rows, fewer]

    def _fewer_steps(self, speedup: float, plan: str) -> Measured | None:
        """Generations of as many steps as were computed; None: the pipeline cannot be asked for them."""
        options, scores = self.workload.options, []
        if "#" not in plan or {"timesteps", "sigmas"} & {*options}:
            return None
        asked = int(options.get("num_inference_steps", len(plan)))
        fewer = max(1, round(asked * plan.count("#") / len(plan)))
        for n, example in enumerate(self.held_out):
            key = f"{fewer} steps/held out {n}"
            score = self.ledger.scores.get(key)
            if score is None:
                whole = self.references[example].made
                try:
                    made = self.workload.generated(example, True, num_inference_steps=fewer)
                # As when generate sets steps or sigmas itself.
                except (TypeError, ValueError) as error:
                    self.left_out["fewer steps"] = f"{fewer} steps are refused ({error})"
                    return None
                if made.steps >= whole.steps:
                    self.left_out["fewer steps"] = "generate did not pass num_inference_steps on"
                    return None
                score = self._noted(example, made, whole.calls / made.calls, "#" * made.steps, key)
            scores.append(score)
        return measured(FEWER, f"{fewer} steps", speedup, scores)

    @contextmanager
    def _bar(self, total: int, name: str) -> Iterator[tqdm[Any]]:
        """A progress bar; the pipeline's own rest meanwhile."""
        own = getattr(self.pipe, "_progress_bar_config", None)
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(**{**(own or {}), "disable": True})
        try:
            with tqdm(total=total, desc=name, disable=not self.progress) as bar:
                yield bar
        finally:
            if own is not None:
                self.pipe._progress_bar_config = own
            else:
                vars(self.pipe).pop("_progress_bar_config", None)


@dataclass(frozen=True)
class Scored:
    """A setting, and the dB of its latents on every prompt searched on.

    number: Its turn.
    plan: The steps that it computed for the first prompt.
    """

    candidate: Candidate
    all_db: tuple[float, ...]
    number: int
    plan: str

    @property
    def mean_db(self) -> float:
        """The mean over the prompts: in dB, so that none of them rules."""
        return fmean(self.all_db)


def measured(
    kind: str,
    name: str,
    speedup: float,
    scores: Sequence[Score],
    searched_db: tuple[float, ...] = (),
) -> Measured:
    """A row of the comparison."""
    return Measured(
        kind,
        name,
        speedup,
        scores[-1].flops,
        scores[-1].plan,
        searched_db,
        tuple(each.latents_db for each in scores),
        tuple(each.pixels_db for each in scores if each.pixels_db is not None),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: whether a speed-up is reached is looked at here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def plan_of(handle: Handle) -> str:
    """Which steps a generation computed."""
    return " ".join(
        "".join(".#"[not step.skipped] for step in each.steps) for each in handle.inspect()
    )


def flops_of(handle: Handle) -> float:
    """How many times fewer FLOPs a generation took."""
    if any(isinstance(each, TokenReduction) for each in handle.configs):
        return handle.summary().speedup
    # All computed calls are alike, and nothing must be counted.
    steps = [step for each in handle.inspect() for step in each.steps]
    calls = sum(step.calls for step in steps)
    return calls / max(1, sum(step.ran for step in steps))


def rank() -> int:
    """Of this process among those of torch.distributed; 0 without."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    """Of torch.distributed; 1 without."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def gathered(mine: Found) -> list[Found]:
    """What every process has found, in the order of their ranks."""
    parts: list[Any] = [mine]
    if processes() > 1:
        parts = [None] * processes()
        distributed.all_gather_object(parts, mine)
    return parts
