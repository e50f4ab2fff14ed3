"""Train both pipelines on a GPU and generate what they are judged by, in parts of a few minutes.

    make train-gpu OUT=folder                                 # or: python -m pipelines.emoji.gpu --out folder
    make train-gpu OUT=folder WHEELS=wheels PYTHON=python3    # without a network

Each call goes on where the last one stopped, and ends by itself. A stage that was interrupted goes on from
its checkpoint beside the data, so on the same machine only; finished ones lie in the output folder in half
precision, and `--carried` names a copy of it on another machine. In the end it holds

    unet.tar, mmdit.tar    the weights, to be unpacked in pipelines/emoji
    unet.npz, mmdit.npz    pictures, for python -m eval.studies.emoji.quality
    log.jsonl              losses and minutes

Without a GPU, `--trial` tries it out with two steps of every stage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.gpu_command import cut_off_after, start_with_wheels

if TYPE_CHECKING:
    import torch

    from pipelines.emoji.loop import Budget

WORK = Path(__file__).parent / ".work"
PACKAGES = ("torch", "numpy", "PIL", "diffusers", "transformers", "tokenizers", "safetensors")
SHARES = {
    "vae": 0.05, "decoder": 0.05, "text": 0.01, "unet32": 0.1, "unet64": 0.09, "unet128": 0.1,
    "mmdit32": 0.1, "mmdit64": 0.09, "mmdit128": 0.13,
}  # fmt: skip
"""Of all minutes, in the order of the stages; the rest is for starting, compiling and 5,600 pictures.

At 25 minutes three calls of nine end after unet64, after mmdit64 and after the pictures, so that none of
them breaks off a stage.
"""
STARTING = 90.0
"""Seconds that must be left for anything to be begun: a denoiser compiles for up to a minute."""
LATER = {"text": "unet32", "unet64": "unet128", "mmdit32": "mmdit64", "mmdit64": "mmdit128"}
"""Stages that nothing needs any more after another one.  The text encoder of unet32 is needed to the end."""
PARTS = {"unet": ("weights",), "mmdit": ("mmdit/transformer", "mmdit/scheduler")}
FINAL = tuple(f"{model}.{kind}" for model in PARTS for kind in ("tar", "npz"))
BATCH = 256
FILES, FILE_BYTES, ALL_BYTES = 8, 16 * 2**20, 64 * 2**20
"""What may come back from the machine."""


@dataclass(frozen=True)
class Job:
    """One call, from `began` to `until` of time.monotonic().

    budgets: of every stage, in their order; starting: seconds that must be left; steps: of a picture;
    most: pictures of a set, all if None.
    """

    out: Path
    work: Path
    data: Path
    device: torch.device
    began: float
    until: float
    budgets: Mapping[str, Budget]
    steps: int
    starting: float = STARTING
    most: int | None = None

    @property
    def log(self) -> Path:
        """Where every stage and every call of this command leaves a line."""
        return self.work / "log.jsonl"

    @property
    def home(self) -> Path:
        """Of the exported weights."""
        return self.work / "exported"

    @property
    def exported(self) -> bool:
        """Whether every model's archive is there."""
        return all((self.work / f"{model}.tar").exists() for model in PARTS)

    @property
    def enough(self) -> bool:
        """Whether something may still be begun."""
        return self.until - time.monotonic() > self.starting


def run(job: Job, *carried: Path) -> bool:
    """Every stage, then the pictures, until the time is up; whether all is done."""
    job.work.mkdir(parents=True, exist_ok=True)
    job.out.mkdir(parents=True, exist_ok=True)
    for folder in carried:
        take_in(job, folder)
    try:
        return _train(job) and _generate(job)
    finally:
        minutes = (time.monotonic() - job.began) / 60
        with job.log.open("a") as file:
            file.write(json.dumps({"stage": "gpu", "minutes": round(minutes, 3)}) + "\n")
        give_out(job)


