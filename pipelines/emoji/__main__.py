"""Generate with and without tofu, side by side: `python -m pipelines.emoji "a red apple"`."""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.emoji import MODELS, denoiser, load_pipeline
from pipelines.emoji.sheet import sheet
from pipelines.recipe import add_choices, chosen
from pipelines.timer import Timer
from tofu_diffusers import apply_tofu

PROMPTS = ["a red apple", "a smiling face", "a blue car"]


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Of 8-bit pictures, in dB; infinite when they are equal."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    error = float((difference**2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def generate(pipe: Any, prompt: str, args: argparse.Namespace, label: str) -> Image.Image:
    pipe.set_progress_bar_config(desc=f"{prompt} ({label})", leave=False)
    image: Image.Image = pipe(
        prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    return image


def compare(pipe: Any, args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Each prompt both ways, in turn, from the same seed; a table and a picture."""
    label = f"tofu r={args.ratio:g} {args.method or ''}".strip()
    plain, reduced = Timer(denoiser(pipe)), Timer(denoiser(pipe))
    rows, quality = [], []
    for i, prompt in enumerate([args.prompts[0], *args.prompts]):
        with plain:
            whole = generate(pipe, prompt, args, "unreduced")
        with apply_tofu(pipe, ratio=args.ratio, **options) as handle:
            with reduced:
                fewer = generate(pipe, prompt, args, label)
            summary, sites = handle.summary(), handle.stats()
        if i == 0:  # the first pair warms up
            plain.marks.clear()
            reduced.marks.clear()
            continue
        rows.append([whole, fewer])
        quality.append(psnr(fewer, whole))

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "grid.png"
    labels = [[prompt, ""] for prompt in args.prompts]
    sheet(rows, labels, ["unreduced", label]).save(path)

    print(summary)
    whole_ms, fewer_ms = plain.calls_ms(), reduced.calls_ms()
    # The mean: steps that are left out take next to nothing, the others all of their time.
    before, after = statistics.fmean(whole_ms), statistics.fmean(fewer_ms)
    tokens, kept = (sum(site[key] for site in sites) for key in ("tokens_in", "tokens_kept"))
    print(f"\n{'':24}{'unreduced':>12}{label:>24}")
    print(f"{'mean step, ms':24}{before:12.1f}{after:24.1f}   {before / after:.2f}x")
    print(f"{'tokens through the sites':24}{tokens:12,}{kept:24,}")
    print(f"{'denoiser FLOPs saved':24}{'':12}{summary.flops_saved:24.1%}")
    for prompt, value in zip(args.prompts, quality, strict=True):
        print(f"{'PSNR, dB':24}{'':12}{value:24.2f}   {prompt}")
    print(f"\n{path}")


def main(argv: Sequence[str] | None = None) -> int:
    """A mistake in the arguments ends with exit code 2."""
    parser = argparse.ArgumentParser(prog="pipelines.emoji", description=__doc__)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help=f"default: {PROMPTS}")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of tokens removed")
    add_choices(parser)
    parser.add_argument("--model", choices=sorted(MODELS), default="unet")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    options = chosen(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        pipe = load_pipeline(args.model, dtype).to(device)
        apply_tofu(pipe, ratio=args.ratio, **options).remove()  # refuse before generating
    except (FileNotFoundError, TypeError, ValueError) as error:
        parser.error(str(error))
    compare(pipe, args, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
