"""Number formats and memory formats."""

from functools import partial
from typing import Any

import torch
from diffusers.hooks import apply_layerwise_casting

from .base import FLUX, TRANSFORMER, UNET, Combination, denoiser

formats = partial(Combination, unet=UNET, transformer=TRANSFORMER | FLUX)


def cast(pipe: Any, dtype: torch.dtype) -> None:
    pipe.to(dtype)


def cast_layers(pipe: Any) -> None:
    apply_layerwise_casting(
        denoiser(pipe), storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )


def cast_layers_float8(pipe: Any) -> None:
    denoiser(pipe).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def contiguous(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.contiguous_format)


def quantised(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser(pipe), Int8WeightOnlyConfig())


NUMERICS = (
    formats("bfloat16", put=partial(cast, dtype=torch.bfloat16)),
    formats("float16", put=partial(cast, dtype=torch.float16)),
    formats("layerwise casting, bfloat16", put=cast_layers),
    formats("layerwise casting, float8", put=cast_layers_float8),
    Combination(
        "channels last",
        unet=UNET,
        put=channels_last,
        take=contiguous,
        changes=False,
    ),
    formats("int8 weights (torchao)", put=quantised, needs="torchao"),
)
