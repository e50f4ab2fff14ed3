"""How well pictures show their prompts, by the emoji scorer or by a CLIP model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score
from transformers import AutoModel, AutoProcessor, CLIPModel

from eval.generate.prompts import as_prompts
from eval.metrics.extractors import weights_of
from pipelines.emoji import MODELS, weights_hash
from pipelines.emoji.scorer import EmojiScorer


class Alignment(Protocol):
    """How well pictures show their prompts. identity: "name", of the metric, and what else it depends on."""

    identity: dict[str, Any]

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Score each picture with its own prompt; more is better.  uint8 [B, 3, H, W] -> [B]."""
        ...


class EmojiAlignment:
    """The emoji scorer's: cosine x 100, from a head trained apart from every pipeline. No CLIP score."""

    def __init__(self) -> None:
        self.scorer = EmojiScorer.load()
        networks = nn.ModuleList([self.scorer.lite0, self.scorer.minilm, self.scorer.head])
        self.identity = {
            "name": "emoji_alignment",
            "weights": weights_of(networks),
            "retrieval": self.scorer.retrieval,
        }

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Cosine x 100 of each picture with its prompt.  uint8 [B, 3, H, W] -> [B]."""
        return self.scorer.score(images, as_prompts(prompts))


class ClipAlignment:
    """The CLIP score, max(100 cos, 0) of each picture, of a CLIP model on the hub or in a folder.

    Raises:
        OSError: if the folder's files cannot be read.
        ValueError: if there is none, or it is another kind of model.
    """

    def __init__(self, source: str | Path) -> None:
        try:
            clip = AutoModel.from_pretrained(source)
        except OSError as error:
            if Path(source).is_dir():
                raise
            raise ValueError(
                f"--clip {source}: no such folder, and no model that the hub gives: {error}"
            ) from error
        if not isinstance(clip, CLIPModel):
            raise ValueError(
                f"{source} is a {type(clip).__name__}, no CLIPModel; name one of those"
            )
        clip = clip.eval().requires_grad_(False)
        longest = clip.config.text_config.max_position_embeddings
        # Cut by the tokenizer, a long prompt keeps its end token, which CLIP reads the text's features from.
        processor = functools.partial(
            AutoProcessor.from_pretrained(source), truncation=True, max_length=longest
        )
        self.parts = (_Clip(clip), processor)
        self.identity = {
            "name": "clip_score",
            "model": Path(source).name if Path(source).is_dir() else str(source),
            "weights": weights_of(clip),
        }

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """CLIP score of each picture with its prompt.  uint8 [B, 3, H, W] -> [B]."""
        pairs = zip(images, as_prompts(prompts), strict=True)
        return torch.stack(
            [clip_score(image, prompt, lambda: self.parts) for image, prompt in pairs]
        )


class _Clip(nn.Module):
    """As torchmetrics 1.9 expects it: since transformers 5 features come inside of an output."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip, self.config = clip, clip.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.clip.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.clip.get_text_features(tokens, mask).pooler_output


def default_alignment(weights: str) -> EmojiAlignment | None:
    """The emoji scorer for pipelines embedded here; None for others, which need a CLIP model."""
    embedded = weights in map(weights_hash, MODELS)
    return EmojiAlignment() if embedded else None
