"""Generate with and without tofu, side by side: `python -m pipelines.emoji "a red apple"`.

Half of the tokens (ratio=0.5) and half of the FLOPs (speedup=2) beside the unreduced picture, or what the
options ask for.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.emoji import GUIDANCE, MODELS, denoiser, load_pipeline
from pipelines.emoji.sheet import sheet
from pipelines.recipe import add_choices, check_options, chosen, given, whole
from pipelines.timer import Timer
from tofu_diffusers import Summary, apply_tofu

PROMPTS = ["a red apple", "a smiling face", "a blue car"]
FAMILIES = {"unet": "unet", "mmdit": "sd3"}
WAYS = ({"ratio": 0.5}, {"speedup": 2.0})


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Of 8-bit pictures, in dB; infinite when they are equal."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    error = float((difference**2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def generate(pipe: Any, prompt: str, args: argparse.Namespace, label: str) -> Image.Image:
    """Generate one picture from the seed that all settings share."""
    pipe.set_progress_bar_config(desc=f"{prompt} ({label})", leave=False)
    image: Image.Image = pipe(
        prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    return image


@dataclass
class Column:
    """One way to generate: what it is called, what is asked of tofu, and what came of it."""

    label: str
    options: dict[str, Any] | None
    timer: Timer
    pictures: list[Image.Image] = field(default_factory=list)
    summary: Summary | None = None
    sites: list[dict[str, Any]] = field(default_factory=list)

    def add(self, pipe: Any, prompt: str, args: argparse.Namespace) -> None:
        """Generate and time a picture, with tofu applied if this is not the unreduced pipeline."""
        if self.options is None:
            with self.timer:
                self.pictures.append(generate(pipe, prompt, args, self.label))
            return
        with apply_tofu(pipe, **self.options) as handle:
            with self.timer:
                self.pictures.append(generate(pipe, prompt, args, self.label))
            self.summary, self.sites = handle.summary(), handle.stats()

    def forget(self) -> None:
        """Drop pictures and times, as after a first picture that warms up."""
        self.pictures.clear()
        self.timer.marks.clear()

    def tokens(self, key: str) -> str:
        """Through all sites of a generation; nothing where no tokens are reduced."""
        return f"{sum(site[key] for site in self.sites):,}" if self.sites else ""

    def step_ms(self) -> float:
        """The mean: skipped steps take next to nothing, the others all of their time."""
        return statistics.fmean(self.timer.calls_ms())


def label_of(options: dict[str, Any]) -> str:
    """What is asked for, in words."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in options.items()
    )


def compare(pipe: Any, args: argparse.Namespace, ways: Sequence[dict[str, Any]]) -> None:
    """Each prompt unreduced and in each way, in turn, from the same seed; a picture and a table."""
    plain = Column("unreduced", None, Timer(denoiser(pipe)))
    columns = [
        plain,
        *(Column(label_of(options), options, Timer(denoiser(pipe))) for options in ways),
    ]
    for i, prompt in enumerate([args.prompts[0], *args.prompts]):
        for column in columns:
            column.add(pipe, prompt, args)
            if i == 0:  # warms up
                column.forget()

    path = args.out / "grid.png"
    rows = list(zip(*(column.pictures for column in columns), strict=True))
    labels = [[prompt, *[""] * len(ways)] for prompt in args.prompts]
    sheet(rows, labels, [column.label for column in columns]).save(path)
    for column in columns[1:]:
        print(f"{column.label}\n{column.summary}\n")
    print("\n".join(table(columns, args.prompts)))
    print(f"\n{path}")


def table(columns: Sequence[Column], prompts: Sequence[str]) -> list[str]:
    """Of each column the mean step time, the counted FLOPs of a generation, and PSNR to the first."""
    plain, *others = columns
    widths = [max(20, len(column.label)) for column in columns]

    def row(name: str, cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([name.ljust(24), *padded]).rstrip()

    base = plain.step_ms()
    summaries = [each.summary for each in others if each.summary is not None]
    times = [f"{each.step_ms():.1f} ({base / each.step_ms():.2f}x)" for each in others]
    flops = [f"{each.flops_run / 1e9:.2f} ({each.speedup:.2f}x)" for each in summaries]
    saved = [f"{each.flops_saved:.1%}" for each in summaries]
    lines = [
        row("", [column.label for column in columns]),
        row("mean step, ms", [f"{base:.1f}", *times]),
        row(
            "tokens through the sites",
            [
                next((all_in for each in others if (all_in := each.tokens("tokens_in"))), ""),
                *(each.tokens("tokens_kept") for each in others),
            ],
        ),
        row("denoiser GFLOPs", [f"{summaries[0].flops_unreduced / 1e9:.2f}", *flops]),
        row("denoiser FLOPs saved", ["", *saved]),
    ]
    for i, prompt in enumerate(prompts):
        drift = [f"{psnr(each.pictures[i], plain.pictures[i]):.2f}" for each in others]
        lines.append(f"{row('PSNR, dB', ['', *drift])}   {prompt}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """A mistake in the arguments ends with exit code 2."""
    parser = argparse.ArgumentParser(prog="pipelines.emoji", description=__doc__)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help=f"default: {PROMPTS}")
    add_choices(parser, "both --ratio 0.5 and --speedup 2")
    parser.add_argument("--model", choices=sorted(MODELS), default="unet")
    parser.add_argument("--steps", type=whole(1), default=25)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    try:  # before anything is generated
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written ({error}); choose a folder of your own")
    ways = [chosen(args)] if given(args) else list(WAYS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        check_options(args, FAMILIES[args.model])
        pipe = load_pipeline(args.model, dtype).to(device)
        for options in ways:
            apply_tofu(pipe, **options).remove()  # refuse before generating
    except (FileNotFoundError, TypeError, ValueError) as error:
        parser.error(str(error))
    compare(pipe, args, ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