def _train(job: Job) -> bool:
    """All stages and the archives of their weights."""
    from pipelines.emoji import data
    from pipelines.emoji.export import export
    from pipelines.emoji.loop import trained_on
    from pipelines.emoji.train import run_stage

    if job.exported:
        return True
    emoji = data.load(job.data)
    for stage in job.budgets:
        path = job.work / f"{stage}.pt"
        if path.exists() and trained_on(path) != emoji.digest:
            raise SystemExit(
                f"{path} was trained on other data than {job.data}; bring these back, or train anew in "
                "other folders: --work, --out"
            )
    for stage, budget in job.budgets.items():
        if is_done(job.work, stage):
            continue
        if not job.enough:
            return False
        if run_stage(stage, budget, emoji, job.work, job.device).progress < 1:
            return False
        finish(job.work / f"{stage}.pt")
        give_out(job)
    export(emoji, job.work, job.home)
    for model, parts in PARTS.items():
        path = job.work / f"{model}.part"
        with tarfile.open(path, "w") as archive:
            for part in parts:
                archive.add(job.home / part, part)
        path.replace(job.work / f"{model}.tar")
    return True


def _generate(job: Job) -> bool:
    """The pictures of both, by the weights in the archives, whichever machine wrote these."""
    from pipelines.emoji import data
    from pipelines.emoji.prompts import prompt_sets

    missing = [model for model in PARTS if not (job.work / f"{model}.npz").exists()]
    if not missing:
        return True
    for model in PARTS:  # the second has parts of the first
        with tarfile.open(job.work / f"{model}.tar") as archive:
            archive.extractall(job.home, filter="data")
    sets = {name: prompts[: job.most] for name, prompts in prompt_sets(data.load(job.data)).items()}
    for model in missing:
        if not (job.enough and generate(job, model, sets)):
            return False
        give_out(job)
    return True


