"""What sets of samples are compared with: `python -m pipelines.emoji.reference --out folder --side 64`.

Writes the pictures of training, of the side that the samples have, and captions to make the samples of:

    python -m eval sweep --prompts folder/captions.txt --real folder/pictures.npy --height 64 --width 64 ...

The prompt set `emoji-captions` of `eval` are the same captions.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipelines.emoji import data
from pipelines.emoji.data import SIZE, Emoji
from pipelines.emoji.prompts import prompt_sets
from pipelines.emoji.vae import SIDES, resized, to_unit


def pictures(emoji: Emoji, side: int) -> np.ndarray:
    """The pictures of training, as it has seen them in that size.  uint8 [N, side, side, 3]."""
    return sized(emoji.images[emoji.trained], side)


def sized(images: np.ndarray, side: int) -> np.ndarray:
    """Pictures of the data as training sees them in a size.  uint8 [N, H, W, 3] -> [N, side, side, 3]."""
    if side == SIZE:
        return images
    small = resized(to_unit(torch.from_numpy(images)), side)
    return ((small + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures of training as files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument(
        "--side", type=int, choices=SIDES, default=SIZE, help="in pixels (%(default)s)"
    )
    parser.add_argument("--data", type=Path, default=data.WORK / "emoji.npz", help="(%(default)s)")
    args = parser.parse_args(argv)
    emoji = data.load(args.data)
    captions, shown = prompt_sets(emoji)["captions"], pictures(emoji, args.side)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "captions.txt").write_text("\n".join([*captions, ""]), encoding="utf-8")
    np.save(args.out / "pictures.npy", shown)
    print(f"{len(captions)} captions and {len(shown)} pictures of {args.side} px in {args.out}")


if __name__ == "__main__":
    main()
