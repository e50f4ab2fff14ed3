"""Probes for importance source "gradient", and how well they guess.

    python -m eval calibrate --pipeline unet -n 16 --seed 1000 --out eval/results/probes_unet.safetensors

They are fitted on the last n prompts, as evaluations take the first. FILE.json, beside it, says what they
were fitted on, and by block the rank correlation with gradient norms of pictures left out.
"""

from __future__ import annotations

import argparse
import json

from tqdm import tqdm

from eval.generate import run
from eval.generate.prompts import first, load_prompts
from eval.provenance import provenance
from tofu_diffusers import calibrate_gradient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `generate` but the setting."""
    run.add_run_arguments(
        parser, out="safetensors file", n="only the last n prompts", batches=False
    )


def main(args: argparse.Namespace) -> None:
    """`python -m eval calibrate`. A mistake in the arguments is a ValueError."""
    prompts = first(load_prompts(args.prompts, args.prompt_column)[::-1], args.n)[::-1]
    loaded = run.load(args.pipeline, args.dtype, scheduler=args.scheduler)
    call = run.call_of(args, loaded.pipe)
    agreement = calibrate_gradient(
        loaded.pipe, tqdm(prompts, unit=" prompts"), args.out, seed=args.seed, **call
    )
    about = {
        **loaded.identity(),
        **provenance(loaded.device),
        "n": len(prompts),
        "seed": args.seed,
        "call": call,
        "rank_correlation": {block: round(value, 3) for block, value in agreement.items()},
    }
    beside = args.out.with_suffix(".json")
    beside.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
