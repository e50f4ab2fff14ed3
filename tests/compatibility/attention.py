"""How attention is computed."""

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from .base import FLUX, TRANSFORMER, UNET, Combination, Refused, denoiser

FUSED = Refused("has fused QKV projections")


def fuse(pipe: Any) -> None:
    denoiser(pipe).fuse_qkv_projections()


def unfuse(pipe: Any) -> None:
    denoiser(pipe).unfuse_qkv_projections()


def backend(name: str) -> Callable[[Any], None]:
    return lambda pipe: denoiser(pipe).set_attention_backend(name)


def process(processor: type) -> Callable[[Any], None]:
    return lambda pipe: pipe.unet.set_attn_processor(processor())


ATTENTION = (
    Combination(
        "fused QKV",
        unet=UNET,
        transformer=TRANSFORMER | FLUX,
        put=fuse,
        take=unfuse,
        changes=False,
        tokens=FUSED,
        instead={"keys_values": "dropped"},
    ),
    *(
        Combination(
            f'`set_attention_backend("{name}")`',
            transformer=FLUX,
            put=backend(name),
            take=backend("native"),
            changes=False,
            close=True,
        )
        for name in ("native", "_native_math", "_native_flash")
    ),
    *(
        Combination(
            f"`{processor.__name__}`",
            unet=UNET,
            put=process(processor),
            take=process(AttnProcessor2_0),
            changes=False,
            close=True,
        )
        for processor in (AttnProcessor, AttnProcessor2_0)
    ),
    Combination(
        "attention slicing",
        unet=UNET,
        put=lambda pipe: pipe.enable_attention_slicing(1),
        take=process(AttnProcessor2_0),
        changes=False,
        close=True,
    ),
)
