"""How long plans, folds and restores take by themselves, against the reference and the machine's bound.

A row an operation and size: its time and that of the reference, which runs in a process of its own; how far
their results are apart; and the bound, the time of the fewest bytes that it must move or of its products'
FLOPs at the rates that a plain copy and a square product reach here.
"""

from __future__ import annotations

import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tofu_diffusers as tofu
from eval.kernel_check import kernels_run
from eval.manifest import ROOT, provenance
from eval.speed import spread
from eval.suite_models import free_memory, here

KERNEL_FIELDS = (
    "operation", "implementation", "tokens", "channels", "dtype", "ms", "ms_p20", "ms_p80", "reference_ms",
    "bound_ms", "bound_by", "bound_share", "difference", "device", "torch", "commit",
)  # fmt: skip
SIZES = {"cuda": (1024, 4096, 16384, 65536, 131072), "cpu": (64, 256)}
CHANNELS = 640
AGREE = 0.98
"""Least share of tokens that both implementations give the same match: near ties may turn on rounding."""
DIFFER = 0.01
"""Most that folded and restored tokens may differ, |kernel - reference| / |reference|, in bfloat16."""


@dataclass(frozen=True)
class Operation:
    """What is timed, the fewest bytes that it must move, and its products' FLOPs."""

    call: Callable[[], Any]
    bytes: int
    flops: int = 0


def operations(tokens: int, plan: Any = None) -> dict[str, Operation]:
    """Half of the tokens removed, by one image's random tokens.

    "match" finds the best kept token of all removed ones (method random, whose own choice costs next to
    nothing); "energy" is PiToMe's, and a match behind it.

    Args:
        plan: For folds and restores; None: that of "match".
    """
    device, dtype = here()
    draw = torch.Generator(device).manual_seed(tokens)

    def drawn(count: int) -> Any:
        return torch.randn(1, count, CHANNELS, generator=draw, device=device, dtype=dtype)

    height = 1 << (tokens.bit_length() - 1) // 2
    x, kept, width = drawn(tokens), tokens // 2, CHANNELS * dtype.itemsize
    evidence = tofu.Evidence(x, tofu.TokenGrid(height, tokens // height), tokens - kept)
    random, pitome = (tofu.METHODS[name]() for name in ("random", "pitome"))
    plan = plan or random.plan(evidence)
    update = drawn(kept)
    indices, product = 8 * (tokens + kept), 2 * kept * (tokens - kept) * CHANNELS
    found = {
        "match": Operation(lambda: random.plan(evidence), tokens * width + indices, product),
        "energy": Operation(
            lambda: pitome.plan(evidence),
            tokens * width + indices,
            2 * tokens * tokens * CHANNELS + product,
        ),
    }
    moved = (tokens + kept) * width + indices
    for fold in tofu.FOLDS:
        # Pruning does not look at what it removes.
        least = 2 * kept * width + 8 * kept if fold == "prune" else moved
        found[f"fold {fold}"] = Operation(lambda fold=fold: tofu.reduce(x, plan, fold), least)
    found["restore copy"] = Operation(lambda: tofu.restore(update, plan, "copy"), moved)
    cache = tofu.UpdateCache.empty("taylor", 1, tokens, CHANNELS, dtype, device)
    step = torch.zeros((), device=device)
    for _ in range(2):
        cache.record(drawn(tokens), step)
        step += 1
    taylor = {"cache": cache, "step": step}
    found["restore taylor"] = Operation(
        lambda: tofu.restore(update, plan, "taylor", **taylor),
        # Value and slope of all read, of the kept ones written; the update in, the whole out.
        (3 * tokens + 3 * kept) * width + indices,
    )
    return found


def clock(call: Callable[[], Any], least: int = 3, most: int = 20) -> list[float]:
    """Times of a call in ms, with what the cache held of its inputs flushed before each."""
    if not torch.cuda.is_available():
        times = []
        for _ in range(least):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        call()
    marks: list[tuple[Any, Any]] = []
    begun = time.monotonic()
    while len(marks) < least or (len(marks) < most and time.monotonic() - begun < 0.5):
        flush.zero_()
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        call()
        pair[1].record()
        torch.cuda.synchronize()
        marks.append(pair)
    return [start.elapsed_time(end) for start, end in marks]


def rates() -> tuple[float, float]:
    """Bytes a ms that a copy moves (read and written), and FLOPs a ms of a square product, measured."""
    device, dtype = here()
    count, side = (2**30, 8192) if device.type == "cuda" else (2**22, 128)
    block = torch.zeros(count, dtype=torch.uint8, device=device)
    target, square = torch.empty_like(block), torch.randn(side, side, device=device, dtype=dtype)
    copied = statistics.median(clock(lambda: target.copy_(block)))
    multiplied = statistics.median(clock(lambda: square @ square))
    return 2 * count / copied, 2 * side**3 / multiplied


def save_reference(path: str) -> None:
    """Plan, times and results of every operation and size, as run here, into a file."""
    found = {}
    for tokens in SIZES[here()[0].type]:
        # The plan is the match's own result, for both implementations.
        plan = operations(tokens)["match"].call()
        found[tokens] = (
            plan,
            {
                name: (clock(each.call), each.call())
                for name, each in operations(tokens, plan).items()
            },
        )
    torch.save({tokens: (tuple(plan), rows) for tokens, (plan, rows) in found.items()}, path)


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


def measure(out: Path, until: float, commit: str | None) -> str | None:
    """Times of the operations, with those of the reference from a process that runs nothing else.

    Args:
        out: A CSV file.
        until: When, by `time.monotonic`, the reference is stopped.
        commit: For checkouts without their history.

    Returns:
        What was found, in a line; None: the time was up before the reference was there.
    """
    device, dtype = here()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/reference.pt"
        if kernels_run():
            command = [sys.executable, "-m", "eval.gpu", "--reference", path]
            environment = {**os.environ, "TOFU_KERNELS": "reference"}
            with contextlib.suppress(subprocess.TimeoutExpired):
                left = max(1.0, until - time.monotonic())
                subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=left)
        else:
            save_reference(path)
        if not Path(path).exists():
            return None
        reference = torch.load(path, weights_only=False)
    about = provenance(device)
    bandwidth, rate = rates()
    rows = []
    for tokens, (plan, results) in reference.items():
        for name, each in operations(tokens, tofu.Plan(*plan)).items():
            theirs, expected = results[name]
            apart = difference(each.call(), expected) if kernels_run() else 0.0
            mine = spread(clock(each.call) if kernels_run() else theirs)
            bounds = {"bytes": each.bytes / bandwidth, "flops": each.flops / rate}
            by = max(bounds, key=lambda name: bounds[name])
            rows.append(
                {
                    "operation": name,
                    "implementation": "triton" if kernels_run() else "reference",
                    "tokens": tokens,
                    "channels": CHANNELS,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": mine["value"],
                    "ms_p20": mine["low"],
                    "ms_p80": mine["high"],
                    "reference_ms": spread(theirs)["value"],
                    "bound_ms": bounds[by],
                    "bound_by": by,
                    "bound_share": bounds[by] / mine["value"],
                    "difference": apart,
                    "device": about["device"],
                    "torch": about["versions"]["torch"],
                    "commit": commit or about["commit"],
                }
            )
            write_table(out, rows)
        free_memory()
    return f"{len(rows)} rows; copy {bandwidth / 1e9:.3g} TB/s, product {rate / 1e9:.4g} TFLOP/s"


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, KERNEL_FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)
