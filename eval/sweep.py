"""How much faster, and what did it cost? Every method at every ratio, beside what it must beat.

    python -m eval sweep --pipeline unet --n 8 --ratios 0.25 0.5 --methods default tome tofu --out runs/a

Generates, scores, times and reports; stopped anywhere, the same command goes on. Beside the methods run step
skipping at each speed-up, random pruning at the same ratios, fewer steps (with the pipeline's scheduler and
a second-order multistep one) and whole-step caching (repeated, extrapolated) at the counted FLOPs of each,
and what other packages offer: diffusers' Pyramid Attention Broadcast; tomesd and DeepCache for UNets; for
transformers diffusers' TaylorSeer and, where it runs, First Block Cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from eval.bench.pipeline import UNREDUCED, Bench, measure, one_batch
from eval.files import write_whole
from eval.generate import run
from eval.generate.failed import by_prompt, refuse
from eval.generate.manifest import Manifest, image_name, image_path
from eval.generate.prompts import first, load_prompts
from eval.generate.run import Loaded
from eval.generate.settings import Setting
from eval.metrics import score
from eval.metrics.extractors import read_pictures
from eval.provenance import provenance
from eval.report import page
from eval.report.plots import overlay_kept
from eval.studies.stages import STAGES
from tofu_diffusers import METHODS, apply_tofu

FORMAT = 1
DEFAULT = "default"
FLOOR = "random"
SHOWN = 4  # pictures of every setting in the report


def tofu_settings(methods: Sequence[str], ratios: Iterable[float]) -> list[Setting]:
    """Each method at each ratio, and random pruning; "default" is the denoiser's token profile.

    Raises:
        ValueError: on an unknown method.
    """
    for method in methods:
        if method != DEFAULT and method not in METHODS:
            raise ValueError(
                f"unknown method {method!r}; choose from {', '.join([DEFAULT, *sorted(METHODS)])}"
            )
    return [
        Setting(
            f"{method}-{ratio:g}",
            "tofu",
            {"ratio": ratio} | ({} if method == DEFAULT else {"method": method}),
        )
        for ratio in sorted(set(ratios))
        if ratio > 0
        for method in dict.fromkeys([*methods, FLOOR])
    ]


def skip_settings(speedups: Iterable[float]) -> list[Setting]:
    """The denoiser's profile at each speed-up."""
    return [
        Setting(f"speedup-{speedup:g}", "tofu", {"speedup": speedup})
        for speedup in sorted(set(speedups))
        if speedup > 1
    ]


def baselines(steps: int, speedups: Iterable[float]) -> list[Setting]:
    """Fewer steps and whole-step caching at these savings, rounded to whole steps."""
    counts = sorted({round(steps / speedup) for speedup in speedups} - {0, steps}, reverse=True)
    settings = []
    for count in counts:
        cache = {"total": steps, "computed": count, "first": min(2, count)}
        settings += [
            Setting(f"steps-{count}", "fewer_steps", {"steps": count}),
            Setting(
                f"multistep-{count}", "fewer_steps", {"steps": count, "scheduler": "multistep"}
            ),
            Setting(f"repeat-{count}", "step_cache", {**cache, "order": 0}),
            Setting(f"line-{count}", "step_cache", {**cache, "order": 1}),
        ]
    return settings


def others(pipe: Any, ratios: Iterable[float]) -> list[Setting]:
    """Settings of other packages.

    Attention reused between steps for every denoiser; tomesd and DeepCache for UNets; TaylorSeer for
    transformers, and First Block Cache for those whose blocks it can take.
    """
    settings = [Setting("pab-2", "pab", {"skip": 2})]
    if getattr(pipe, "unet", None) is not None:
        # More than 0.75 is not to be had from its 2 x 2 cells.
        wanted = (ratio for ratio in sorted(set(ratios)) if 0 < ratio <= 0.75)
        settings += [Setting(f"tomesd-{ratio:g}", "tomesd", {"ratio": ratio}) for ratio in wanted]
        return settings + [Setting(f"deepcache-{n}", "deepcache", {"interval": n}) for n in (2, 3)]
    settings += [
        Setting(f"taylorseer-{n}", "taylorseer", {"interval": n, "modules": "paper"})
        for n in (2, 3)
    ]
    for threshold in (0.1, 0.2):
        cache = Setting(f"first-block-{threshold:g}", "first_block_cache", {"threshold": threshold})
        # What it cannot take, it refuses: SD3's blocks, for one.
        with suppress(ValueError), cache.applied(pipe):
            settings.append(cache)
    return settings


