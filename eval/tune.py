"""Which settings drift least at a speed-up, on a pipeline and prompts of yours? With a page to look at.

    python -m eval tune --pipeline path/to/model --prompts prompts.txt --speedup 1.5 2 3 --out runs/tuned
    torchrun --nproc-per-node 2 -m eval tune --pipeline unet --speedup 2 --out runs/tuned

Searches on the first n prompts and compares on those behind them. --out gets tuned.json, which
`apply_tofu(pipe, "runs/tuned", speedup=2.0)` takes, report.html and what was measured; stopped anywhere, the
same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.files import write_whole
from eval.generate import run
from eval.generate.prompts import load_prompts
from eval.provenance import provenance
from eval.report import tune_page
from tofu_diffusers import tune

SHOWN = 3
"""Prompts with pictures on the page."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `generate` but the setting, and what to tune for."""
    run.add_run_arguments(
        parser,
        out="folder with tuned.json and report.html; goes on where it was",
        n="the first n prompts are searched on, 1 to 16 (%(default)s)",
        batches=False,
    )
    parser.set_defaults(n=4)
    parser.add_argument(
        "--speedup", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="(%(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=4, help="prompts behind the n to compare on (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for the search (%(default)s)")


def main(args: argparse.Namespace) -> None:
    """`python -m eval tune`. A mistake in the arguments is a ValueError."""
    if args.held_out < 1:
        raise ValueError(f"--held-out {args.held_out} is below 1")
    given = load_prompts(args.prompts, args.prompt_column)
    if len(given) < args.n + args.held_out:
        raise ValueError(
            f"-n {args.n} prompts to search on and --held-out {args.held_out} to compare on are more than "
            f"the {len(given)} given; lower one, or give more"
        )
    prompts = given[: args.n + args.held_out]
    loaded = run.load(args.pipeline, args.dtype, scheduler=args.scheduler)
    call = run.call_of(args, loaded.pipe)
    searched, held_out = prompts[: args.n], prompts[args.n :]
    tuned = tune(
        loaded.pipe,
        searched,
        speedup=args.speedup,
        held_out=held_out,
        minutes=args.minutes,
        folder=args.out / "search",
        seed=args.seed,
        **call,
    )
    state = run.processes()
    if state.is_main_process:
        print(tuned)
        tuned.save(args.out)
        pictures = tune_page.pictures(
            loaded.pipe, tuned, held_out[:SHOWN], args.seed + len(searched), call
        )
        about = {"model": loaded.name, **call, **provenance(loaded.device)}
        out: Path = args.out / "report.html"
        write_whole(out, tune_page.page(tuned, pictures, about).encode())
        print(f"{out}; apply_tofu(pipe, {str(args.out)!r}, speedup={tuned.rows[0].speedup:g})")
    state.wait_for_everyone()
    state.destroy_process_group()
