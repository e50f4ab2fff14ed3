"""Which combination loses least at which saving? Drift of many settings, each a row once it is measured.

    python -m eval study --pipeline unet --stage grid --out eval/results/study_unet.jsonl
    torchrun --nproc-per-node 2 -m eval study --pipeline mmdit --stage front --out rows.jsonl

Stages: `grid`, every valid combination of method, fold, restore, scope, context and ratio; `front`, the
better ones with what they must beat, each over a range of savings; `lengths`, the same in 10, 20 and 50
steps. Drift is the PSNR to the unreduced picture of the same prompt and seed. Savings are counted FLOPs. No
picture is kept, no time taken: `eval sweep` does both for few settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval import generate
from eval.bootstrap import of_mean
from eval.generate import Loaded
from eval.manifest import provenance
from eval.prompts import first, load_prompts
from eval.scores import psnr_db
from eval.settings import Applied, Setting, known_saving
from eval.speed import UNREDUCED, Bench, one_batch
from eval.sweep import others
from tofu_diffusers import CONTEXTS, FOLDS, METHODS, RESTORES, SCOPES, TofuConfig

RATIOS = (0.25, 0.5, 0.75)
# As in every row of the grid: what the choice by change needs, and the bound of extrapolation.
GRID = {"first_steps": 2, "max_age": 8}


@dataclass(frozen=True)
class Trial:
    """A setting in a generation of this many steps."""

    setting: Setting
    steps: int


def tofu(name: str, **options: Any) -> Setting:
    """A setting of apply_tofu."""
    return Setting(name, "tofu", options)


def grid(steps: int) -> Iterator[Trial]:
    """Every valid combination; a method's own fold (by depth for ToFu) is called "own"."""
    for method, fold, how, scope, context, ratio in itertools.product(
        sorted(METHODS), [*FOLDS, "own"], RESTORES, SCOPES, CONTEXTS, RATIOS
    ):
        own = fold == "own"
        # Apart from ToFu's, a method's own fold is one of the others.
        if own and method != "tofu":
            continue
        options = {
            "method": method,
            "fold": None if own else fold,
            "restore": how,
            "scope": scope,
            "context": context,
            "ratio": ratio,
            **GRID,
        }
        try:
            TofuConfig(**options)
        except ValueError:
            continue
        yield Trial(tofu(f"{method}-{fold}-{how}-{scope}-{context}-{ratio:g}", **options), steps)


# The best known of those that remove some tokens at every step, and what it is made of.
TOKENS = {
    "method": "importance",
    "fold": "prune",
    "restore": "taylor",
    "context": "fresh",
    "share": "level",
    "max_age": 8,
}


