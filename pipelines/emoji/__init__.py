"""Small text-to-image pipelines trained in this repository, with their weights.

>>> from pipelines.emoji import load_pipeline
>>> image = load_pipeline()("a red apple").images[0]
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

# Name -> folder in diffusers' standard format.
MODELS = {"unet": Path(__file__).parent / "weights"}


def load_pipeline(model: str = "unet", dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """An embedded pipeline, without any network; float32 unless told otherwise."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(sorted(MODELS))}")
    folder = MODELS[model]
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"no weights at {folder}; make them: python -m pipelines.emoji.train --stage export "
            "(after its other stages)"
        )
    import torch
    from diffusers import DiffusionPipeline

    pipe: DiffusionPipeline = DiffusionPipeline.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True
    )
    return pipe


def weights_hash(model: str = "unet") -> str:
    """First 16 hex digits of the SHA-256 over an embedded pipeline's weight files, by name."""
    digest = hashlib.sha256()
    for path in sorted(MODELS[model].rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
