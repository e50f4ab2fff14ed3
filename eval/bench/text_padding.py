"""How many FLOPs of full-size denoisers go into text padding that a mask hides.

    python -m eval padding --out eval/results/text_padding.jsonl

A row of a class says what a step takes with texts as long as its pipeline pads them, and with what is left of
them by `drop_text_padding=True`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench.full_size import BATCH, Published, example_of, measure_classes
from tofu_diffusers import FAMILIES, apply_tofu

WORDS = 64
"""Tokens of a prompt that are no padding."""
LONGER = {"Krea2Transformer2DModel": 512}
"""Of classes whose pipelines pad prompts to more than `Family.example` has."""


def classes() -> list[str]:
    """The denoisers whose text padding can be dropped."""
    return sorted(name for family in FAMILIES.values() if family.texts for name in family.classes)


def counted_text(name: str) -> dict[str, Any]:
    """What the row of a class says, of one row of the batch."""
    published = Published(name)
    family, inputs = published.family, published.inputs
    given = [text for text in family.texts if inputs.get(text.states) is not None]
    # Of the others a usual call has none, of which one token stays.
    left = [WORDS, *[1] * (len(given) - 1)]
    padded = [inputs[text.states].shape[1] for text in given]
    padded[0] = LONGER.get(name, padded[0])
    flops = Counter[str]()
    for part, weight in published.parts():
        for key, lengths in (("padded", padded), ("left", left)):
            flops[key] += weight * step_of(part, family, with_lengths(inputs, given, lengths))
    return {
        "config": published.config,
        "tokens": published.grid.tokens,
        "text": {text.states: ends for text, *ends in zip(given, padded, left, strict=True)},
        "step_flops": round(flops["padded"] / BATCH),
        "flops_ratio": round(flops["padded"] / flops["left"], 4),
    }


def with_lengths(
    inputs: dict[str, Any], texts: Sequence[Any], lengths: Sequence[int]
) -> dict[str, Any]:
    """The same arguments with texts of other lengths, all of which is shown."""
    changed = dict(inputs)
    for text, length in zip(texts, lengths, strict=True):
        before = inputs[text.states].shape[1]
        for name, dim in ((text.states, 1), (text.mask, 1), (text.ids, -2)):
            if inputs.get(name) is None:
                continue
            # All that stands behind the text stays; of the text itself only shapes count.
            first, rest = inputs[name].tensor_split([before], dim)
            sides = list(first.shape)
            sides[dim] = length
            changed[name] = torch.cat([first.new_zeros(sides), rest], dim)
    return changed


def step_of(model: Any, family: Any, inputs: dict[str, Any]) -> int:
    """FLOPs of one unreduced step with these arguments."""
    with example_of(family, inputs), apply_tofu(model, drop_text_padding=True) as handle:
        return handle.summary().flops_unreduced


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON-lines file; goes on where it was"
    )


def main(args: argparse.Namespace) -> None:
    """`python -m eval padding`."""
    measure_classes(args.out, classes(), counted_text)
