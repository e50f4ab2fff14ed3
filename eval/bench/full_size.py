"""How many FLOPs full-size denoisers save, counted without weights and without a GPU.

    python -m eval flops --out eval/results/full_size.jsonl

Every row is what `apply_tofu(pipe, ...).summary()` says before the first picture: of a typical generation, at
a size that people use. Nothing is computed: shapes alone run through the model, and torch counts the products
that they would take.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eval import jsonl
from eval.bench.models import USUAL, Case
from eval.files import mend
from eval.generate.settings import Setting
from eval.provenance import provenance
from tofu_diffusers import apply_tofu

# What people type.
SETTINGS = tuple(
    Setting(f"{name}-{amount:g}", "tofu", {name: amount})
    for name, amounts in (("ratio", (0.25, 0.5, 0.75)), ("speedup", (1.5, 2, 3)))
    for amount in amounts
)


@contextmanager
def example_of(case: Case) -> Iterator[dict[str, Any]]:
    """Inside it FLOPs of the case's family are counted at the case's size; gives its arguments."""
    family, inputs = case.family, case.inputs(torch.device("cpu"), torch.float32)
    family.example = lambda model: inputs
    try:
        yield inputs
    finally:
        del family.example


def measure(out: Path, cases: Sequence[Case], settings: Sequence[Setting] = SETTINGS) -> None:
    """Append the rows that a file lacks."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mend(out)
    done = {row["id"] for row in jsonl.read(out)}
    # Of the code that this process runs, whatever becomes of the checkout meanwhile.
    about = provenance()
    for case in cases:
        ids = {setting.name: f"{case.model}-{case.size}/{setting.name}" for setting in settings}
        lacking = [setting for setting in settings if ids[setting.name] not in done]
        if not lacking:
            continue
        with torch.device("meta"):
            model = case.cls.from_config(dict(case.config))
        for setting in lacking:
            row = {"id": ids[setting.name], "model": case.model, "size": case.size}
            row |= {"setting": setting.to_dict(), **counted(case, model, setting), **about}
            jsonl.append(out, row)
            print(f"{row['id']}: {row['flops_ratio']:.2f}x", flush=True)


def counted(case: Case, model: Any, setting: Setting) -> dict[str, Any]:
    """What a row says that was counted.

    Args:
        model: Of the case, on the meta device.
    """
    family = case.family
    with example_of(case) as inputs, apply_tofu(model, **setting.options) as handle:
        summary = handle.summary()
        (config,) = handle.configs
        grids = family.grids(model, inputs)
    steps = summary.steps[0].steps if summary.steps else summary.rows[0].calls
    return {
        "config": json.loads(config.to_json()),
        "steps": steps,
        "tokens": max(grids[stack.resolution].tokens for stack in family.block_stacks(model)),
        "text": case.text,
        # One image, one branch of guidance, one step.
        "step_flops": summary.flops_unreduced // (steps * case.batch),
        "flops_ratio": round(summary.flops_unreduced / summary.flops_run, 4),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON-lines file; goes on where it was"
    )


def main(args: argparse.Namespace) -> None:
    """`python -m eval flops`."""
    measure(args.out, USUAL)
