"""How the cost of plans, merges and unmerges grows with the tokens, against the machine's bound.

    python -m eval growth --out growth.csv

A row an operation and size: its time and, where kernels run, that of the reference, which has a process of
its own, and how far their results are apart; and the bound, the time of the fewest bytes that it must move
or of its products' FLOPs at the rates that a plain copy and a square product reach here.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench.models import free_memory, here
from eval.bench.operations import CHANNELS, Operation, operations
from eval.bench.parity import kernels_run
from eval.provenance import ROOT, provenance
from eval.statistics import spread

FIELDS = (
    "operation", "implementation", "tokens", "channels", "dtype", "ms", "ms_p20", "ms_p80", "reference_ms",
    "bound_ms", "bound_by", "bound_share", "difference", "device", "threads", "torch", "commit",
)  # fmt: skip
SIZES = (1024, 4096, 16384, 65536, 131072)
TRIAL_SIZES = (64, 256)
"""To see that it runs, in no time."""
MOST_FLOPS = 1e12
"""Of one call on a CPU; what takes more is left out there."""
AGREE = 0.98
"""Least share of tokens that both implementations give the same match: near ties may turn on rounding."""
DIFFER = 0.01
"""Most that merged and unmerged tokens may differ, |kernel - reference| / |reference|, in bfloat16."""


def affordable(tokens: int) -> dict[str, Operation]:
    """The operations that this machine does in seconds; what a CPU does not is said."""
    found = operations(tokens)
    if here()[0].type == "cuda":
        return found
    for name, each in found.items():
        if each.flops > MOST_FLOPS:
            print(
                f"{name} of {tokens} tokens is left out: {each.flops:.2g} FLOPs, on a CPU "
                f"{MOST_FLOPS:.2g} at most",
                flush=True,
            )
    return {name: each for name, each in found.items() if each.flops <= MOST_FLOPS}


def clock(call: Callable[[], Any], least: int = 3, most: int = 20) -> list[float]:
    """Times of a call in ms, with what the cache held of its inputs flushed before each."""
    device = here()[0]
    flush = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    for _ in range(2):
        call()
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < least or (len(times) < most and time.monotonic() - begun < 0.5):
        flush.zero_()
        times.append(once(call))
    return times


def once(call: Callable[[], Any]) -> float:
    """Time of a call in ms; on a GPU its own, without what was asked for before."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start_mark, end_mark = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_mark.record()
    call()
    end_mark.record()
    torch.cuda.synchronize()
    return float(start_mark.elapsed_time(end_mark))


def rates() -> tuple[float, float]:
    """Bytes a ms that a copy moves (read and written), and FLOPs a ms of a square product, at their best."""
    device, dtype = here()
    count, side = (2**30, 8192) if device.type == "cuda" else (2**27, 2048)
    block = torch.zeros(count, dtype=torch.uint8, device=device)
    target, square = torch.empty_like(block), torch.randn(side, side, device=device, dtype=dtype)
    copied = min(clock(lambda: target.copy_(block)))
    multiplied = min(clock(lambda: square @ square))
    return 2 * count / copied, 2 * side**3 / multiplied


def save_reference(path: str, sizes: Sequence[int]) -> None:
    """Times and results of every operation and size, as run here, into a file."""
    found = {}
    for tokens in sizes:
        found[tokens] = {
            name: (clock(each.call), each.call()) for name, each in operations(tokens).items()
        }
    torch.save(found, path)


def reference(sizes: Sequence[int], until: float | None) -> dict[int, dict[str, Any]] | None:
    """What `save_reference` finds in a process that runs nothing else; None: the time was up before."""
    call = (
        "import sys; from eval.bench.growth import save_reference; "
        f"save_reference(sys.argv[1], {tuple(sizes)})"
    )
    environment = {**os.environ, "TOFU_KERNELS": "reference"}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/reference.pt"
        left = None if until is None else max(1.0, until - time.monotonic())
        try:
            command = [sys.executable, "-c", call, path]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=left)
        except subprocess.TimeoutExpired:
            return None
        # A plan is a type of this library, which torch does not know to be harmless.
        found: dict[int, dict[str, Any]] = torch.load(path, weights_only=False)
        return found


def difference(got: Any, expected: Any) -> float:
    """Share of tokens with another match, of plans; else the relative distance.

    Raises:
        ValueError: if it is more than rounding explains.
    """
    if isinstance(got, tuple):
        matches = [plan[0].gather(1, plan[1]) for plan in (got, expected)]
        apart = float((matches[0] != matches[1]).float().mean())
        most = 1 - AGREE
    else:
        apart = float((got.float() - expected.float()).norm() / expected.float().norm())
        most = DIFFER
    if not apart <= most:
        raise ValueError(f"kernel and reference differ by {apart:.3g}, more than {most:.3g}")
    return apart


def measure(
    out: Path, sizes: Sequence[int], until: float | None = None, commit: str | None = None
) -> str | None:
    """Times of the operations, against those of the reference where kernels run.

    Args:
        out: A CSV file.
        sizes: How many tokens.
        until: When, by `time.monotonic`, the reference is stopped.
        commit: For checkouts without their history.

    Returns:
        What was found, in a line; None: the time was up before the reference was there.

    Raises:
        ValueError: if a kernel's result is not the reference's, before that operation is timed.
    """
    device, dtype = here()
    kernels = kernels_run()
    theirs = reference(sizes, until) if kernels else {}
    if theirs is None:
        return None
    about = provenance(device)
    bandwidth, rate = rates()
    rows: list[dict[str, Any]] = []
    for tokens in sizes:
        for name, each in affordable(tokens).items():
            apart = None
            if each.sorts:
                each.call().check()
            elif kernels:
                apart = difference(each.call(), theirs[tokens][name][1])
            times = clock(each.call)
            mine = spread(times)
            bounds = {"bytes": each.bytes / bandwidth, "flops": each.flops / rate}
            by = max(bounds, key=lambda name: bounds[name])
            rows.append(
                {
                    "operation": name,
                    "implementation": "triton" if kernels else "reference",
                    "tokens": tokens,
                    "channels": CHANNELS,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": mine["value"],
                    "ms_p20": mine["low"],
                    "ms_p80": mine["high"],
                    "reference_ms": statistics.median(
                        theirs[tokens][name][0] if kernels else times
                    ),
                    "bound_ms": bounds[by],
                    "bound_by": by,
                    "bound_share": bounds[by] / mine["value"],
                    "difference": apart,
                    "device": about["device"],
                    "threads": about["threads"],
                    "torch": about["versions"]["torch"],
                    "commit": commit or about["commit"],
                }
            )
            write_rows(out, rows)
        free_memory()
    return f"{len(rows)} rows; copy {bandwidth / 1e9:.3g} TB/s, product {rate / 1e9:.4g} TFLOP/s"


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and the file for it."""
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=SIZES, help="of one image (%(default)s)"
    )


def main(args: argparse.Namespace) -> None:
    """`python -m eval growth`. A mistake in the arguments is a ValueError."""
    if min(args.tokens) < 2:
        raise ValueError(f"tokens {min(args.tokens)}: give 2 or more, so that half can be removed")
    print(measure(args.out, sorted(set(args.tokens))))
