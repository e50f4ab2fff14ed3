"""Measure an embedded pipeline and write its model card: `python -m pipelines.emoji.card --model unet`.

Writes samples.png, card.json (all figures) and the model's block of README.md, between its figure marks.
"""

import argparse
import json
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from pipelines.emoji import (
    GUIDANCE,
    HERE,
    MMDIT,
    MODELS,
    WEIGHTS,
    data,
    denoiser,
    load_pipeline,
    weights_hash,
)
from pipelines.emoji.ceiling import ceiling
from pipelines.emoji.data import Emoji
from pipelines.emoji.scorer import EmojiScorer
from pipelines.emoji.sheet import sheet

README = HERE / "README.md"
END = "<!-- /figures -->"
# By which the pictures are judged: each should be named by someone who does not read it.
SHOWN = (
    "a red apple", "a smiling face", "a blue car", "a yellow star",
    "a red heart", "a green tree", "a pizza slice", "a rocket",
    "a fish", "a cat face", "a house", "a strawberry",
)  # fmt: skip
STEPS, SEED, COUNT = 20, 0, 20
# Pictures of `eval.studies.emoji.quality` beside the card.
SHEETS = {
    "held_out": "Names that were held out",
    "compositions": "Colours and objects that the pipelines do not see together",
}
HALVES = "one half to the other"
LABELS = {
    "training": "training names",
    "held_out": "held-out names",
    "compositions": "a colour and an object that the pipelines do not see together",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    folder: of its samples.png and card.json; weights: of all weights of its own; parts: those that have
    these weights; stages: those that trained them.
    """

    folder: Path
    weights: Path
    parts: tuple[str, ...]
    stages: tuple[str, ...]
    sampler: str
    mark: str

    @property
    def card(self) -> Path:
        """Where the measured numbers lie."""
        return self.folder / "card.json"


SUBJECTS = {
    "unet": Subject(
        folder=HERE,
        weights=WEIGHTS,
        parts=("text_encoder", "vae", "unet"),
        stages=("vae", "decoder", "text", "unet32", "unet64", "unet128"),
        sampler="DDIM",
        mark="<!-- figures: python -m pipelines.emoji.card -->",
    ),
    "mmdit": Subject(
        folder=MMDIT,
        weights=MMDIT,
        parts=("transformer",),
        stages=("mmdit32", "mmdit64", "mmdit128"),
        sampler="flow-matching Euler",
        mark="<!-- figures: python -m pipelines.emoji.card --model mmdit -->",
    ),
}


def generate(pipe: Any, prompts: list[str]) -> list[Image.Image]:
    """One picture a prompt; the first seed, without selection."""
    pictures: list[Image.Image] = []
    for i in range(0, len(prompts), 6):
        pictures += generate_batch(pipe, prompts[i : i + 6], SEED + i, STEPS)
    return pictures


def generate_batch(
    pipe: Any,
    prompts: list[str],
    first_seed: int,
    steps: int,
    side: int | None = None,
    output_type: str = "pil",
) -> Any:
    """Pictures, or what else `output_type` asks for, in one batch.

    The noise is drawn on the CPU, the same for every device.
    """
    seeds = [torch.Generator().manual_seed(first_seed + k) for k in range(len(prompts))]
    return pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=seeds,
        height=side,
        width=side,
        output_type=output_type,
    ).images


def training(log: Path, stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The last figures of these stages in the log."""
    last: dict[str, dict[str, Any]] = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        name = row.pop("stage")
        if name in stages:
            stage = last.setdefault(name, {})
            stage |= {"minutes": round(row.pop("minutes"), 1), "steps": row.pop("step")}
            stage[row.pop("split")] = row
    return last


def alignment(pipe: Any, emoji: Emoji, scorer: EmojiScorer) -> dict[str, dict[str, float]]:
    """Scores of samples beside those of real pictures of the same names, on both sides."""
    result = {}
    for side, chosen in (("training", emoji.trained), ("held_out", emoji.held_out)):
        rows = np.flatnonzero(chosen & ~emoji.recoloured).tolist()
        rows = random.Random(SEED).sample(rows, COUNT)
        names = [emoji.concepts[i] for i in rows]
        made = np.stack([np.asarray(picture) for picture in generate(pipe, names)])
        real = emoji.images[rows]
        shuffled = names[1:] + names[:1]
        scores = {
            label: scorer.score(torch.from_numpy(pictures).permute(0, 3, 1, 2), texts)
            for label, pictures, texts in (
                ("samples", made, names),
                ("real", real, names),
                ("real_wrong_name", real, shuffled),
            )
        }
        result[side] = {k: round(v.mean().item(), 1) for k, v in scores.items()} | {"n": COUNT}
    return result


def measure(model: str, work: Path, trained: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Generate, score and draw what the card shows; `trained` is what `training` said."""
    subject = SUBJECTS[model]
    pipe, emoji, scorer = load_pipeline(model), data.load(work / "emoji.npz"), EmojiScorer.load()
    pictures = generate(pipe, list(SHOWN))
    cuts = range(0, len(SHOWN), 4)
    canvas = sheet([pictures[i : i + 4] for i in cuts], [SHOWN[i : i + 4] for i in cuts], cell=128)
    canvas.save(subject.folder / "samples.png", optimize=True)
    parts = {name: getattr(pipe, name) for name in subject.parts}
    files = subject.weights.rglob("*.safetensors")
    return {
        "model": model,
        "weights_sha256": weights_hash(model),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
        "sampling": {"steps": STEPS, "guidance": GUIDANCE, "first_seed": SEED},
        "images": len(emoji.names),
        "concepts": len(set(emoji.concepts)),
        "held_out_concepts": int((emoji.held_out & ~emoji.recoloured).sum()),
        "held_out_pairs": int(emoji.held_pair.sum()),
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()},
        "weights_mb": round(sum(f.stat().st_size for f in files) / 1e6, 2),
        "counted": {k: round(v, 3) for k, v in ceiling(denoiser(pipe), 32).items()},
        "training": trained,
        "retrieval": scorer.retrieval,
        "alignment": alignment(pipe, emoji, scorer),
    }


def head(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def block(card: dict[str, Any]) -> str:
    """The figures as Markdown; those of data and scorer stand in the first pipeline's block only."""
    first = card["model"] == "unet"
    lines = head("stage", "minutes", "steps", "training loss", "averaged weights")
    for stage, row in card["training"].items():
        held = ", ".join(f"{k} {v:.4g}" for k, v in row.get("held_out", {}).items())
        loss = f"{row['train']['loss']:.4g}" if "train" in row else "not logged"
        lines.append(f"| {stage} | {row['minutes']} | {row['steps']:,} | {loss} | {held} |")
    sizes = ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in card["parameters"].items())
    counted = card["counted"]
    lines.append("")
    if first:
        lines.append(
            f"- Data: {card['images']:,} pictures of {card['concepts']:,} concepts, "
            f"{card['held_out_concepts']} concepts and {card['held_out_pairs']} pairs of a colour and a "
            "concept held out."
        )
    sampling = card["sampling"]
    lines += [
        f"- Parameters: {sizes}; {card['weights_mb']} MB of fp16 weights "
        f"(sha256 {card['weights_sha256']}).",
        f"- Denoiser at {counted['tokens']:,.0f} tokens: {counted['gflops']:.2f} GFLOPs a call and "
        f"picture (guidance takes two), {counted['share_in_blocks']:.0%} of them in transformer blocks; "
        f"halving the tokens of every block can give at most {counted['ceiling']:.2f}x.",
        "",
        *head(
            "alignment (mean, cosine x 100)",
            "samples",
            "real pictures",
            "real pictures, wrong name",
            "n",
        ),
    ]
    lines += [
        f"| {side.replace('_', '-')} names | {row['samples']} | {row['real']} "
        f"| {row['real_wrong_name']} | {row['n']} |"
        for side, row in card["alignment"].items()
    ]
    lines += [
        "",
        f"{data.SIZE} px, {sampling['steps']} {SUBJECTS[card['model']].sampler} steps, guidance "
        f"{sampling['guidance']:g}, seeds from {sampling['first_seed']} on, no selection; torch "
        f"{card['torch']}, diffusers {card['diffusers']}.",
    ]
    if first:
        lines += [
            "",
            *head("retrieval by the scorer, real pictures", "R@1", "R@5", "chance", "n"),
        ]
        lines += [
            f"| {LABELS[side]} | {row['R@1']:.2f} | {row['R@5']:.2f} | {row['chance']:.3f} | {row['n']} |"
            for side, row in card["retrieval"].items()
            if isinstance(row, dict)
        ]
    if "quality" in card:
        lines += ["", *quality_lines(card["quality"], SUBJECTS[card["model"]].folder)]
    return "\n".join(lines)


def _times(row: dict[str, Any], measured: dict[str, Any]) -> str:
    """A distance over that of real pictures to others, where both are of as many pictures."""
    least = measured["distances"][HALVES]
    return f"{row['value'] / least['value']:.1f}" if row["n"] == least["n"] else ""


def quality_lines(quality: dict[str, Any], folder: Path) -> list[str]:
    """What `eval.studies.emoji.quality` measured, by the size of the pictures."""
    kinds = {
        "samples": "samples",
        "autoencoder": "real pictures through the autoencoder",
        "real": "real pictures",
    }
    found = [
        f"| {side} | {LABELS[name]} | {row['n']} | "
        + " | ".join(str(row[kind]["R@1"]) for kind in kinds)
        + f" | {row['chance']} | "
        + " | ".join(str(row[kind]["alignment"]) for kind in kinds)
        + " |"
        for side, measured in quality.items()
        for name, row in measured["retrieval"].items()
    ]
    distances = [
        f"| {side} | {measured['distance']} | {name} | {row['value']} | {_times(row, measured)} "
        f"| {row['n'][0]:,} and {row['n'][1]:,} |"
        for side, measured in quality.items()
        for name, row in measured.get("distances", {}).items()
    ]
    warnings = [
        row["warning"]
        for measured in quality.values()
        for row in measured.get("distances", {}).values()
        if "warning" in row
    ]
    lines: list[str] = []
    if found:
        first, *others = kinds.values()
        hits, scores = ([f"{score} of {first}", *others] for score in ("R@1", "alignment"))
        lines += [*head("pixels", "prompts", "n", *hits, "chance", *scores), *found]
    if distances:
        times = f"times that of {HALVES}"
        lines += [
            "",
            *head("pixels", "distance", "of what", "value", times, "pictures"),
            *distances,
        ]
        lines += ["", *(f"{each}." for each in dict.fromkeys(warnings))]
    for sampling in {str(each["sampling"]): each["sampling"] for each in quality.values()}.values():
        sides = [side for side, each in quality.items() if each["sampling"] == sampling]
        lines += [
            "",
            f"{' and '.join(sides)} px, {sampling['steps']} steps, guidance {sampling['guidance']:g}, seeds "
            f"of each set from {sampling['first_seed']} on, no selection.",
        ]
    for name, label in SHEETS.items():
        if name in quality.get(str(data.SIZE), {}).get("retrieval", {}):
            path = (folder / f"{name}.webp").relative_to(HERE)
            lines += ["", f"![{label}]({path.as_posix()})"]
    return lines


def write_readme(card: dict[str, Any]) -> None:
    """Replace what stands between the model's marks."""
    mark = SUBJECTS[card["model"]].mark
    head, rest = README.read_text(encoding="utf-8").split(mark)
    tail = rest.split(END, maxsplit=1)[1]
    README.write_text(f"{head}{mark}\n{block(card)}\n{END}{tail}", encoding="utf-8")


def read(model: str) -> dict[str, Any]:
    """The card as it is."""
    card: dict[str, Any] = json.loads(SUBJECTS[model].card.read_text())
    return card


def save(card: dict[str, Any]) -> None:
    """Write the numbers, and the README that shows them."""
    write_readme(card)
    SUBJECTS[card["model"]].card.write_text(json.dumps(card, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one model and rewrite its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="unet")
    parser.add_argument("--work", type=Path, default=data.WORK, help="with the training data")
    parser.add_argument("--log", type=Path, help="of the training; default: log.jsonl of --work")
    args = parser.parse_args(argv)
    log, stages = args.log or args.work / "log.jsonl", SUBJECTS[args.model].stages
    before = read(args.model) if SUBJECTS[args.model].card.exists() else {}
    same = before.get("weights_sha256") == weights_hash(args.model)
    if same and args.log is None:
        trained = before["training"]
    else:
        trained = training(log, stages) if log.is_file() else {}
    if not trained:
        lack = (
            f"no stage of {args.model} in {log}"
            if log.is_file()
            else f"no log of a training at {log}"
        )
        parser.error(f"{lack}; name that of these weights with --log")
    card = measure(args.model, args.work, trained)
    if same and "quality" in before and before["retrieval"] == card["retrieval"]:  # the scorer's
        card["quality"] = before["quality"]
    save(card)
    print(block(card))


if __name__ == "__main__":
    main()