@dataclass(frozen=True)
class Sweep:
    """One sweep folder and what is in it.

    Args:
        folder: Holds a run folder a setting, scores/, speed.json, flops.json, results.json, report.html.
        call: Arguments of every call of the pipeline.
        rounds: Of timing; 0 leaves it out.
    """

    folder: Path
    loaded: Loaded
    prompts: list[str]
    seed: int
    batch_size: int
    call: dict[str, Any]
    rounds: int

    def bench(self) -> Bench:
        """The pipeline on one batch of the prompts."""
        prompts = self.prompts[: self.batch_size]
        return Bench(self.loaded.pipe, prompts, self.seed, self.call)

    def flops(self, settings: Sequence[Setting]) -> dict[str, float]:
        """Counted FLOPs of the unreduced denoiser over those of each setting; what is counted is kept."""
        path = self.folder / "flops.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        bench = Bench(self.loaded.pipe, self.prompts[:1], self.seed, self.call)
        base: int | None = None
        found = {}
        for setting in settings:
            about = {
                "pipeline": self.loaded.identity(),
                "call": self.call,
                "setting": setting.to_dict(),
            }
            about = json.loads(json.dumps(about))  # as stored
            row = next((row for row in rows if about.items() <= row.items()), None)
            if row is None:
                base = base or bench.flops(UNREDUCED)
                row = {**about, "saving": base / bench.flops(setting)}
                rows.append(row)
                # All count, as all need it; two that write would move each other's file away.
                if run.processes().is_main_process:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_whole(path, (json.dumps(rows, indent=2) + "\n").encode())
            found[setting.name] = row["saving"]
        return found

    def run(self, setting: Setting) -> Manifest:
        """The images of one setting."""
        return run.generate(
            self.loaded,
            setting,
            self.prompts,
            self.folder / setting.name,
            seed=self.seed,
            batch_size=self.batch_size,
            call=self.call,
        )

    def overlay(self, setting: Setting, count: int) -> None:
        """Into the run's kept/: its first pictures, dark where tokens were computed less often.

        Where steps are skipped all tokens are computed equally often, and there is nothing to see.
        """
        folder = self.folder / setting.name / "kept"
        count = min(count, self.batch_size, len(self.prompts))
        if setting.kind != "tofu" or "speedup" in setting.options:
            return
        if all((folder / image_name(i)).exists() for i in range(count)):
            return
        folder.mkdir(exist_ok=True)
        with apply_tofu(self.loaded.pipe, **setting.options) as handle:
            prompts = self.prompts[: self.batch_size]
            one_batch(self.loaded.pipe, prompts, self.seed, self.call)
            maps = handle.computed()
        shares = maps[min(maps)].cpu()
        for i in range(count):
            with Image.open(image_path(self.folder / setting.name, i)) as image:
                overlay_kept(image, shares[i, 0].numpy()).save(folder / image_name(i))


def rows(
    sweep: Sweep,
    settings: Sequence[Setting],
    scored: dict[str, dict[str, Any]],
    flops: dict[str, float],
    speeds: dict[str, dict[str, Any]],
    against: Sequence[str],
) -> list[dict[str, Any]]:
    """A row a setting, as a report reads them."""
    found = []
    base = scored[UNREDUCED.name]
    for setting in settings:
        mine = scored[setting.name]
        manifest = Manifest.load(sweep.folder / setting.name)
        timed = speeds.get(setting.name)
        found.append(
            {
                "id": f"{manifest.pipeline['name']}/{setting.name}",
                "pipeline": manifest.pipeline["name"],
                "weights": manifest.pipeline["weights"],
                "setting": setting.to_dict(),
                "n": len(manifest),
                "seed": manifest.seeds[0],
                "steps": manifest.call["num_inference_steps"],
                "call": dict(manifest.call),
                **manifest.provenance,
                "flops_ratio": flops[setting.name],
                "speed": timed and timed["speed"],
                "failed": {which: len(found) for which, found in mine["failed"].items()},
                "metrics": mine["metrics"]
                | (score.changes(mine, base) if mine is not base else {}),
                "against": {
                    name: score.changes(mine, scored[name])
                    for name in against
                    if name != setting.name
                },
            }
        )
    return found


def matched(sweep: Sweep, settings: list[Setting]) -> list[Setting]:
    """These, and fewer steps and whole-step caching at the savings of each."""
    flops = sweep.flops(settings)
    steps = sweep.call["num_inference_steps"]
    found = baselines(steps, (flops[each.name] for each in settings if flops[each.name] > 1))
    return settings + [each for each in found if each not in settings]


