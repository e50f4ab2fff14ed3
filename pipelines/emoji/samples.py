"""Generate the pictures that a pipeline is judged by, on this machine.

    python -m pipelines.emoji.samples --model unet                         # all sets; hours on a CPU
    python -m pipelines.emoji.samples --model unet --side 64 --sets captions -n 817

Stopped anywhere, the same command goes on. `python -m eval.studies.emoji.quality` scores what it wrote.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipelines.emoji import GUIDANCE, MODELS, data, load_pipeline, weights_hash
from pipelines.emoji.card import SEED, generate_batch
from pipelines.emoji.loop import save_atomic
from pipelines.emoji.prompts import SETS, prompt_sets
from pipelines.emoji.vae import SIDES, to_unit

STEPS = 25
NONE = torch.empty(0, dtype=torch.float16)
"""Latents, before there are any."""


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
    """Write the pictures of all sets into one file; the latents lie beside it.

    Picture i of a set has seed i. Samples are compressed as the pack of the training pictures is.

    Args:
        pipe: The pipeline.
        about: What `described` says. Latents that are there are used again where denoiser, sampling and
            prompt are the same, and those of other sets and of more prompts are kept. Where other prompts
            take their place, a copy is left beside them.
        out: The file.
        batch: Pictures at a time.
        until: Of time.monotonic(), after which nothing more is begun.

    Returns:
        Whether the time was enough.
    """
    part = out.with_suffix(".latents.pt")
    # The latents are kept: they take the time, and outlast a decoder that is trained further.
    made_with = {k: v for k, v in about.items() if k not in ("weights_sha256", "sets")}
    kept = torch.load(part, weights_only=True) if part.exists() else {}
    done: dict[str, dict[str, Any]] = kept["sets"] if kept.get("made_with") == made_with else {}
    steps, side = about["sampling"]["steps"], about["side"]
    latents: list[Tensor] = []
    with tqdm(total=sum(map(len, about["sets"].values())), unit="picture") as bar:
        for name, prompts in about["sets"].items():
            mine = done.setdefault(name, {"prompts": [], "latents": NONE})
            have = alike(mine["prompts"], prompts)
            if have < min(len(mine["prompts"]), len(prompts)):  # others take the place of the rest
                shutil.copyfile(part, out.with_suffix(".before.pt"))
                mine["latents"] = mine["latents"][:have]
            bar.update(have)
            for i in range(have, len(prompts), batch):
                if time.monotonic() >= until:
                    return False
                chosen = prompts[i : i + batch]
                made = generate_batch(pipe, chosen, SEED + i, steps, side, "latent").half().cpu()
                mine["prompts"] = prompts[: i + batch]
                mine["latents"] = torch.cat([mine["latents"], made])
                save_atomic({"made_with": made_with, "sets": done}, part)
                bar.update(len(chosen))
            latents += mine["latents"][: len(prompts)].split(batch)
    blobs = [blob for z in latents for blob in encoded(decode(pipe, z))]
    new = out.with_suffix(".new.npz")
    data.pack(new, blobs, about)
    new.replace(out)  # whole or not at all, wherever the process is killed
    return True


def alike(mine: Sequence[str], others: Sequence[str]) -> int:
    """How many of the first prompts are the same."""
    pairs = zip(mine, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def encoded(pictures: Sequence[Image.Image]) -> list[bytes]:
    """As samples and training pictures are packed."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(data.webp, pictures))


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Decode latents as the pipeline does in the end.  [B, 4, h, w]."""
    vae = pipe.vae
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels = vae.decode(latents + vae.config.shift_factor).sample
    pictures: list[Image.Image] = pipe.image_processor.postprocess(pixels)
    return pictures


@torch.no_grad()
def through_autoencoder(pipe: Any, images: np.ndarray) -> np.ndarray:
    """What the autoencoder and the compression of samples leave of pictures.  uint8 [N, H, W, 3]."""
    vae, blobs = pipe.vae, []
    for part in torch.from_numpy(images).split(16):
        z = vae.encode(to_unit(part).to(vae.device, vae.dtype)).latent_dist.mode()
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        blobs += encoded(decode(pipe, z))
    return data.decoded(blobs)


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
    parser.add_argument(
        "--side", type=int, choices=SIDES, default=data.SIZE, help="pixels (%(default)s)"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="default: all")
    parser.add_argument("-n", type=int, help="only the first n of each set")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time (%(default)s)")
    parser.add_argument("--data", type=Path, default=data.WORK / "emoji.npz", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=data.WORK / "samples", help="(%(default)s)")
    args = parser.parse_args(argv)
    for option, value in (("-n", args.n), ("--batch", args.batch)):
        if value is not None and value < 1:
            parser.error(f"{option} {value}: at least 1")
    sets = prompt_sets(data.load(args.data))
    chosen = {name: sets[name][: args.n] for name in SETS if name in args.sets}
    pipe: Any = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / file_name(args.model, args.side)
    generate(pipe, described(args.model, chosen, args.side, STEPS), out, batch=args.batch)
    print(f"{sum(map(len, chosen.values()))} pictures in {out}")


if __name__ == "__main__":
    main()
