"""Which combination loses least at which saving? Drift of many settings, each a row once it is measured.

    python -m eval study --pipeline unet --stage grid --out eval/results/study_unet.jsonl
    torchrun --nproc-per-node 2 -m eval study --pipeline mmdit --stage front --out rows.jsonl

Stages: `typed`, ratios and speed-ups as people type them, with fewer steps; `rules`, every skip rule at six
speed-ups in 10, 25 and 50 steps; `grid`, every valid combination of method, merge, unmerge, scope,
keys_values and ratio; `front`, the better ones with what they must beat; `lengths`, the best in 10, 20 and 50
steps with theirs; `plans`, plans shared by more blocks and steps; `samplers`, step skipping with what it must
beat, for a `--scheduler`.

Drift is the PSNR to the unreduced picture of the same prompt and seed, savings are counted FLOPs. No picture
is kept and no time taken: `eval sweep` does both, for few settings. Stopped anywhere, the same command goes
on.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.baselines.cache_dit import FORECASTS
from eval.bench.pipeline import UNREDUCED, Bench, one_batch
from eval.files import mend
from eval.generate import run
from eval.generate.failed import FailedPictures, failure, told
from eval.generate.manifest import differences
from eval.generate.prompts import first, load_prompts
from eval.generate.run import Loaded
from eval.generate.settings import Setting, known_saving
from eval.jsonl import append, read
from eval.metrics.paired import psnr_db
from eval.provenance import provenance
from eval.statistics import of_mean
from eval.sweep import others
from tofu_diffusers import KEYS_VALUES, MERGES, METHODS, SCOPES, UNMERGES, TokenReduction

# The middle one first: what is worth what shows before the grid is whole.
RATIOS = (0.5, 0.25, 0.75)
# As in every row of the grid: what the choice by change needs, and the bound of extrapolation.
GRID = {"warmup_steps": 2, "max_age": 8}
CORRECTED_SHARE = "corrected"
"""In names: unmerge "taylor" with the corrector."""


@dataclass(frozen=True)
class Trial:
    """A setting in a generation of this many steps."""

    setting: Setting
    steps: int


def tofu(name: str, **options: Any) -> Setting:
    """A setting of apply_tofu."""
    return Setting(name, "tofu", options)


def grid(steps: int) -> Iterator[Trial]:
    """Every valid combination; a method's own merge (by depth for ToFu) is called "own".

    ToFu is there with its own merge only: with a merge and an unmerge given, it is ToMe with them. The
    corrector is there with unmerge "taylor" only; that pair is called "corrected".
    """
    for ratio, method, merge, how, scope, keys_values in itertools.product(
        RATIOS, sorted(METHODS), [*MERGES, "own"], [*UNMERGES, CORRECTED_SHARE], SCOPES, KEYS_VALUES
    ):
        own = merge == "own"
        # Apart from ToFu's, a method's own merge is one of the others.
        if own != (method == "tofu"):
            continue
        options = {
            "method": method,
            "merge": None if own else merge,
            "unmerge": "taylor" if how == CORRECTED_SHARE else how,
            "corrector": how == CORRECTED_SHARE,
            "scope": scope,
            "keys_values": keys_values,
            "ratio": ratio,
            **GRID,
        }
        try:
            TokenReduction(**options)
        except ValueError:
            continue
        seen = "none" if keys_values == "dropped" else keys_values
        yield Trial(tofu(f"{method}-{merge}-{how}-{scope}-{seen}-{ratio:g}", **options), steps)


# The best known of those that remove some tokens at every step, and what it is made of.
TOKENS = {
    "method": "importance",
    "merge": "prune",
    "unmerge": "taylor",
    "corrector": False,
    "keys_values": "fresh",
    "share": "resolution",
    "max_age": 8,
}


# The token that has waited longest is due first; of those that have waited as long, what changes most.
DUE = {"source": "change", "age_exponent": 16}


SPEEDS = (1.5, 2, 3)


def matched(steps: int, speeds: Sequence[float] = SPEEDS) -> Iterator[Trial]:
    """Step skipping and what it must beat, at so many times fewer FLOPs.

    Whole-step caching computes steps evenly spread after the first two ("line"), or after the first
    quarter ("late").
    """
    for count in (round(steps / speed) for speed in speeds):
        cache = {"total": steps, "computed": count, "order": 1}
        yield from skipping(steps, count)
        for setting in (
            Setting(f"line-{count}", "step_cache", {**cache, "first": 2}),
            Setting(f"late-{count}", "step_cache", {**cache, "first": max(2, steps // 4)}),
            Setting(f"steps-{count}", "fewer_steps", {"steps": count}),
        ):
            yield Trial(setting, steps)


def skipping(steps: int, count: int) -> Iterator[Trial]:
    """So many of the steps computed, the first two or four among them, with the corrector and without."""
    for warmup, corrector in itertools.product((2, 4), (False, True)):
        if warmup >= count:
            continue
        options = {"warmup_steps": warmup, "rule": "late", "order": 1, "corrector": corrector}
        first = "" if warmup == 2 else f"-first{warmup}"
        name = f"step-{count}{first}{'-corrected' if corrector else ''}"
        yield Trial(tofu(name, speedup=steps / count, **options), steps)


def rivals(steps: int) -> Iterator[Trial]:
    """Others that halve the FLOPs: a second-order solver, and predictions that are repeated.

    As a stage, with the caches of other packages, and beside each the default at as many FLOPs or fewer.
    """
    count = round(steps / 2)
    multistep = {"steps": count, "scheduler": "multistep"}
    cache = {"total": steps, "computed": count, "first": 2, "order": 0}
    yield Trial(Setting(f"multistep-{count}", "fewer_steps", multistep), steps)
    yield Trial(Setting(f"repeat-{count}", "step_cache", cache), steps)
    for method in ("random", "tome"):
        yield Trial(few_tokens_early(method), steps)


def few_tokens_early(method: str) -> Setting:
    """All blocks compute 35 % of the tokens, later 67 %, in the end all: JiT's shares (arXiv 2603.10744).

    A token that is not computed gets its match's update, in the place of what lies around it on the grid.
    """
    points = [(0.4, 1.0), (0.401, 0.5), (0.65, 0.5), (0.651, 0.0)]
    schedule = {"kind": "explicit", "points": points}
    options = {"ratio": 0.65, "merge": "prune", "schedule": schedule, "warmup_steps": 0}
    return tofu(f"early-{method}", method=method, **options)


def caches(pipe: Any, steps: int) -> list[Setting]:
    """What decides on the way when to compute, each from little to much skipped."""
    settings = [
        Setting(f"seacache-{threshold:g}", "seacache", {"threshold": threshold, "most": most})
        for threshold, most in ((0.08, 2), (0.12, 2), (0.2, 4))
    ]
    if getattr(pipe, "transformer", None) is None:
        return settings
    settings += [
        Setting(
            f"magcache-{threshold:g}",
            "magcache",
            {"threshold": threshold, "most": most, "steps": steps},
        )
        for threshold, most in ((0.01, 3), (0.02, 3), (0.5, 5))
    ]
    if importlib.util.find_spec("cache_dit") is None:
        warnings.warn("cache-dit is not installed: its rows are left out", stacklevel=2)
        return settings
    return settings + [
        Setting(
            f"dbcache-{forecast}-{threshold:g}",
            "dbcache",
            {"threshold": threshold, "forecast": forecast, "steps": steps},
        )
        for threshold in (0.1, 0.2, 0.4)
        for forecast in FORECASTS
    ]


def beside(rows: Iterable[dict[str, Any]], steps: int) -> Iterator[Trial]:
    """The default at the FLOPs of each of these rows, or fewer."""
    for row in rows:
        if row["flops_ratio"] > 1:
            name = f"speedup-as-{row['setting']['name']}"
            # Rows are rounded, and half of 25 steps is 12.
            yield Trial(tofu(name, speedup=row["flops_ratio"] - 1e-4), steps)


def samplers(steps: int) -> Iterator[Trial]:
    """The first of these at 1.5 and 2 times fewer FLOPs, for a run with each `--scheduler`."""
    yield from matched(steps, (1.5, 2))


def tokens(steps: int) -> Iterator[Trial]:
    """`TOKENS` with fresh and with cached keys and values, at two ratios.

    Again with the corrector ("corrected"), and with the corrector and the oldest tokens first ("due").
    """
    for ratio in (0.5, 0.75):
        for keys_values in ("fresh", "cached"):
            name = f"tokens-{keys_values}-{ratio:g}"
            options = {
                **TOKENS,
                "keys_values": keys_values,
                "ratio": ratio,
                "warmup_steps": steps // 4,
            }
            yield Trial(tofu(name, **options), steps)
            corrected = {**options, "corrector": True}
            yield Trial(tofu(f"{name}-corrected", **corrected), steps)
            if keys_values == "fresh":
                yield Trial(tofu(f"{name}-due", **corrected, method_options=DUE), steps)


def front(steps: int) -> Iterator[Trial]:
    """All of these; what the tokens' options are worth; both kinds together; and merging."""
    yield from matched(steps)
    yield from rivals(steps)
    yield from tokens(steps)
    warmup = steps // 4
    half = {**TOKENS, "ratio": 0.5, "warmup_steps": warmup}
    count = round(steps / 1.5)
    cache = {"total": steps, "computed": count, "first": warmup, "order": 1}
    both = [tofu("tokens", **half), Setting("line", "step_cache", cache)]
    for setting in (
        tofu("tokens-temporal-0.5", **{**half, "unmerge": "temporal"}),
        tofu("tokens-blend-0.5", **{**half, "unmerge": "blend"}),
        *(
            tofu(f"tokens-{method}-0.5", **{**half, "method": method})
            for method in ("random", "tome", "pitome")
        ),
        *(
            tofu(f"tokens-{source}-0.5", **half, method_options={"source": source})
            for source in ("cfg", "attention", "key_norm")
        ),
        tofu("tokens-none-0.5", **{**half, "keys_values": "dropped"}),
        Setting(f"stack-{count}", "stack", {"of": [each.to_dict() for each in both]}),
        *(tofu(f"{method}-0.5", method=method, ratio=0.5) for method in ("tofu", "tome", "pitome")),
        tofu("random-0.5", method="random", ratio=0.5),
    ):
        yield Trial(setting, steps)


