"""A small ViT that tells what a picture shows: `python -m pipelines.emoji.vit --train`.

The study of encoders needs a trained one.

Of a picture of 32 pixels and 64 patches it makes a vector in the common space of the emoji scorer, whose text
side is frozen: the concept is the name with the highest cosine, and a name finds its picture the same way.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from pipelines.emoji import data
from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import learning_rate
from pipelines.emoji.scorer import WIDTH, EmojiScorer

FOLDER = data.WORK / "vit"
SIDE, SOURCE_SIDE = 32, 40
"""Pixels of a side: what the model sees, and what it is cut from."""
TEMPERATURE = 0.05
EVERY = 4
"""One in so many concepts of training is learned: few enough for minutes of one core."""
BATCH, RATE, WEIGHT_DECAY = 32, 2e-3, 0.05


def new_vit() -> ViTForImageClassification:
    """With random weights: 64 patches, 6 blocks of 96 channels."""
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=192,
        num_labels=WIDTH,
    )
    return ViTForImageClassification(config)


def load_vit(folder: Path = FOLDER) -> ViTForImageClassification:
    """The trained one, in float32.

    Raises:
        FileNotFoundError: if it was not trained.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {folder}; train them: python -m pipelines.emoji.vit --train"
        )
    model: ViTForImageClassification = ViTForImageClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def pictures(emoji: Emoji) -> Tensor:
    """All pictures, smaller.  -> [I, 3, 40, 40] float32 in [0, 1]."""
    pixels = torch.from_numpy(emoji.images).permute(0, 3, 1, 2)
    parts = [
        F.interpolate(part.float() / 255, (SOURCE_SIDE, SOURCE_SIDE), mode="area")
        for part in pixels.split(256)
    ]
    return torch.cat(parts)


def augmented(originals: Tensor, draw: torch.Generator, noise: float = 0.04) -> Tensor:
    """Pictures drawn anew: shifted, scaled, their hues turned, with noise.

    Shifts are up to a sixteenth of the side, scales 0.9 to 1.1, turns 20 degrees, all either way.

    Args:
        originals: [B, 3, 40, 40] float32 in [0, 1], on white.
        draw: On the CPU.
        noise: Its standard deviation, of colours in [0, 1].

    Returns:
        [B, 3, 32, 32] float32, about -1 to 1.
    """
    count = len(originals)
    random = torch.rand(count, 4, generator=draw)
    scale = 0.9 + 0.2 * random[:, 0]
    shift = (random[:, 1:3] - 0.5) / 4  # of a side of 2
    # The grid says where a pixel comes from: the inverse of where it goes.
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = -shift / scale[:, None]
    grid = F.affine_grid(matrix, [count, 3, SIDE, SIDE], align_corners=False)
    # Outside there is 0, which is white.
    moved = 1 - F.grid_sample(1 - originals, grid, align_corners=False)
    turned = torch.einsum("bij,bjhw->bihw", _turns((random[:, 3] - 0.5) * 40), moved)
    grain = torch.randn(turned.shape, generator=draw) * noise
    return (turned.clamp(0, 1) + grain) * 2 - 1


def _turns(degrees: Tensor) -> Tensor:
    """Turns of colours about the axis of greys, by Rodrigues' formula.  [B] -> [B, 3, 3]."""
    angle = (degrees * math.pi / 180)[:, None, None]
    axis = 3**-0.5
    cross = torch.tensor([[0, -axis, axis], [axis, 0, -axis], [-axis, axis, 0]])
    return angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) / 3


def name_vectors(scorer: EmojiScorer, names: list[str]) -> Tensor:
    """Names in the scorer's common space.  -> unit vectors [T, 448]."""
    return F.normalize(scorer.head.text(scorer.text_features(names)), dim=1)


def concepts_of(emoji: Emoji) -> tuple[list[int], list[str], Tensor]:
    """Rows of the pictures that it learns, the concepts that they show, and the number of each row's."""
    trained = np.flatnonzero(emoji.trained).tolist()
    names = list(dict.fromkeys(emoji.concepts[i] for i in trained))[::EVERY]
    number = {name: n for n, name in enumerate(names)}
    rows = [i for i in trained if emoji.concepts[i] in number]
    return rows, names, torch.tensor([number[emoji.concepts[i]] for i in rows])


@torch.no_grad()
def vectors_of(model: ViTForImageClassification, pixels: Tensor, batch: int = 128) -> Tensor:
    """What the model makes of pictures.  [B, 3, 32, 32] -> unit vectors [B, 448]."""
    parts = [model(pixel_values=part).logits for part in pixels.split(batch)]
    return F.normalize(torch.cat(parts), dim=1)


def train(data_path: Path, folder: Path, steps: int, seed: int = 0) -> None:
    """Train from scratch, write the weights in fp16, and say how often a fresh picture is told right."""
    emoji = data.load(data_path)
    rows, names, labels = concepts_of(emoji)
    wanted = name_vectors(EmojiScorer.load(), names)
    originals = pictures(emoji)[rows]
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = new_vit().train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    started = time.monotonic()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(rows), generator=draw)])
        pick, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate(step, step / steps)
        out = F.normalize(model(augmented(originals[pick], draw)).logits, dim=1)
        loss = F.cross_entropy(out @ wanted.T / TEMPERATURE, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1} loss {loss.item():.3f} {minutes:.1f} minutes", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.half().eval().save_pretrained(folder)
    fresh = augmented(originals, torch.Generator().manual_seed(seed + 1))
    found = (vectors_of(load_vit(folder), fresh) @ wanted.T).argmax(1)
    report: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "pictures": len(rows),
        "concepts": len(names),
        "parameters": sum(each.numel() for each in model.parameters()),
        "accuracy": (found == labels).float().mean().item(),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def main() -> None:
    """Train on the pictures and names of the emoji data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", required=True, help="train the weights")
    parser.add_argument("--steps", type=int, default=6000, help="(%(default)s: ten minutes)")
    parser.add_argument("--data", type=Path, default=data.WORK / "emoji.npz")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # averages of squares that fade away are slow to add
    train(args.data, args.out, args.steps)


if __name__ == "__main__":
    main()
