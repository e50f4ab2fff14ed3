"""All that needs a GPU, the most important first, in one command that ends before its time is up.

    make gpu OUT=results                              # or: python -m eval.bench.gpu --out results
    make gpu OUT=results WHEELS=wheels PYTHON=python3    # without a network

Parts, each done once for an output folder; the same command goes on where it stopped:

    parity    tests of the kernels against the reference                      parity.log
    sync      a reduced step that never waits for the device, every family    parts.json
    head      the suite's most important rows                                 suite.csv
    kernels   plans, merges and unmerges against reference and bound           kernels.csv
    stacking  what tofu and other speed-ups give alone and together           stacking.jsonl
    suite     the rest of the suite                                           suite.csv

Without a GPU it runs all the same, which tries it out and measures nothing of interest (--suite tiny).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.gpu_command import cut_off_after, start_with_wheels

ROOT = Path(__file__).resolve().parents[2]
HEAD_CASES = 4
CORE = "is_the_reference or gather_and_add or bit_by_bit or runs_the_same"
PARITY_SHARE = 0.4
"""Of the time left: kernels are compiled for every size that is tested."""


@dataclass(frozen=True)
class Job:
    """What the parts are given."""

    out: Path
    suite: str
    until: float
    rounds: int
    commit: str | None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


def parity(job: Job) -> str | None:
    """The core of the kernels' tests, in a process of its own; without a GPU the tests of the dispatch."""
    import torch

    name, core = ("triton", CORE) if torch.cuda.is_available() else ("dispatch", "test")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", core]
    try:
        done = subprocess.run(
            [*command, f"tests/kernels/test_kernels_{name}.py"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, PARITY_SHARE * job.left),
        )
    except subprocess.TimeoutExpired as error:
        (job.out / "parity.log").write_bytes(error.stdout or b"")
        return None
    (job.out / "parity.log").write_text(done.stdout, encoding="utf-8")
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    return f"test_kernels_{name}: {last[0].strip('= ')}"


def sync(job: Job) -> str | None:
    """A reduced step of every kind of denoiser with waiting for the device made an error."""
    from eval.bench import denoisers
    from eval.bench.models import SUITES, here

    device, dtype = here()
    small = "cpu" if device.type == "cuda" else "tiny"
    found = []
    for case in SUITES[small]:
        bench = denoisers.Bench(case, device, dtype)
        for cell in denoisers.FIRST_CELLS:
            with bench.applied(cell, *bench.models[0]) as lane:
                for _ in range(lane.unreduced_steps() + denoisers.REDUCED):
                    lane.step()
                waits = waiting(lane.forward, device)
            if waits:
                found.append(f"{case.model} {cell.kind} {cell.keys_values}".strip() + f": {waits}")
            if waits and cell.kind == "unreduced":
                break  # the model itself waits, so nothing can be said of tofu
    if device.type != "cuda":
        return "no GPU to wait for"
    return "; ".join(found) or f"no step of {len(SUITES[small])} denoisers waits"


def waiting(call: Callable[[], object], device: Any) -> str:
    """What in a call waits for the device; empty: nothing."""
    import torch

    if device.type != "cuda":
        call()
        return ""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def head(job: Job) -> str | None:
    """The first rows of the suite's first denoisers."""
    from eval.bench import denoisers
    from eval.bench.models import SUITES

    cases = SUITES[job.suite][:HEAD_CASES]
    mode = denoisers.modes_of(job.suite)[0]
    firsts = [(case, mode, cell) for case in cases for cell in denoisers.FIRST_CELLS]
    return _rows(job, firsts, len(cases))


def rest(job: Job) -> str | None:
    """All rows of the suite."""
    from eval.bench import denoisers
    from eval.bench.models import SUITES

    cases = SUITES[job.suite]
    return _rows(job, list(denoisers.jobs(cases, denoisers.modes_of(job.suite))), len(cases))


def _rows(job: Job, work: Sequence[Any], count: int) -> str | None:
    """Rows of the suite's first `count` cases, whose kernels are compared with the reference before."""
    from eval.bench import denoisers
    from eval.bench.parity import check_kernels, kernels_run
    from eval.bench.rows import read_rows

    out, file = job.out / "suite.csv", job.out / "checked.json"
    checked = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cases": 0}
    if kernels_run() and checked["cases"] < count:
        checked = {"cases": count, "differences": check_kernels(job.suite, count)}
        file.write_text(json.dumps(checked, indent=2) + "\n", encoding="utf-8")
    if not denoisers.run(work, out, job.rounds, job.until, job.commit):
        return None
    rows = read_rows(out)
    failed = sum(row["note"].startswith("failed") for row in rows)
    return f"{len(rows)} rows, {failed} of them failed"


def kernels(job: Job) -> str | None:
    """Times of the operations that kernels serve; without a GPU, of next to no tokens."""
    import torch

    from eval.bench import growth

    sizes = growth.SIZES if torch.cuda.is_available() else growth.TRIAL_SIZES
    return growth.measure(job.out / "kernels.csv", sizes, job.until, job.commit)


def stack(job: Job) -> str | None:
    """Generations with tofu, with its partners, and with both."""
    from eval.bench import stacking

    return stacking.measure(
        job.suite, job.out / "stacking.jsonl", job.rounds, job.until, job.commit
    )


# ---- the command -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Job], str | None]] = {
    "parity": parity,
    "sync": sync,
    "head": head,
    "kernels": kernels,
    "stacking": stack,
    "suite": rest,
}


def run_parts(job: Job) -> bool:
    """Every part that is not done, until the time is up; whether none of them failed."""
    state = job.out / "parts.json"
    done = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    good = True
    for name, part in PARTS.items():
        if name in done:
            print(f"{name}: done before: {done[name]}", flush=True)
            continue
        if job.left <= 0:
            break
        try:
            result = part(job)
        except Exception as error:  # whatever it is, the other parts are still wanted
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            good = False
            continue
        if result is None:
            print(f"{name}: to be continued", flush=True)
            continue
        print(f"{name}: {result}", flush=True)
        if name == "parity" and not passed(result):
            good = False
            continue
        done[name] = result
        state.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    if missing := [name for name in PARTS if name not in done]:
        print(f"not done: {', '.join(missing)}; the same command goes on", flush=True)
    return good


def passed(summary: str) -> bool:
    """Whether pytest's last line tells of tests, and of none that failed."""
    return " passed" in summary and "failed" not in summary and "error" not in summary


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that was run passed; 1: something failed. A mistake in the arguments ends with 2."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="eval.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `start_with_wheels` knows --wheels by its whole name
    )
    parser.add_argument("--out", type=Path, help="folder; goes on where it was")
    parser.add_argument("--suite", choices=("full", "cpu", "tiny"), default="full")
    parser.add_argument("--minutes", type=float, default=9.0, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="measured turns (%(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of packages to install first")
    parser.add_argument("--commit", help="what the rows say where the checkout has no history")
    args = parser.parse_args(given)
    if args.out is None:
        parser.error("--out is needed: the folder for what is measured")
    if args.minutes <= 0 or args.rounds < 1:
        parser.error(f"minutes {args.minutes:g} and rounds {args.rounds} must be above 0")
    until = time.monotonic() + 60 * args.minutes
    start_with_wheels(parser, args.wheels, "eval.bench.gpu", given)
    args.out.mkdir(parents=True, exist_ok=True)
    with cut_off_after(args.minutes):
        good = run_parts(Job(args.out, args.suite, until, args.rounds, args.commit))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