def sweep_all(
    sweep: Sweep, settings: list[Setting], scoring: dict[str, Any], against: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Generate, score and time all settings; writes results.json and returns its rows.

    Args:
        scoring: Arguments of `score.score`.
        against: Names of settings from which every row has its changes, too, as from the unreduced one.

    Raises:
        ValueError: if one of them is none of the settings.
    """
    names = [setting.name for setting in settings]
    if unknown := sorted({*against} - {*names}):
        raise ValueError(f"no setting is called {unknown[0]!r}; choose of {', '.join(names)}")
    flops = sweep.flops(settings)
    for setting in settings:
        made = sweep.run(setting)
        # Now and not only when all settings are generated.
        failures = by_prompt(made, made.failed)
        refuse(sweep.folder / setting.name, failures, len(made), scoring["allow_failed"])
    if not run.processes().is_main_process:
        return []
    whole = sweep.folder / UNREDUCED.name
    scored = {
        setting.name: score.score(sweep.folder / setting.name, whole, **scoring)
        for setting in settings
    }
    speeds: dict[str, dict[str, Any]] = {}
    if sweep.rounds:
        about = {
            "pipeline": sweep.loaded.identity(),
            "n": min(sweep.batch_size, len(sweep.prompts)),
            "call": sweep.call,
            "rounds": sweep.rounds,
            **provenance(sweep.loaded.device),
        }
        timed = measure(
            sweep.bench(),
            settings,
            sweep.rounds,
            sweep.folder / "speed.json",
            about,
            lambda setting: flops[setting.name],
        )
        speeds = {row["setting"]["name"]: row for row in timed}
    for setting in settings:
        sweep.overlay(setting, SHOWN)
    found = rows(sweep, settings, scored, flops, speeds, against)
    text = json.dumps({"format": FORMAT, "rows": found}, indent=2) + "\n"
    write_whole(sweep.folder / "results.json", text.encode())
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `generate` but the setting, and what to sweep over."""
    run.add_run_arguments(parser)
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.25, 0.5], help="(%(default)s)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[DEFAULT, "tofu", "tome", "pitome"],
        help=f"{DEFAULT} is the denoiser's token profile (%(default)s)",
    )
    parser.add_argument(
        "--speedups", type=float, nargs="*", default=[2.0], help="of step skipping (%(default)s)"
    )
    parser.add_argument(
        "--setting",
        nargs="+",
        help="exactly these instead of methods, ratios, speed-ups and what they must beat: name, kind and "
        "options as JSON, or a file with them, each",
    )
    parser.add_argument(
        "--stage", choices=sorted(STAGES), help="exactly the settings of this stage of `eval study`"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="NAME",
        help="settings from which every row has its changes, too, pair by pair",
    )
    score.add_scoring_arguments(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of timing; 0: none (%(default)s)"
    )


def main(args: argparse.Namespace) -> None:
    """`python -m eval sweep`. A mistake in the arguments is a ValueError, before anything is made."""
    wrong = [ratio for ratio in args.ratios if not 0 <= ratio < 1]
    if wrong:
        raise ValueError(f"ratio {wrong[0]} is outside [0, 1)")
    wrong = [speedup for speedup in args.speedups if not speedup >= 1]
    if wrong:
        raise ValueError(f"speedup {wrong[0]} is below 1")
    if args.stage and args.setting:
        raise ValueError("--stage names all settings, and --setting, too; leave one out")
    if args.stage:
        chosen = [
            trial.setting for trial in STAGES[args.stage](args.steps) if trial.steps == args.steps
        ]
        if not chosen:
            raise ValueError(
                f"stage {args.stage} has no setting of {args.steps} steps; give --steps that it has"
            )
    elif args.setting:
        chosen = [run.setting_of(text) for text in args.setting]
    else:
        chosen = tofu_settings(args.methods, args.ratios) + skip_settings(args.speedups)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; choose a folder")
    if args.rounds < 0:
        raise ValueError(f"--rounds {args.rounds} is below 0, which times nothing")
    prompts = first(load_prompts(args.prompts, args.prompt_column), args.n, least=2)
    if args.real is not None:
        for _ in read_pictures(args.real, args.out).batches():
            pass  # each can be read, now and not only once everything is generated
    loaded = run.load(args.pipeline, args.dtype, scheduler=args.scheduler)
    sweep = Sweep(
        args.out,
        loaded,
        prompts,
        args.seed,
        args.batch_size,
        run.call_of(args, loaded.pipe),
        args.rounds,
    )
    # What scores is loaded first: a wrong path shows before anything is counted.
    scoring = score.scoring(args, loaded.weights)
    settings = [UNREDUCED, *chosen]
    if not (args.setting or args.stage):
        print("counting the FLOPs of each setting", flush=True)
        settings = matched(sweep, [*settings, *others(loaded.pipe, args.ratios)])
    print(
        f"{len(settings)} settings of {len(prompts)} prompts each, {args.steps} steps", flush=True
    )
    if not sweep_all(sweep, settings, scoring, args.against):
        return
    page.main(argparse.Namespace(sweep=args.out, out=args.out / "report.html", prompts=SHOWN))
