"""A first measurement on an embedded pipeline: step time, FLOPs and drift, all in one run.

`python -m eval.quick` generates the same prompts and seeds with every setting, in turns, writes
`eval/results/quick.json` (`quick_mmdit.json` for `--model mmdit`) and rebuilds the README's tables from
the results of all models. Drift is the PSNR to the unreduced picture of the same seed. Two rows are what
every saving must beat: random pruning, and simply running fewer steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from pipelines.emoji import MODELS, denoiser, load_pipeline, weights_hash
from pipelines.timer import Timer
from tofu_diffusers import __version__, apply_tofu

ROOT = Path(__file__).parent.parent
RESULTS = {
    "unet": ROOT / "eval" / "results" / "quick.json",
    "mmdit": ROOT / "eval" / "results" / "quick_mmdit.json",
}
README = ROOT / "README.md"
MARKS = ("<!-- measured -->", "<!-- /measured -->")

PROMPTS = (
    "a red apple",
    "a smiling face",
    "a blue car",
    "a green tree",
    "a yellow star",
    "a brown dog",
    "a purple heart",
    "an orange fish",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "default profile": {},
    "the same, context cached": {"context": "cached"},
    "the same, context none": {"context": "none"},
    "the same, restore temporal": {"restore": "temporal"},
    "random, taylor, fresh": {
        "method": "random",
        "restore": "taylor",
        "context": "fresh",
        "first_steps": 2,
    },
    "tofu": {"method": "tofu"},
    "tofu, attention only": {"method": "tofu", "scope": "attention"},
    "tome": {"method": "tome"},
    "tome, attention only": {"method": "tome", "scope": "attention"},
    "pitome": {"method": "pitome"},
    "random": {"method": "random"},
}
UNREDUCED = "unreduced"


def psnr(pictures: np.ndarray, references: np.ndarray) -> list[float]:
    """Of pictures in [0, 1], one by one, in dB.  [B, H, W, C] x 2 -> B numbers"""
    errors = ((pictures.astype(np.float64) - references) ** 2).mean(axis=(1, 2, 3))
    return [float(10 * np.log10(1 / max(error, 1e-12))) for error in errors]


class Bench:
    """One pipeline, one batch of prompts, fixed seeds."""

    def __init__(self, model: str, steps: int, guidance: float, seed: int, size: int) -> None:
        self.pipe: Any = load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.prompts = list(PROMPTS[:size])
        self.times_ms: list[float] = []

    def run(self, steps: int | None = None) -> tuple[np.ndarray, float]:
        """Pictures [B, H, W, C] in [0, 1] and the denoiser's time over the generation in ms."""
        generators = [
            torch.Generator().manual_seed(self.seed + i) for i in range(len(self.prompts))
        ]
        with Timer(denoiser(self.pipe)) as timer:
            pictures = self.pipe(
                self.prompts,
                num_inference_steps=steps or self.steps,
                guidance_scale=self.guidance,
                generator=generators,
                output_type="np",
            ).images
        self.times_ms = timer.calls_ms()
        return np.asarray(pictures), sum(self.times_ms)


def measure(
    bench: Bench, ratio: float, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row a setting; times interleaved over the rounds and compared within a round."""
    times: dict[str, list[float]] = {name: [] for name in [UNREDUCED, *SETTINGS]}
    rows: dict[str, dict[str, Any]] = {}
    reference = np.empty(0)
    for turn in range(rounds + 1):
        for name in times:
            options = SETTINGS.get(name)
            if options is None:
                pictures, spent = bench.run()
                reference = pictures
            else:
                with apply_tofu(bench.pipe, ratio=ratio, **options) as handle:
                    pictures, spent = bench.run()
                    if turn == 0:
                        summary = handle.summary()
                        rows[name] = {
                            "flops_ratio": summary.flops_whole / summary.flops_run,
                            "cache_mib": summary.cache_bytes / 2**20,
                            "psnr_db": psnr(pictures, reference),
                        }
            if turn:  # the first round warms up
                times[name].append(spent)
        say(f"round {turn} of {rounds} done")
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(times[UNREDUCED], times[name], strict=True)]
        row["time_ratio"] = statistics.median(ratios)
        row["time_ratio_range"] = [min(ratios), max(ratios)]
    fewer = []
    for steps in sorted({round(bench.steps / row["flops_ratio"]) for row in rows.values()}):
        if steps >= bench.steps:
            continue
        pictures, _ = bench.run(steps)
        fewer.append(
            {
                "name": f"{steps} steps instead of {bench.steps}",
                "flops_ratio": bench.steps / steps,
                "cache_mib": 0.0,
                "psnr_db": psnr(pictures, reference),
            }
        )
    return [{"name": name, "options": SETTINGS[name], **row} for name, row in rows.items()] + fewer


def table(result: dict[str, Any]) -> str:
    """One model's part of the README's block: best drift first."""
    setting = result["setting"]
    lines = [
        f"Embedded pipeline `{setting['model']}` at ratio {setting['ratio']:g}: {setting['n']} prompts "
        f"(seed {setting['seed']} on), {setting['steps']} steps, guidance {setting['guidance']:g}, "
        f"1,024 tokens at the top level. {setting['device']}, {setting['threads']} threads, torch "
        f"{setting['torch']}, diffusers {setting['diffusers']}, weights {setting['weights']}. Speed is "
        f"the denoiser's time over the whole generation, unreduced over reduced, median (range) of "
        f"{setting['rounds']} interleaved rounds. PSNR is to the unreduced picture of the same seed, "
        "mean (lowest).",
        "",
        "| | FLOPs | speed | PSNR, dB | caches, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: -statistics.mean(row["psnr_db"])):
        speed = "as FLOPs"
        if "time_ratio" in row:
            low, high = row["time_ratio_range"]
            speed = f"{row['time_ratio']:.2f}x ({low:.2f}-{high:.2f})"
        values = row["psnr_db"]
        lines.append(
            f"| {row['name']} | {row['flops_ratio']:.2f}x | {speed} | {statistics.mean(values):.1f} "
            f"({min(values):.1f}) | {row['cache_mib']:.1f} |"
        )
    model = setting["model"]
    command = "python -m eval.quick" + ("" if model == "unet" else f" --model {model}")
    numbers = RESULTS[model].relative_to(ROOT).as_posix()
    return "\n".join([*lines, "", f"Rebuilt by `{command}`; the numbers are in `{numbers}`."])


def tables() -> str:
    """Of every model that was measured."""
    results = (path for path in RESULTS.values() if path.exists())
    return "\n\n".join(table(json.loads(path.read_text())) for path in results)


def write_readme() -> None:
    """Replace what stands between the marks."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text(f"{before}{MARKS[0]}\n{tables()}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="eval.quick", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="unet")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=len(PROMPTS), help="prompts, at most 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only rebuild the README's tables")
    args = parser.parse_args()
    if not args.table:
        bench = Bench(args.model, args.steps, args.guidance, args.seed, args.size)
        rows = measure(bench, args.ratio, args.rounds, print)
        setting = {
            "model": args.model,
            "weights": weights_hash(args.model),
            "ratio": args.ratio,
            "steps": args.steps,
            "guidance": args.guidance,
            "seed": args.seed,
            "n": len(bench.prompts),
            "rounds": args.rounds,
            "device": f"CPU ({platform.machine()})",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "tofu_diffusers": __version__,
        }
        path = RESULTS[args.model]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")
    write_readme()
    print(tables())


if __name__ == "__main__":
    main()
