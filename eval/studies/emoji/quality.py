"""Judge generated pictures on a CPU: `python -m eval.studies.emoji.quality --pictures folder`.

Takes what `pipelines.emoji.samples` or `pipelines.emoji.gpu` wrote. Into the card of these weights go, for
the sets and sizes that there are, how often the independent scorer finds a prompt's own picture among all of
its set (R@1), and the Frechet distance to the training pictures, made as small, beside that of one half of
these to the other; beside the card, sheets of two sets.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.metrics.extractors import Extractor, Pictures, features, load_extractor
from eval.metrics.frechet import few_pictures, frechet_distance
from pipelines.emoji import HERE, MODELS, data, reference
from pipelines.emoji.captions import with_article
from pipelines.emoji.card import SHEETS, SUBJECTS, block, read, save
from pipelines.emoji.data import Emoji, unpack
from pipelines.emoji.samples import file_name
from pipelines.emoji.scorer import EmojiScorer, ranks
from pipelines.emoji.sheet import sheet
from pipelines.emoji.vae import SIDES

COLUMNS = 8


def by_set(pictures: np.ndarray, sets: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The pictures lie one set after the other."""
    ends = np.cumsum([len(prompts) for prompts in sets.values()])
    return dict(zip(sets, np.split(pictures, ends[:-1]), strict=True))


def found(scorer: EmojiScorer, pictures: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """R@1 of the prompts among these pictures, and the mean alignment score."""
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    hits = ranks(scorer.head, scorer.image_features(images), scorer.text_features(prompts))
    return {
        "R@1": round(hits["R@1"], 3),
        "alignment": round(scorer.score(images, prompts).mean().item(), 1),
    }


def asked_for(emoji: Emoji) -> dict[str, int]:
    """The row of the data that a name, or a colour and an object, asks for."""
    rows = zip(emoji.described, emoji.recoloured, strict=True)
    return {with_article(words) if turned else words: i for i, (words, turned) in enumerate(rows)}


def retrieval(
    scorer: EmojiScorer, emoji: Emoji, made: np.ndarray, prompts: list[str]
) -> dict[str, Any]:
    """Of samples, and of the pictures of the data that these prompts ask for."""
    rows = asked_for(emoji)
    result: dict[str, Any] = {"n": len(prompts), "chance": round(1 / len(prompts), 4)}
    result["samples"] = found(scorer, made, prompts)
    result["real"] = found(scorer, emoji.images[[rows[prompt] for prompt in prompts]], prompts)
    return result


def distances(samples: Tensor, real: Tensor) -> dict[str, dict[str, Any]]:
    """Frechet distances of features and the sizes of the sets; the last two at one size.  [N, D], [M, D]."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    size = min(len(samples), len(real) // 2)
    half, other = real[order[:size]], real[order[size : 2 * size]]
    pairs = {
        "samples to training pictures": (samples, real),
        "samples to one half of these": (samples[:size], half),
        "one half to the other": (other, half),
    }
    result = {}
    for name, (mine, others) in pairs.items():
        result[name] = {"value": round(frechet_distance(mine, others), 3)}
        result[name]["n"] = [len(mine), len(others)]
        if warning := few_pictures(mine, others):
            result[name]["warning"] = warning
    return result


def cached(extractor: Extractor, pictures: np.ndarray, folder: Path) -> Tensor:
    """Features of pictures that lie in no files, kept in a folder.  uint8 [N, H, W, 3] -> [N, D]."""
    folder.mkdir(parents=True, exist_ok=True)
    return features(extractor, Pictures(pictures, folder))


def grid(pictures: np.ndarray, prompts: list[str]) -> Image.Image:
    """A sheet of pictures, `COLUMNS` a row, each under the start of its prompt."""
    cells = [Image.fromarray(picture) for picture in pictures]
    labels = [textwrap.shorten(prompt, 18, placeholder="…") for prompt in prompts]
    cuts = [slice(i, i + COLUMNS) for i in range(0, len(cells), COLUMNS)]
    return sheet([cells[c] for c in cuts], [labels[c] for c in cuts], cell=128)


def judged(
    made: dict[str, np.ndarray],
    about: dict[str, Any],
    emoji: Emoji,
    scorer: EmojiScorer,
    extractor: Extractor,
    cache: Path,
) -> dict[str, Any]:
    """What the card says of one file's pictures, by set."""
    sets, side = about["sets"], about["side"]
    result: dict[str, Any] = {
        "sampling": about["sampling"],
        "retrieval": {
            name: retrieval(scorer, emoji, made[name], sets[name])
            for name in ("training", "held_out", "compositions")
            if name in sets
        },
    }
    if "captions" in sets:
        real = cached(extractor, reference.pictures(emoji, side), cache / f"training_{side}px")
        name = Path(file_name(about["model"], side)).stem
        samples = cached(extractor, made["captions"], cache / name)
        result |= {"distance": extractor.names[0], "distances": distances(samples, real)}
    return result


def joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was found, and of sets that were not among these pictures what was before, if sampled alike."""
    if before.get("sampling") != found["sampling"]:
        return found
    return {**before, **found, "retrieval": {**before["retrieval"], **found["retrieval"]}}


def main(argv: Sequence[str] | None = None) -> None:
    """Score every model's pictures that the folder holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pictures", type=Path, default=data.WORK / "samples", help="(%(default)s)"
    )
    parser.add_argument("--data", type=Path, default=data.WORK / "emoji.npz", help="(%(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=data.WORK / "features", help="of pictures (%(default)s)"
    )
    args = parser.parse_args(argv)
    names = [file_name(model, side) for model in sorted(MODELS) for side in SIDES]
    files = [args.pictures / name for name in names if (args.pictures / name).exists()]
    if not files:
        parser.error(f"{args.pictures} holds none of {', '.join(names)}")
    emoji, scorer, extractor = data.load(args.data), EmojiScorer.load(), load_extractor()
    for file in files:
        images, about = unpack(file)
        model, sets = about["model"], about["sets"]
        card = read(model)
        if card["weights_sha256"] != about["weights_sha256"]:
            parser.error(
                f"{file} is by weights {about['weights_sha256']}, the card of {card['weights_sha256']}; "
                f"unpack {file.with_suffix('.tar')} in {HERE} and run: "
                f"python -m pipelines.emoji.card --model {model} --log {args.pictures / 'log.jsonl'}"
            )
        made = by_set(images, sets)
        found = judged(made, about, emoji, scorer, extractor, args.cache)
        quality, side = card.setdefault("quality", {}), str(about["side"])
        quality[side] = joined(quality.get(side, {}), found)
        for name in SHEETS:
            if name in sets and about["side"] == data.SIZE:
                path = SUBJECTS[model].folder / f"{name}.webp"
                grid(made[name], sets[name]).save(path, quality=88)
        save(card)
        print(block(card))


if __name__ == "__main__":
    main()
