"""Stable Diffusion XL: `python -m pipelines.sdxl --prompt "a red apple" --ratio 0.5`."""

import sys
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.recipe import run


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        argv,
        StableDiffusionXLPipeline,
        description=__doc__,
        model="stabilityai/stable-diffusion-xl-base-1.0",
        steps=30,
        gpu_dtype=torch.float16,
    )


if __name__ == "__main__":
    sys.exit(main())
