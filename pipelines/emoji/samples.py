"""Generate the pictures that a pipeline is judged by, on this machine.

    python -m pipelines.emoji.samples --model unet                         # all sets; hours on a CPU
    python -m pipelines.emoji.samples --model unet --side 64 --sets captions

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

from pipelines.emoji import MODELS, data, load_pipeline, weights_hash
from pipelines.emoji.card import GUIDANCE, SEED, generate_batch
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
    """Write the pictures of all sets into one file; what is made already lies beside it until then.

    Picture i of all sets has seed i. They are compressed as the training pictures are.

    Args:
        pipe: The pipeline.
        about: `model`, `weights_sha256`, `side`, `sampling` and `sets`: names with their prompts. Pictures
            that were begun with another are made anew.
        out: The file.
        batch: Pictures at a time.
        until: Of time.monotonic(), after which nothing more is begun.

    Returns:
        Whether the time was enough.
    """
    part = out.with_suffix(".part.npz")
    blobs: list[bytes] = []
    if part.exists():
        begun, made_with = data.read_pack(part)
        if made_with == about:
            blobs = begun
    prompts = [prompt for prompts in about["sets"].values() for prompt in prompts]
    with ThreadPoolExecutor() as pool:
        for i in range(len(blobs), len(prompts), batch):
            if time.monotonic() >= until:
                return False
            steps, side = about["sampling"]["steps"], about["side"]
            made = generate_batch(pipe, prompts[i : i + batch], SEED + i, steps, side)
            blobs += pool.map(data.webp, made)
            # Whole or not at all, wherever the process is killed.
            new = out.with_suffix(".new.npz")
            data.pack(new, blobs, about)
            new.replace(part)
    part.replace(out)
    return True


def described(
    model: str, sets: Mapping[str, Sequence[str]], side: int, steps: int, home: Path | None = None
) -> dict[str, Any]:
    """What is said of the pictures in their file."""
    return {
        "model": model,
        "weights_sha256": weights_hash(model, home),
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
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time (%(default)s)")
    parser.add_argument("--data", type=Path, default=data.WORK / "emoji.npz", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=data.WORK / "samples", help="(%(default)s)")
    args = parser.parse_args(argv)
    sets = prompt_sets(data.load(args.data))
    if unknown := sorted({*(args.sets or ())} - {*sets}):
        parser.error(f"no set {', '.join(unknown)}; choose of {', '.join(sets)}")
    chosen = {name: sets[name] for name in args.sets or sets}
    pipe: Any = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / file_name(args.model, args.side)
    generate(pipe, described(args.model, chosen, args.side, STEPS), out, batch=args.batch)
    print(f"{sum(map(len, chosen.values()))} pictures in {out}")


if __name__ == "__main__":
    main()
