"""Judge generated pictures on a CPU: `python -m eval.studies.emoji.quality --pictures folder`.

Takes what `pipelines.emoji.samples` or `pipelines.emoji.gpu` wrote. Into the card of these weights go, for
the sets and sizes that there are, how often the independent scorer finds a prompt's own picture among all of
its set (R@1), and the Frechet distance to the training pictures, made as small, beside that of one half of
these to the other. Both also of real pictures that went through the autoencoder: what it alone
costs. Beside the card, sheets of two sets.
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
from pipelines.emoji import HERE, MODELS, data, load_pipeline, reference, weights_hash
from pipelines.emoji.captions import with_article
from pipelines.emoji.card import HALVES, LABELS, SHEETS, SUBJECTS, block, read, save
from pipelines.emoji.data import Emoji, unpack
from pipelines.emoji.samples import file_name, through_autoencoder
from pipelines.emoji.scorer import EmojiScorer, alignment, ranks
from pipelines.emoji.sheet import sheet
from pipelines.emoji.vae import SIDES

COLUMNS = 8
SAMPLES = "samples to training pictures"


def by_set(made: np.ndarray, sets: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The pictures lie one set after the other."""
    ends = np.cumsum([len(prompts) for prompts in sets.values()])
    return dict(zip(sets, np.split(made, ends[:-1]), strict=True))


def found(scorer: EmojiScorer, pictures: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """R@1 of the prompts among these pictures, and the mean alignment score."""
    images = scorer.image_features(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    texts = scorer.text_features(prompts)
    return {
        "R@1": round(ranks(scorer.head, images, texts)["R@1"], 3),
        "alignment": round(alignment(scorer.head, images, texts).mean().item(), 1),
    }


def asked_for(emoji: Emoji) -> dict[str, int]:
    """The row of the data that a name, or a colour and an object, asks for."""
    rows = zip(emoji.described, emoji.recoloured, strict=True)
    return {with_article(words) if turned else words: i for i, (words, turned) in enumerate(rows)}


def retrieval(
    scorer: EmojiScorer, pictures: dict[str, np.ndarray], prompts: list[str]
) -> dict[str, Any]:
    """Of each of these, one picture a prompt."""
    result: dict[str, Any] = {"n": len(prompts), "chance": round(1 / len(prompts), 4)}
    return result | {kind: found(scorer, each, prompts) for kind, each in pictures.items()}


def halves(count: int, samples: int) -> tuple[Tensor, Tensor]:
    """Two parts of `count` pictures, each as large as the samples, if there are enough."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    size = min(samples, count // 2)
    return order[:size], order[size : 2 * size]


def distances(samples: Tensor, real: Tensor, through: Tensor) -> dict[str, dict[str, Any]]:
    """Frechet distances of features and the sizes of the sets; all but the first at one size.

    Args:
        samples: [N, D].
        real: [M, D].
        through: Of the second half of these, after the autoencoder.  [H, D].
    """
    half, other = (real[rows] for rows in halves(len(real), len(samples)))
    pairs = {
        SAMPLES: (samples, real),
        "samples to one half of these": (samples[: len(half)], half),
        HALVES: (other, half),
        "one half, through the autoencoder, to the other": (through, half),
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
    """A sheet of pictures, `COLUMNS` a row, each under its prompt."""
    cells = [Image.fromarray(picture) for picture in pictures]
    labels = [textwrap.fill(prompt, 17, max_lines=2, placeholder="…") for prompt in prompts]
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
    sets, side, pipe = about["sets"], about["side"], load_pipeline(about["model"])
    result: dict[str, Any] = {"sampling": about["sampling"], "retrieval": {}}
    rows = asked_for(emoji)
    for name in LABELS:
        if name in sets:
            real = reference.sized(emoji.images[[rows[prompt] for prompt in sets[name]]], side)
            kinds = {
                "samples": made[name],
                "autoencoder": through_autoencoder(pipe, real),
                "real": real,
            }
            result["retrieval"][name] = retrieval(scorer, kinds, sets[name])
    if "captions" in sets:
        real = reference.pictures(emoji, side)
        _, other = halves(len(real), len(made["captions"]))
        through = through_autoencoder(pipe, real[other])
        parts = {
            Path(file_name(about["model"], side)).stem: made["captions"],
            f"training_{side}px": real,
            f"autoencoder_{side}px": through,
        }
        found = [cached(extractor, each, cache / name) for name, each in parts.items()]
        result |= {"distance": extractor.names[0], "distances": distances(*found)}
    return result


def counts(measured: dict[str, Any]) -> dict[str, int]:
    """How many pictures of each set were judged."""
    result = {name: row["n"] for name, row in measured["retrieval"].items()}
    if "distances" in measured:
        result["captions"] = measured["distances"][SAMPLES]["n"][0]
    return result


def joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was found, and of sets that were not among these pictures what was before, if sampled alike."""
    if before.get("sampling") != found["sampling"]:
        return found
    return {**before, **found, "retrieval": {**before["retrieval"], **found["retrieval"]}}


def check(file: Path, about: dict[str, Any], card: dict[str, Any]) -> None:
    """Refuse pictures that cannot be judged.

    Raises:
        ValueError: if pictures, embedded weights and card do not belong together, or there are too few, or
            fewer than the card is of.
    """
    model, given, embedded = about["model"], about["weights_sha256"], weights_hash(about["model"])
    if given != embedded:
        way = f"generate others: python -m pipelines.emoji.samples --model {model}"
        if archives := sorted(file.parent.glob("*.tar")):  # a model may have parts of another one
            names = " and ".join(each.name for each in archives)
            way = f"unpack {names} of {file.parent} in {HERE}, and measure the cards anew"
        raise ValueError(f"by weights {given}, those in {HERE} are {embedded}; {way}")
    if card["weights_sha256"] != embedded:
        raise ValueError(
            f"the card of {model} is of weights {card['weights_sha256']}, not of {embedded}; measure it "
            f"anew: python -m pipelines.emoji.card --model {model} --log LOG (log.jsonl of their training)"
        )
    if len(about["sets"].get("captions", ("", ""))) < 2:
        raise ValueError("one picture of set captions, and distances need 2; generate more")
    before = card.get("quality", {}).get(str(about["side"]), {})
    had = counts(before) if before.get("sampling") == about["sampling"] else {}
    for name, prompts in about["sets"].items():
        if len(prompts) < had.get(name, 0):
            raise ValueError(
                f"{len(prompts)} pictures of set {name}, but the card is of {had[name]}; generate as many, "
                'or take "quality" out of the card first'
            )


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
        try:
            check(file, about, card)
        except ValueError as error:
            parser.error(f"{file}: {error}")
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
