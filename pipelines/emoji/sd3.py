"""The embedded StableDiffusion3Pipeline: a transformer between the UNet pipeline's text encoder and VAE."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class ClipOnlySD3Pipeline(StableDiffusion3Pipeline):
    """A StableDiffusion3Pipeline whose text is that of the CLIP encoders alone.

    For a T5 that is not there, diffusers appends `max_sequence_length` tokens of zeros to the text, 256
    unless told otherwise. Attention sees them, 8 for each of the 32 real ones, and this transformer is
    trained without any.
    """

    _optional_components: ClassVar[list[str]] = [
        *StableDiffusion3Pipeline._optional_components,
        "text_encoder_3",
        "tokenizer_3",
    ]

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 256,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """No tokens, where T5's would be.  [B * images, 0, C]."""
        tokens: Tensor = super()._get_t5_prompt_embeds(
            prompt, num_images_per_prompt, max_sequence_length=0, device=device, dtype=dtype
        )
        return tokens


def with_projection(text: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same encoder as the class that a StableDiffusion3Pipeline takes; its projection is the identity."""
    config = CLIPTextConfig(**{**text.config.to_dict(), "projection_dim": text.config.hidden_size})
    model = CLIPTextModelWithProjection(config)
    missing, unexpected = model.load_state_dict(
        {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.state_dict().items()},
        strict=False,
    )
    assert missing == ["text_projection.weight"] and not unexpected, (missing, unexpected)
    nn.init.eye_(model.text_projection.weight)
    return model.to(next(text.parameters()).dtype).eval()


def assemble(
    transformer: Path,
    scheduler: Path,
    text_encoder: Path,
    tokenizer: Path,
    vae: Path,
    dtype: torch.dtype,
) -> ClipOnlySD3Pipeline:
    """The pipeline of parts in folders of their own; its one text encoder stands in both places."""
    local = {"local_files_only": True}
    text = with_projection(CLIPTextModel.from_pretrained(text_encoder, dtype=dtype, **local))
    pieces = CLIPTokenizer.from_pretrained(tokenizer, **local)
    return ClipOnlySD3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(transformer, torch_dtype=dtype, **local),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler, **local),
        vae=AutoencoderKL.from_pretrained(vae, torch_dtype=dtype, **local),
        text_encoder=text,
        tokenizer=pieces,
        text_encoder_2=text,
        tokenizer_2=pieces,
        text_encoder_3=None,
        tokenizer_3=None,
    )