def lengths(steps: int) -> Iterator[Trial]:
    """The same of short, usual and long generations, at more savings, whatever the steps asked for."""
    for count in (10, 20, 50):
        yield from matched(count, (*SPEEDS, 1.3, 1.7))
        yield from rivals(count)
        yield from tokens(count)


def plans(steps: int) -> Iterator[Trial]:
    """One plan a block, a stack of blocks or a resolution, made at every step or kept for some."""
    kinds = {
        "tome": {"method": "tome", "ratio": 0.5},
        "tokens": {**TOKENS, "ratio": 0.5, "warmup_steps": steps // 4},
    }
    for kind, options in kinds.items():
        # What rows were first named by.
        for word, share in (("block", "block"), ("run", "stack"), ("level", "resolution")):
            yield Trial(tofu(f"{kind}-{word}", **{**options, "share": share}), steps)
        for reuse in (2, 5):
            more = {"share": "resolution", "reuse": reuse}
            yield Trial(tofu(f"{kind}-level-reuse{reuse}", **{**options, **more}), steps)


def typed(steps: int) -> Iterator[Trial]:
    """The values that people type, and fewer steps for as many FLOPs as each speed-up."""
    for ratio in (0.25, 0.5, 0.75):
        yield Trial(tofu(f"ratio-{ratio:g}", ratio=ratio), steps)
    for speedup in SPEEDS:
        yield Trial(tofu(f"speedup-{speedup:g}", speedup=speedup), steps)
        count = int(steps / speedup)
        yield Trial(Setting(f"steps-{count}", "fewer_steps", {"steps": count}), steps)


# Steps at the start that a rule computes: one is enough for those that look at all steps.
WARMUPS = {"trajectory": (1,), "even": (1,), "late": (2, 4)}


def rules(steps: int) -> Iterator[Trial]:
    """Every skip rule from little to much skipped, in short and long generations, with fewer steps."""
    for total, speedup in itertools.product((10, 25, 50), (1.3, 1.5, 2, 3, 4, 5)):
        count = int(total / speedup)
        for rule, warmups in WARMUPS.items():
            for warmup in warmups:
                # Behind the warm-up one step more is computed, so that a longer one would be slower.
                if warmup < count:
                    options = {"speedup": speedup, "rule": rule, "warmup_steps": warmup}
                    yield Trial(tofu(f"{rule}-{speedup:g}-first{warmup}", **options), total)
        yield Trial(Setting(f"steps-{speedup:g}", "fewer_steps", {"steps": count}), total)


STAGES = {
    "typed": typed,
    "rules": rules,
    "grid": grid,
    "front": front,
    "lengths": lengths,
    "plans": plans,
    "samplers": samplers,
    "rivals": rivals,
}


class Study:
    """Rows of one pipeline at one size, n and seed, in a JSON-lines file that several processes add to."""

    def __init__(
        self, loaded: Loaded, prompts: list[str], seed: int, batch_size: int, call: dict[str, Any]
    ):
        self.loaded, self.prompts, self.seed = loaded, prompts, seed
        self.batch_size, self.call = batch_size, call
        # Of the code that this process runs, whatever becomes of the checkout meanwhile.
        self.provenance = provenance(loaded.device)
        self.references: dict[int, Tensor] = {}

    def pictures(self, trial: Trial) -> tuple[Tensor, float]:
        """Of all prompts, uint8 [n, 3, H, W], and the unreduced FLOPs over those of the trial.

        Raises:
            FailedPictures: if any is of NaN or of one colour: no drift can be taken of it.
        """
        call = {**self.call, "num_inference_steps": trial.steps}
        parts, saving = [], None
        failures: dict[str, str] = {}
        for start in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[start : start + self.batch_size]
            with trial.setting.applied(self.loaded.pipe) as applied:
                own = {**call, **applied.call, "output_type": "pt"}
                images = one_batch(self.loaded.pipe, batch, self.seed + start, own).images
                saving = known_saving(trial.setting, applied, self.loaded.pipe, trial.steps)
            images = images.cpu().float()
            for prompt, picture in zip(batch, images, strict=True):
                if (reason := failure(picture.permute(1, 2, 0).numpy())) is not None:
                    failures[repr(prompt)] = reason
            parts.append(images.mul(255).round().to(torch.uint8))
        if failures:
            raise FailedPictures(told(trial.setting.name, failures, len(self.prompts)))
        return torch.cat(parts), self.counted(trial, call) if saving is None else saving

    def counted(self, trial: Trial, call: dict[str, Any]) -> float:
        """The unreduced FLOPs over those of a trial, whose choices may differ from batch to batch."""
        run = 0.0
        for start in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[start : start + self.batch_size]
            run += Bench(self.loaded.pipe, batch, self.seed + start, call).flops(trial.setting)
        whole = Bench(self.loaded.pipe, self.prompts[:1], self.seed, call).flops(UNREDUCED)
        return len(self.prompts) * whole / run

    def row(self, trial: Trial) -> dict[str, Any]:
        """One row, in the form that the report reads."""
        reference = self.reference(trial.steps)
        return self.entry(trial, reference, *self.pictures(trial))

    def reference(self, steps: int) -> Tensor:
        """The unreduced pictures of so many steps.

        Raises:
            ValueError: if any is of NaN or of one colour.
        """
        if steps not in self.references:
            try:
                self.references[steps], _ = self.pictures(Trial(UNREDUCED, steps))
            except FailedPictures as error:  # with them, every row of these steps
                raise ValueError(str(error)) from error
        return self.references[steps]

    def entry(self, trial: Trial, reference: Tensor, made: Tensor, saving: float) -> dict[str, Any]:
        """The row of pictures made by a trial, with the unreduced FLOPs over its own."""
        drift = psnr_db(made, reference)
        return {
            **self.about(trial),
            **self.provenance,
            "flops_ratio": round(saving, 4),
            "speed": None,
            "metrics": {"psnr_db": of_mean(drift).entry()},
            "psnr_db": [round(value, 2) for value in drift.tolist()],
        }

    def about(self, trial: Trial) -> dict[str, Any]:
        """What tells a row from others, as JSON has it."""
        name, n = self.loaded.name, len(self.prompts)
        size = f"-{self.call['width']}px" if "width" in self.call else ""
        asked = self.loaded.scheduler
        sampler = {} if asked is None else {"scheduler": asked}
        stage = "-".join([f"{name}{size}", f"{trial.steps}steps", f"n{n}", *sampler.values()])
        about = {
            "id": f"{stage}/{trial.setting.name}",
            "pipeline": name,
            "weights": self.loaded.identity()["weights"],
            "setting": trial.setting.to_dict(),
            "n": n,
            "seed": self.seed,
            "steps": trial.steps,
            "call": self.call,
            **sampler,
        }
        as_stored: dict[str, Any] = json.loads(json.dumps(about))
        return as_stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `generate` but the setting, and the stage."""
    run.add_run_arguments(parser, out="JSON-lines file; goes on where it was")
    parser.add_argument("--stage", choices=sorted(STAGES), required=True)
    parser.add_argument(
        "--match", metavar="REGEX", help="only rows whose id matches, such as '50steps.*-1.5-'"
    )


def main(args: argparse.Namespace) -> None:
    """`python -m eval study`. A mistake in the arguments is a ValueError."""
    loaded = run.load(args.pipeline, args.dtype, scheduler=args.scheduler)
    prompts = first(load_prompts(args.prompts, args.prompt_column), args.n, least=2)
    call = run.call_of(args)
    del call["num_inference_steps"]
    study = Study(loaded, prompts, args.seed, args.batch_size, call)
    state = run.processes()
    if state.is_main_process:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        mend(args.out)
    state.wait_for_everyone()
    trials = list(STAGES[args.stage](args.steps))
    if args.stage in ("front", "rivals"):
        merging = [0.5] if args.stage == "front" else []
        trials += [Trial(setting, args.steps) for setting in others(loaded.pipe, merging)]
    if args.stage == "rivals":
        trials += [Trial(setting, args.steps) for setting in caches(loaded.pipe, args.steps)]
    if args.match is not None:
        ids = {study.about(trial)["id"]: trial for trial in trials}
        trials = [trial for name, trial in ids.items() if re.search(args.match, name)]
        if not trials:
            raise ValueError(
                f"no row of stage {args.stage} matches {args.match!r}; ids are such as {next(iter(ids))}"
            )
    made = measured(study, trials, args, state)
    if args.stage == "rivals":
        state.wait_for_everyone()
        rows = {row["id"]: row for row in read(args.out)}
        found = (rows.get(study.about(trial)["id"]) for trial in trials)
        made |= measured(study, [*beside(filter(None, found), args.steps)], args, state)
    without = [each.rpartition("/")[2] for each, has_row in made.items() if not has_row]
    if without:
        raise ValueError(
            f"{len(without)} of {len(made)} settings got no row, as pictures of theirs failed: "
            f"{', '.join(without)}"
        )


def measured(
    study: Study, trials: Sequence[Trial], args: argparse.Namespace, state: Any
) -> dict[str, bool]:
    """Add the rows of these trials that are not there.

    Returns:
        Of each id that was to be added, whether it got a row: not if pictures failed.

    Raises:
        ValueError: if the file holds another row of the same name.
    """
    done = {row["id"]: row for row in read(args.out)}
    todo = []
    for trial in trials:
        about = study.about(trial)
        row = done.get(about["id"])
        if row is None:
            todo.append(trial)
        elif wrong := differences({name: row[name] for name in about}, about):
            raise ValueError(
                f"{args.out} holds another {about['id']}: {'; '.join(wrong)}; ask for the same, or choose "
                "another --out"
            )
    mine = todo[state.process_index :: state.num_processes]
    made: dict[str, bool] = {}
    for trial in tqdm(mine, desc=args.stage, unit=" rows", disable=not state.is_main_process):
        try:
            append(args.out, study.row(trial))
            made[study.about(trial)["id"]] = True
        except FailedPictures as error:
            warnings.warn(f"{error}\nit gets no row", stacklevel=2)
            made[study.about(trial)["id"]] = False
    return made