def front(steps: int) -> Iterator[Trial]:
    """The default, tokens and merging with what they must beat: at 1.5, 2 and 3 times fewer FLOPs where they
    can.
    """
    counts = [round(steps / speed) for speed in (1.5, 2, 3)]
    middle = counts[1]
    settings = []
    for count in counts:
        share = (steps - count) / (steps - 2)
        cache = {"total": steps, "computed": count, "first": 2, "order": 1}
        settings += [
            tofu(f"step-{count}", scope="step", ratio=round(share, 4), first_steps=2),
            Setting(f"line-{count}", "step_cache", cache),
            Setting(f"steps-{count}", "fewer_steps", {"steps": count}),
        ]
    multistep = {"steps": middle, "scheduler": "multistep"}
    cache = {"total": steps, "computed": middle, "first": 2, "order": 0}
    settings += [
        Setting(f"multistep-{middle}", "fewer_steps", multistep),
        Setting(f"repeat-{middle}", "step_cache", cache),
    ]
    whole = max(2, steps // 4)
    for ratio in (0.5, 0.75):
        for context in ("fresh", "cached"):
            options = {**TOKENS, "context": context, "ratio": ratio, "first_steps": whole}
            settings.append(tofu(f"tokens-{context}-{ratio:g}", **options))
    half = {**TOKENS, "ratio": 0.5, "first_steps": whole}
    cache = {"total": steps, "computed": counts[0], "first": whole, "order": 1}
    settings += [
        tofu("tokens-temporal-0.5", **{**half, "restore": "temporal"}),
        tofu("tokens-blend-0.5", **{**half, "restore": "blend"}),
        tofu("tokens-random-0.5", **{**half, "method": "random"}),
        tofu("tokens-none-0.5", **{**half, "context": "none"}),
        Setting(
            f"stack-{counts[0]}",
            "stack",
            {
                "of": [
                    tofu("tokens", **half).to_dict(),
                    Setting("line", "step_cache", cache).to_dict(),
                ]
            },
        ),
        *(tofu(f"{method}-0.5", method=method, ratio=0.5) for method in ("tofu", "tome", "pitome")),
        tofu("random-0.5", method="random", ratio=0.5),
    ]
    for setting in settings:
        yield Trial(setting, steps)


STAGES = {"grid": grid, "front": front}


def measure(
    loaded: Loaded, trial: Trial, prompts: list[str], seed: int, call: dict[str, Any]
) -> tuple[Tensor, Applied]:
    """The pictures of one trial, uint8 [n, 3, H, W], and what was applied."""
    call = {**call, "num_inference_steps": trial.steps, "output_type": "pt"}
    with trial.setting.applied(loaded.pipe) as applied:
        pictures = one_batch(loaded.pipe, prompts, seed, call | applied.call).images
        # Read while it is applied: a summary is of a handle in use.
        applied.saving = known_saving(trial.setting, applied, trial.steps)
    return pictures.mul(255).round().to(torch.uint8).cpu(), applied


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
        """Of all prompts, and the FLOPs saved."""
        parts, saving = [], None
        for start in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[start : start + self.batch_size]
            made, applied = measure(self.loaded, trial, batch, self.seed + start, self.call)
            parts.append(made)
            saving = applied.saving
        if saving is None:
            call = {**self.call, "num_inference_steps": trial.steps}
            bench = Bench(self.loaded.pipe, self.prompts[:1], self.seed, call)
            saving = bench.flops(UNREDUCED) / bench.flops(trial.setting)
        return torch.cat(parts), saving

    def row(self, trial: Trial) -> dict[str, Any]:
        """One row, in the form that the report reads."""
        if trial.steps not in self.references:
            self.references[trial.steps], _ = self.pictures(Trial(UNREDUCED, trial.steps))
        reference = self.references[trial.steps]
        made, saving = self.pictures(trial)
        drift = psnr_db(made, reference)
        return {
            **self.about(trial),
            "setting": trial.setting.to_dict(),
            **self.provenance,
            "flops_ratio": round(saving, 4),
            "speed": None,
            "metrics": {"psnr_db": of_mean(drift).entry()},
            "psnr_db": [round(value, 2) for value in drift.tolist()],
        }

    def about(self, trial: Trial) -> dict[str, Any]:
        """What tells a row from others: a setting's name stands for its options."""
        name = self.loaded.name
        where = {
            "pipeline": name,
            "weights": self.loaded.identity()["weights"],
            "n": len(self.prompts),
            "seed": self.seed,
            "steps": trial.steps,
            "call": self.call,
        }
        size = f"-{self.call['width']}px" if "width" in self.call else ""
        n = len(self.prompts)
        return {"id": f"{name}{size}-{trial.steps}steps-n{n}/{trial.setting.name}", **where}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed process left unfinished is passed over."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def mend(path: Path) -> None:
    """Cut off a line that a killed process left unfinished, before others are added behind it."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row in one write, so that several processes can."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `generate` but the setting, and the stage."""
    generate.add_run_arguments(parser)
    parser.add_argument("--stage", choices=sorted(STAGES), required=True)


def main(args: argparse.Namespace) -> None:
    """`python -m eval study`. A mistake in the arguments is a ValueError."""
    loaded = generate.load(args.pipeline, args.dtype)
    prompts = first(load_prompts(args.prompts), args.n)
    call = generate.call_of(args)
    del call["num_inference_steps"]
    study = Study(loaded, prompts, args.seed, args.batch_size, call)
    state = generate.processes()
    if state.is_main_process:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        mend(args.out)
    state.wait_for_everyone()
    done = {row["id"] for row in read(args.out)}
    trials = list(STAGES[args.stage](args.steps))
    if args.stage != "grid":
        trials += [Trial(setting, args.steps) for setting in others(loaded.pipe, [0.5])]
    todo = [trial for trial in trials if study.about(trial)["id"] not in done]
    mine = todo[state.process_index :: state.num_processes]
    for trial in tqdm(mine, desc=args.stage, unit=" rows", disable=not state.is_main_process):
        append(args.out, study.row(trial))
