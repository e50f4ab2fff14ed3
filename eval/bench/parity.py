"""Whether kernels predict what the reference does, asked of a suite's denoisers before they are timed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch
from torch import Tensor

from eval.bench.denoisers import Bench, Cell
from eval.bench.models import SUITES, free_memory, here
from tofu_diffusers import KEYS_VALUES

CHECKED = 0.03
"""Most that outputs may differ, |kernels - reference| / |reference|: bfloat16, a few blocks deep."""
CHECKED_STEPS = 4


def save_predictions(suite: str, count: int, path: str) -> None:
    """The predictions of a suite's first cases, two layers deep where it can be, after some reduced steps."""
    device, dtype = here()
    found = {}
    for case in SUITES[suite][:count]:
        bench = Bench(case.shallow(), device, dtype)
        for keys_values in KEYS_VALUES:
            cell = Cell("tofu", 0.5, "block", keys_values, "random")
            with bench.applied(cell, *bench.models[0]) as lane:
                for _ in range(CHECKED_STEPS):
                    out = lane.forward()
            found[f"{case.model} {case.size} {keys_values}"] = out.float().cpu()
        free_memory()
    torch.save(found, path)


def check_kernels(suite: str, count: int) -> dict[str, float]:
    """|kernels - reference| / |reference| of a suite's first cases; the reference has its own process.

    Raises:
        ValueError: if they differ by more than `CHECKED`.
        subprocess.CalledProcessError: if the reference fails.
    """
    call = (
        "import sys; from eval.bench.parity import save_predictions; "
        f"save_predictions({suite!r}, {count}, sys.argv[1])"
    )
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = f"{folder}/mine.pt", f"{folder}/reference.pt"
        save_predictions(suite, count, mine)
        free_memory()
        environment = {**os.environ, "TOFU_KERNELS": "reference"}
        subprocess.run([sys.executable, "-c", call, theirs], env=environment, check=True)
        return compare(torch.load(mine), torch.load(theirs))


def compare(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Relative distances by name.

    Raises:
        ValueError: if one is more than `CHECKED`, or not a number.
    """
    errors = {name: float((mine[name] - x).norm() / x.norm()) for name, x in theirs.items()}
    wrong = {name: error for name, error in errors.items() if not error <= CHECKED}
    if wrong:
        raise ValueError(
            f"with kernels the predictions differ from the reference's by more than {CHECKED}: {wrong}; "
            "nothing is timed. Run tests/kernels/test_kernels_triton.py, or set TOFU_KERNELS=reference"
        )
    return errors


def kernels_run() -> bool:
    """Whether operations here run in Triton."""
    return torch.cuda.is_available() and hasattr(torch.ops.tofu, "best_match")
