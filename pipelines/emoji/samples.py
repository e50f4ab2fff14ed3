"""Generate the pictures that a pipeline is judged by, on this machine.

    python -m pipelines.emoji.samples --model unet                         # all sets; hours on a CPU
    python -m pipelines.emoji.samples --model unet --side 64 --sets captions -n 817

Stopped anywhere, the same command goes on. `python -m eval.studies.emoji.quality` scores what it wrote.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.emoji import GUIDANCE, MODELS, data, load_pipeline, weights_hash
from pipelines.emoji.card import SEED, generate_batch
from pipelines.emoji.loop import save_atomic
from pipelines.emoji.prompts import prompt_sets

STEPS = 25


def file_name(model: str, side: int) -> str:
    """Of a pipeline's pictures at a size."""
    return f"{model}.npz" if side == data.SIZE else f"{model}_{side}px.npz"


def generate(
    pipe: Any,
    about: Mapping[str, Any],
    out: Path,
    *,
    batch: int,
    until: float = math.inf,
) -> bool:
    """Write the pictures of all sets into one file; their latents lie beside it.

    Picture i of all sets has seed i. They are compressed as the training pictures are.

    Args:
        pipe: The pipeline.
        about: What `described` says. Latents that were begun with another are made anew; sets may be added
            behind those that are done.
        out: The file.
        batch: Pictures at a time.
        until: Of time.monotonic(), after which nothing more is begun.

    Returns:
        Whether the time was enough.
    """
    part = out.with_suffix(".part.pt")
    # The latents are kept: they take the time, and outlast a decoder that is trained further.
    made_with = {k: v for k, v in about.items() if k not in ("weights_sha256", "sets")}
    prompts = [prompt for prompts in about["sets"].values() for prompt in prompts]
    latents: list[Tensor] = []
    if part.exists():
        begun = torch.load(part, weights_only=True)
        # Other sets may have been asked for, as long as these begin alike.
        if begun["made_with"] == made_with:
            done = begun["prompts"]
            latents = begun["latents"] if done == prompts[: len(done)] else []
    for i in range(sum(map(len, latents)), len(prompts), batch):
        if time.monotonic() >= until:
            return False
        steps, side = about["sampling"]["steps"], about["side"]
        made = generate_batch(pipe, prompts[i : i + batch], SEED + i, steps, side, "latent")
        latents.append(made.half().cpu())
        done = prompts[: i + batch]
        save_atomic({"made_with": made_with, "prompts": done, "latents": latents}, part)
    with ThreadPoolExecutor() as pool:
        blobs = [blob for z in latents for blob in pool.map(data.webp, decode(pipe, z))]
    new = out.with_suffix(".new.npz")
    data.pack(new, blobs, about)
    new.replace(out)  # whole or not at all, wherever the process is killed
    return True


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Decode latents as the pipeline does in the end.  [B, 4, h, w]."""
    vae = pipe.vae
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels = vae.decode(latents + vae.config.shift_factor).sample
    pictures: list[Image.Image] = pipe.image_processor.postprocess(pixels)
    return pictures


def described(
    model: str, sets: Mapping[str, Sequence[str]], side: int, steps: int, home: Path | None = None
) -> dict[str, Any]:
    """What is said of the pictures in their file."""
    return {
        "model": model,
        "weights_sha256": weights_hash(model, home),
        "latents_sha256": weights_hash(model, home, decoder=False),
        "side": side,
        "sampling": {"steps": steps, "guidance": GUIDANCE, "first_seed": SEED},
        "sets": {name: list(prompts) for name, prompts in sets.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Generate the chosen sets of one pipeline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--side", type=int, default=data.SIZE, help="pixels (%(default)s)")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="default: all")
    parser.add_argument("-n", type=int, help="only the first n of each set")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time (%(default)s)")
    parser.add_argument("--data", type=Path, default=data.WORK / "emoji.npz", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=data.WORK / "samples", help="(%(default)s)")
    args = parser.parse_args(argv)
    sets = prompt_sets(data.load(args.data))
    if unknown := sorted({*(args.sets or ())} - {*sets}):
        parser.error(f"no set {', '.join(unknown)}; choose of {', '.join(sets)}")
    if args.n is not None and args.n < 1:
        parser.error(f"-n {args.n}: at least 1")
    chosen = {name: sets[name][: args.n] for name in args.sets or sets}
    pipe: Any = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / file_name(args.model, args.side)
    generate(pipe, described(args.model, chosen, args.side, STEPS), out, batch=args.batch)
    print(f"{sum(map(len, chosen.values()))} pictures in {out}")


if __name__ == "__main__":
    main()