def finish(checkpoint: Path) -> None:
    """Leave of a checkpoint the averaged weights, in half precision."""
    import torch

    from pipelines.emoji.loop import save_atomic

    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    kept = {"ema": {k: v.half() for k, v in state["ema"].items()}, "basis": state["basis"]}
    save_atomic(kept, checkpoint)


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint holds no more than the averaged weights, as `finish` leaves it."""
    import torch

    if not checkpoint.exists():
        return False
    return "module" not in torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)


def is_done(work: Path, stage: str) -> bool:
    """Whether a stage is finished, or no longer needed."""
    return is_finished(work / f"{stage}.pt") or (stage in LATER and is_done(work, LATER[stage]))


def take_in(job: Job, folder: Path) -> None:
    """What an earlier call finished, unless it is finished here."""
    for name in [*(f"{stage}.pt" for stage in job.budgets), *FINAL, "log.jsonl"]:
        source, target = folder / name, job.work / name
        here = is_finished(target) if name.endswith(".pt") else target.exists()
        if source.exists() and not here:
            shutil.copyfile(source, target)


def give_out(job: Job) -> None:
    """Make the output folder hold what the next machine needs, or in the end what is wanted.

    Raises:
        SystemExit: if it is more than may come back.
    """
    stages = [] if job.exported else list(job.budgets)
    stages = [s for s in stages if not (s in LATER and is_done(job.work, LATER[s]))]
    wanted = [f"{stage}.pt" for stage in stages if is_finished(job.work / f"{stage}.pt")]
    wanted += [name for name in (*FINAL, "log.jsonl") if (job.work / name).exists()]
    for stage in job.budgets:
        if f"{stage}.pt" not in wanted:
            (job.out / f"{stage}.pt").unlink(missing_ok=True)
    for name in wanted:
        shutil.copyfile(job.work / name, job.out / name)
    sizes = {file.name: file.stat().st_size for file in job.out.iterdir()}
    total = sum(sizes.values())
    if len(sizes) > FILES or max(sizes.values()) > FILE_BYTES or total > ALL_BYTES:
        raise SystemExit(
            f"{job.out} holds {len(sizes)} files, {sizes}, of {total} bytes in all; at most {FILES} of "
            f"{FILE_BYTES} bytes each, {ALL_BYTES} in all, may come back: take away those of other commands"
        )


def generate(job: Job, model: str, sets: Mapping[str, Sequence[str]]) -> bool:
    """The pictures of one pipeline in one file; whether the time was enough."""
    from pipelines.emoji import data, load_pipeline, samples

    pipe: Any = load_pipeline(model, home=job.home).to(job.device)
    pipe.set_progress_bar_config(disable=True)
    about = samples.described(model, sets, data.SIZE, job.steps, job.home)
    out = job.work / samples.file_name(model, data.SIZE)
    return samples.generate(pipe, about, out, batch=BATCH, until=job.until)


# ---- the command -----------------------------------------------------------------------------------


def used(log: Path) -> float:
    """Minutes of all calls so far."""
    rows = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    return sum(row["minutes"] for row in rows if row["stage"] == "gpu")


def budgets(total: float, until: float, trial: bool) -> dict[str, Budget]:
    """Share `total` minutes among the stages; a trial gets two steps of each."""
    from pipelines.emoji.loop import Budget

    if trial:
        return {stage: Budget(steps=2, until=until) for stage in SHARES}
    return {stage: Budget(minutes=total * share, until=until) for stage, share in SHARES.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """0, whether all is done or to be continued. A mistake in the arguments ends with 2."""
    began = time.monotonic()
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="pipelines.emoji.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `start_with_wheels` knows --wheels by its whole name
    )
    parser.add_argument("--out", type=Path, help="folder for what comes back")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (%(default)s)")
    parser.add_argument("--total", type=float, default=25.0, help="of all calls (%(default)s)")
    parser.add_argument("--carried", type=Path, help="folder with what came back before")
    parser.add_argument(
        "--work", type=Path, help="checkpoints; default: gpu or trial beside the data"
    )
    parser.add_argument("--data", type=Path, default=WORK / "emoji.npz", help="(%(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of packages to install first")
    parser.add_argument("--trial", action="store_true", help="try it out: two steps of each stage")
    args = parser.parse_args(given)
    if args.out is None:
        parser.error("--out is needed: the folder for what comes back")
    if args.minutes <= 0 or args.total <= 0:
        parser.error(f"minutes {args.minutes:g} and total {args.total:g} must be above 0")
    start_with_wheels(parser, args.wheels, "pipelines.emoji.gpu", given)
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        parser.error(f"no {', '.join(missing)} here; put wheels in a folder and name it: --wheels")
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.trial:
        parser.error("no GPU here; --trial tries the command out, `make train` trains on a CPU")
    work = args.work or args.data.parent / ("trial" if args.trial else "gpu")
    carried = [args.out, *([args.carried] if args.carried else [])]
    spent = max(used(folder / "log.jsonl") for folder in (work, *carried))
    left = min(args.minutes, args.total - spent)
    finished = any(all((folder / n).exists() for n in FINAL) for folder in (work, *carried))
    if left <= 0 and not finished:
        parser.error(f"{spent:.1f} of {args.total:g} minutes are used; raise --total")
    until = began + 60 * left
    # For the few products in float32, those of generation.
    torch.set_float32_matmul_precision("high")
    from pipelines.emoji.samples import STEPS

    stages = budgets(args.total, until, args.trial)
    job = Job(args.out, work, args.data, device, began, until, stages, STEPS)
    if args.trial:
        job = replace(job, starting=0.0, steps=2, most=2)
    with cut_off_after(max(left, 0)):
        done = run(job, *carried)
    if finished:
        print(
            f"these were finished before; to train anew, name other folders: not {work}, {args.out}"
        )
    minutes = f"{used(job.log):.1f} of {args.total:g} minutes are used"
    print(f"done; {minutes}" if done else f"to be continued by the same command; {minutes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
