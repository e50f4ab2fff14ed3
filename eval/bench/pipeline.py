"""How long a step takes: each setting in turns with the unreduced pipeline, in one run, after warm-up.

    python -m eval speed --setting '{"name": "half", "kind": "tofu", "options": {"ratio": 0.5}}' --out a.json
    python -m eval speed --suite cpu --out suite.csv

Step time and end-to-end time, medians with p20 and p80, counted FLOPs, peak memory on a GPU.
With --suite: denoisers of full size with random weights (full), or smaller ones of the same kinds for a CPU
(cpu), against what they take on as many tokens for free; see eval/bench/denoisers.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.bench import denoisers
from eval.bench.parity import check_kernels, kernels_run
from eval.denoiser import denoiser_name, denoiser_of
from eval.files import write_whole
from eval.generate import run
from eval.generate.prompts import as_prompts, first, load_prompts
from eval.generate.settings import Applied, Setting
from eval.provenance import provenance
from eval.statistics import spread
from pipelines.timer import Timer

UNREDUCED = Setting("unreduced")


class WithoutModules:
    """In the place of FlopCounterMode's module tracker: all FLOPs are the whole model's.

    The tracker names each module by its place, and never ends where one is inside of itself, as cache-dit
    leaves them.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def counted_flops(pipe: Any, generate: Callable[[], object]) -> int:
    """FLOPs of the denoiser in one generation, by torch's FlopCounterMode on what really runs.

    On a CPU attention runs unfused meanwhile, because the counter does not see its fused form.
    """
    denoiser, total = denoiser_of(pipe), 0
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = WithoutModules()

    def before(*_: Any) -> None:
        counter.__enter__()

    def after(*_: Any) -> None:
        nonlocal total
        counter.__exit__(None, None, None)
        total += counter.get_total_flops()

    hooks = [
        denoiser.register_forward_pre_hook(before),
        denoiser.register_forward_hook(after, always_call=True),
    ]
    unfused: AbstractContextManager[object] = (
        nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)
    )
    try:
        with unfused:
            generate()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def one_batch(pipe: Any, prompts: str | Sequence[str], seed: int, call: dict[str, Any]) -> Any:
    """One batch of pictures, a seed each; what the pipeline returns."""
    prompts = as_prompts(prompts)
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(prompts, generator=seeds, **call)


@dataclass
class Bench:
    """One pipeline, the prompts and the call that are timed.

    Args:
        compiled: Compile the denoiser; every setting then gets a copy of it, so that neither the setting
            nor the unreduced one is compiled again when they take turns.
    """

    pipe: Any
    prompts: str | Sequence[str]
    seed: int
    call: dict[str, Any]
    compiled: bool = False

    def _copy(self) -> Any:
        """The pipeline, or one around a compiled copy of its denoiser."""
        if not self.compiled:
            return self.pipe
        pipe = copy.copy(self.pipe)
        own = copy.deepcopy(denoiser_of(pipe))
        object.__setattr__(pipe, denoiser_name(pipe), own)
        own.compile()
        return pipe

    def once(self, pipe: Any, setting: Setting) -> tuple[list[float], float]:
        """Times of the denoiser's calls, and of the whole generation, in ms."""
        with setting.applied(pipe) as applied:
            return self.timed(pipe, applied.call)

    def timed(self, pipe: Any, changes: dict[str, Any]) -> tuple[list[float], float]:
        """One generation inside an applied setting."""
        with Timer(denoiser_of(pipe)) as timer:
            start = time.perf_counter()
            one_batch(pipe, self.prompts, self.seed, self.call | changes)
            calls = timer.calls_ms()
            return calls, (time.perf_counter() - start) * 1e3

    def compare(self, setting: Setting, rounds: int) -> dict[str, Any]:
        """A row: this setting and the unreduced pipeline in turns, after one warm-up of each."""
        plain, own = self._copy(), self._copy()
        calls: list[list[float]] = []
        steps_ms, ends, ratios, whole = [], [], [], []
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        apart = own is not plain
        with setting.applied(own) if apart else nullcontext(Applied()) as applied:
            for turn in range(rounds + 1):
                base, base_end = self.once(plain, UNREDUCED)
                ours, end = self.timed(own, applied.call) if apart else self.once(own, setting)
                if turn == 0:
                    continue
                calls.append(ours)
                ratios.append(sum(base) / sum(ours))
                # Their mean: a step that is left out takes next to nothing, another all of its time.
                steps_ms.append(statistics.fmean(ours))
                ends.append(end)
                whole.append(base_end / end)
        return {
            "setting": setting.to_dict(),
            "compiled": self.compiled,
            "rounds": rounds,
            "calls": len(calls[0]),
            "step_ms": spread(steps_ms),
            "denoiser_ms": spread([sum(each) for each in calls]),
            "end_to_end_ms": spread(ends),
            "speed": spread(ratios),
            "end_to_end_speed": spread(whole),
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20
            if torch.cuda.is_available()
            else None,
        }

    def flops(self, setting: Setting) -> int:
        """Counted FLOPs of one generation."""
        with setting.applied(self.pipe) as applied:
            return counted_flops(
                self.pipe,
                lambda: one_batch(self.pipe, self.prompts, self.seed, self.call | applied.call),
            )


