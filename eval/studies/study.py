"""Which combination loses least at which saving? Drift of many settings, each a row once it is measured.

    python -m eval study --pipeline unet --stage grid --out rows.jsonl
    torchrun --nproc-per-node 2 -m eval study --pipeline mmdit --stage front --out rows.jsonl

Stages: `typed`, ratios and speed-ups as people type them, with fewer steps; `front`, these and all other
ways to save, each at what it saves, with the default beside other packages and both workflows together;
`rules`, every skip rule at six speed-ups in 10, 25 and 50 steps; `rivals`, other packages' caches, with the
default beside each; `profiles`, each option of the token profile changed alone; `grid`, every valid
combination of method, merge, unmerge, scope and keys_values.

Drift is the PSNR to the unreduced picture of the same prompt and seed, savings are counted FLOPs. No picture
is kept and no time taken: `eval sweep` does both, for few settings. Stopped anywhere, the same command goes
on.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.bench.pipeline import UNREDUCED, Bench, one_batch
from eval.files import mend
from eval.generate import run
from eval.generate.failed import FailedPictures, failure, told
from eval.generate.manifest import differences
from eval.generate.prompts import first, load_prompts
from eval.generate.run import Loaded
from eval.generate.settings import known_saving
from eval.jsonl import append, read
from eval.metrics.paired import psnr_db
from eval.provenance import provenance
from eval.statistics import of_mean
from eval.studies.stages import STAGES, Trial, beside, caches
from eval.sweep import others


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
                own = {**call, **self.given(start), **applied.call, "output_type": "pt"}
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
            own = {**call, **self.given(start)}
            run += Bench(self.loaded.pipe, batch, self.seed + start, own).flops(trial.setting)
        own = {**call, **self.given(0, 1)}
        whole = Bench(self.loaded.pipe, self.prompts[:1], self.seed, own).flops(UNREDUCED)
        return len(self.prompts) * whole / run

    def given(self, start: int, count: int | None = None) -> dict[str, Any]:
        """What else the call of a batch is given, of prompts from the one at `start` on; here nothing."""
        return {}

    def row(self, trial: Trial) -> dict[str, Any]:
        """One row, in the form that the report reads."""
        if trial.steps not in self.references:
            try:
                self.references[trial.steps], _ = self.pictures(Trial(UNREDUCED, trial.steps))
            except FailedPictures as error:  # with them, every row of these steps
                raise ValueError(str(error)) from error
        reference = self.references[trial.steps]
        made, saving = self.pictures(trial)
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
    call = run.call_of(args, loaded.pipe)
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
    made = measured(study, trials, args.out, args.stage, state)
    if args.stage in ("front", "rivals"):
        state.wait_for_everyone()
        rows = {row["id"]: row for row in read(args.out)}
        found = (rows.get(study.about(trial)["id"]) for trial in trials)
        # The front has a curve of the own settings; what else is on it lies between their points.
        own = ("tofu", "fewer_steps") if args.stage == "front" else ()
        rivals = [row for row in found if row is not None and row["setting"]["kind"] not in own]
        more = [*beside(rivals, args.steps)]
        made |= measured(study, more, args.out, args.stage, state)
    without = [each.rpartition("/")[2] for each, has_row in made.items() if not has_row]
    if without:
        raise ValueError(
            f"{len(without)} of {len(made)} settings got no row, as pictures of theirs failed: "
            f"{', '.join(without)}"
        )


def measured(
    study: Study, trials: Sequence[Trial], out: Path, title: str, state: Any
) -> dict[str, bool]:
    """Add the rows of these trials that are not there.

    Args:
        out: JSON-lines file.
        title: Of the progress bar.
        state: Of accelerate, the processes that share the trials.

    Returns:
        Of each id that was to be added, whether it got a row: not if pictures failed.

    Raises:
        ValueError: if the file holds another row of the same name.
    """
    done = {row["id"]: row for row in read(out)}
    todo = []
    for trial in trials:
        about = study.about(trial)
        row = done.get(about["id"])
        if row is None:
            todo.append(trial)
        elif wrong := differences({name: row[name] for name in about}, about):
            raise ValueError(
                f"{out} holds another {about['id']}: {'; '.join(wrong)}; ask for the same, or choose "
                "another --out"
            )
    mine = todo[state.process_index :: state.num_processes]
    made: dict[str, bool] = {}
    for trial in tqdm(mine, desc=title, unit=" rows", disable=not state.is_main_process):
        try:
            append(out, study.row(trial))
            made[study.about(trial)["id"]] = True
        except FailedPictures as error:
            warnings.warn(f"{error}\nit gets no row", stacklevel=2)
            made[study.about(trial)["id"]] = False
    return made
