"""Small text-to-image pipelines trained in this repository, with their weights.

>>> from pipelines.emoji import load_pipeline
>>> image = load_pipeline()("a red apple").images[0]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin

HERE = Path(__file__).parent
WEIGHTS, MMDIT = HERE / "weights", HERE / "mmdit"
# The scale that both are shown and measured at; 4 saturates the colours.
GUIDANCE = 3.0
# Name -> the folders that a pipeline is made of. The second has only its transformer and scheduler for
# itself, so that text encoder and VAE are stored once.
MODELS = {
    "unet": (WEIGHTS,),
    "mmdit": (
        *(MMDIT / part for part in ("transformer", "scheduler")),
        *(WEIGHTS / part for part in ("text_encoder", "tokenizer", "vae")),
    ),
}


def folders_of(model: str, home: Path | None = None) -> tuple[Path, ...]:
    """The folders of `MODELS`, of this package or as exported to another home."""
    if home is None:
        return MODELS[model]
    return tuple(home / folder.relative_to(HERE) for folder in MODELS[model])


def load_pipeline(
    model: str = "unet", dtype: torch.dtype | None = None, home: Path | None = None
) -> DiffusionPipeline:
    """An embedded pipeline, without any network; float32 unless told otherwise.

    home: where else than in this package its weights were exported to.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(sorted(MODELS))}")
    folders = folders_of(model, home)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no weights at {folder}; make them: python -m pipelines.emoji.train --stage export "
                "(after its other stages)"
            )
    import torch
    from diffusers import DiffusionPipeline

    from pipelines.emoji.sd3 import assemble

    dtype = dtype or torch.float32
    if model == "mmdit":
        return assemble(*folders, dtype=dtype)
    pipe: DiffusionPipeline = DiffusionPipeline.from_pretrained(
        *folders, dtype=dtype, local_files_only=True
    )
    return pipe


def denoiser(pipe: Any) -> ModelMixin:
    """What a pipeline calls at every step: its UNet or its transformer."""
    model: ModelMixin = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return model


def weights_hash(model: str = "unet", home: Path | None = None, *, decoder: bool = True) -> str:
    """First 16 hex digits of the SHA-256 over an embedded pipeline's weight files, shared ones too.

    decoder: with the autoencoder's, of which latents do not depend.
    """
    files = (
        path for each in folders_of(model, home) for path in sorted(each.rglob("*.safetensors"))
    )
    return hash_of(path for path in files if decoder or path.parent.name != "vae")


def hash_of(files: Iterable[Path]) -> str:
    """First 16 hex digits of the SHA-256 over files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