def measure(
    bench: Bench,
    settings: Sequence[Setting],
    rounds: int,
    out: Path,
    about: dict[str, Any],
    flops: Callable[[Setting], float] | None = None,
) -> list[dict[str, Any]]:
    """A row a setting, each written as soon as it is measured; rows already there are kept.

    Args:
        flops: The unreduced FLOPs over those of a setting, where they were counted before.

    Raises:
        ValueError: if the file's rows were measured under other circumstances.
    """
    done: list[dict[str, Any]] = []
    if out.exists():
        data = json.loads(out.read_text(encoding="utf-8"))
        if data["about"] != about:
            raise ValueError(
                f"{out} holds times measured otherwise ({data['about']}, now {about}); "
                "times are compared within one run only: choose another --out"
            )
        done = data["rows"]
    known = {json.dumps([row["setting"], row["compiled"]], sort_keys=True) for row in done}
    base = 0
    for setting in settings:
        key = json.dumps([setting.to_dict(), bench.compiled], sort_keys=True)
        if setting.kind == "unreduced" or key in known:
            continue
        row = bench.compare(setting, rounds)
        if flops is None:
            base = base or bench.flops(UNREDUCED)
            row["flops_ratio"] = base / bench.flops(setting)
        else:
            row["flops_ratio"] = flops(setting)
        done.append(row)
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": about, "rows": done}, indent=2) + "\n"
        write_whole(out, text.encode())
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pipeline, prompts and call as of `generate`; `--out` is a JSON file, of a suite a CSV."""
    run.add_run_arguments(parser, out="JSON file; of a suite a CSV, goes on where it was")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--setting",
        nargs="+",
        help="name, kind and options as JSON, or a file with them; one or more",
    )
    what.add_argument(
        "--suite",
        choices=("full", "cpu"),
        help="denoisers with random weights instead; of the other options it takes --out and --rounds",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured turns (%(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compile the denoiser")


def main(args: argparse.Namespace) -> None:
    """`python -m eval speed`. A mistake in the arguments is a ValueError."""
    if args.suite is not None:
        if kernels_run():
            apart = check_kernels(args.suite, len(denoisers.SUITES[args.suite]))
            print(f"kernels and reference differ by {max(apart.values()):.2g} at most")
        denoisers.main(args.suite, args.out, args.rounds)
        return
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds} is below 1")
    settings = [run.setting_of(text) for text in args.setting]
    loaded = run.load(args.pipeline, args.dtype, scheduler=args.scheduler)
    prompts = first(load_prompts(args.prompts, args.prompt_column), args.n or args.batch_size)
    bench = Bench(loaded.pipe, prompts, args.seed, run.call_of(args, loaded.pipe), args.compiled)
    about = {"pipeline": loaded.identity(), "n": len(prompts), "call": bench.call}
    about |= provenance(loaded.device)
    for row in measure(bench, settings, args.rounds, args.out, about):
        speed, flops = row["speed"], row["flops_ratio"]
        print(
            f"{row['setting']['name']:24} {row['step_ms']['value']:9.1f} ms a step, "
            f"{speed['value']:.2f}x ({speed['low']:.2f}-{speed['high']:.2f}), FLOPs {flops:.2f}x"
        )
