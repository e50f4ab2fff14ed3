"""What is `tune` worth on the embedded pipelines? Tunes on a few small pictures, and reports on others.

    python -m eval.studies.emoji.tuned --model mmdit --out eval/results/tuned_mmdit.jsonl

At each size, one row a speed-up each for the default, the tuned setting and as many steps fewer. The prompts
tuned on come behind those reported on. Stopped anywhere, the same command goes on with what has no row.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from eval.baselines.fewer_steps import add_scheduler_argument, scheduler_like
from eval.bench.pipeline import one_batch
from eval.generate.prompts import first, load_prompts
from eval.jsonl import append, read
from eval.metrics.paired import psnr_db
from eval.provenance import provenance
from eval.statistics import of_mean
from pipelines.emoji import GUIDANCE, MODELS, load_pipeline, weights_hash
from tofu_diffusers import Tuned, apply_tofu, tune

FIRST = 100
"""Of the built-in prompts, where those tuned on begin."""
CHECKED = 4
"""Prompts that `tune` keeps apart for its own check, behind those that it searches on."""
BATCH = 8


def pictures(pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> Tensor:
    """Of all prompts, uint8 [n, 3, H, W]; the n-th has seed n."""
    parts = [
        one_batch(pipe, prompts[start : start + BATCH], start, {**call, "output_type": "pt"}).images
        for start in range(0, len(prompts), BATCH)
    ]
    return torch.cat(parts).mul(255).round().to(torch.uint8)


def searched(folder: Path, speedup: float) -> dict[str, list[float]]:
    """Of every setting tried, FLOPs and the mean dB of the latents, on the prompts searched on."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read(folder / "scores.jsonl"):
        speed, name, *_ = line["key"].split("/")
        if "held out" not in line["key"] and speed == f"{speedup:g}":
            found.setdefault(name.split(" StepSkipping")[0], []).append(line)
    return {
        name: [
            round(lines[-1]["flops"], 3),
            round(sum(line["latents_db"] for line in lines) / len(lines), 2),
        ]
        for name, lines in found.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, and add the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument(
        "--speedup", type=float, nargs="+", default=[1.5, 2, 3, 4, 5], help="(%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=25, help="(%(default)s)")
    add_scheduler_argument(parser)
    parser.add_argument("--searched", type=int, default=4, help="prompts tuned on (%(default)s)")
    parser.add_argument("--side", type=int, default=64, help="pixels to tune at (%(default)s)")
    parser.add_argument(
        "--report-side", type=int, nargs="+", default=[64, 128], help="pixels (%(default)s)"
    )
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="to tune at (%(default)s)")
    parser.add_argument("--report-guidance", type=float, help="default: that")
    parser.add_argument("-n", type=int, default=32, help="prompts to report on (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="for a search (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to add to")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler:
        pipe.scheduler = scheduler_like(pipe.scheduler, args.scheduler)
    about = provenance()
    prompts = load_prompts("emoji")
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    at = {"height": args.side, "width": args.side}
    calls, stages = {}, {}
    for side in args.report_side:
        calls[side] = call = {**given, "height": side, "width": side}
        stage = f"{args.model}-{side}px-{args.steps}steps-n{args.n}"
        stage += f"-{args.scheduler}" if args.scheduler else ""
        if args.report_guidance is not None:
            call["guidance_scale"] = args.report_guidance
            stage += f"-guidance{args.report_guidance:g}"
        stages[side] = stage + (f"-of{args.searched}" if args.searched != 4 else "")
    done = {row["id"] for row in read(args.out)}
    reported = first(prompts, args.n, least=2)
    whole: dict[int, Tensor] = {}
    for speedup in args.speedup:
        sides = [side for side in stages if f"{stages[side]}/tuned-{speedup:g}" not in done]
        if not sides:
            continue
        last = FIRST + args.searched
        with TemporaryDirectory() as folder:
            tuned = tune(
                pipe,
                prompts[FIRST:last],
                held_out=prompts[last : last + CHECKED],
                speedup=speedup,
                minutes=args.minutes,
                behind_db=float("inf"),  # so that all can be compared
                folder=folder,
                seed=1000,
                **given,
                **at,
            )
            tried = searched(Path(folder), speedup)
        print(tuned)
        for side in sides:
            call = calls[side]
            if side not in whole:
                whole[side] = pictures(pipe, reported, call)
            for kind, applied, changes in settings(pipe, tuned, speedup):
                with applied:
                    made = pictures(pipe, reported, {**call, **changes})
                drift = psnr_db(made, whole[side])
                row = next(each for each in tuned.rows if each.kind == kind)
                name = "steps" if kind == "fewer steps" else kind
                entry = {
                    "id": f"{stages[side]}/{name}-{speedup:g}",
                    "pipeline": args.model,
                    "weights": weights_hash(args.model),
                    "setting": {"name": row.name, "kind": kind, "options": {"speedup": speedup}},
                    "n": args.n,
                    "seed": 0,
                    "steps": args.steps,
                    "call": call,
                    **({"scheduler": args.scheduler} if args.scheduler else {}),
                    **about,
                    "flops_ratio": round(row.flops, 4),
                    "speed": None,
                    "plan": row.plan,
                    "tuned_on": {
                        "prompts": args.searched,
                        "guidance": args.guidance,
                        **at,
                        "minutes": tuned.about["minutes"],
                    },
                    "overfitted": speedup in tuned.overfitted,
                    **({"searched": tried} if kind == "tuned" else {}),
                    "metrics": {"psnr_db": of_mean(drift).entry()},
                    "psnr_db": [round(value, 2) for value in drift.tolist()],
                }
                append(args.out, entry)


def settings(pipe: Any, tuned: Tuned, speedup: float) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The kinds to report on, what is to be entered for each, and what is called otherwise.

    The tuned one comes last: with its row a speed-up is done.
    """
    steps = next(row.num_inference_steps for row in tuned.rows if row.kind == "fewer steps")
    yield "fewer steps", nullcontext(), {"num_inference_steps": steps}
    yield "default", apply_tofu(pipe, speedup=speedup), {}
    yield "tuned", apply_tofu(pipe, tuned, speedup=speedup), {}


if __name__ == "__main__":
    main()
