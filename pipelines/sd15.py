"""Stable Diffusion 1.x and 2.x: `python -m pipelines.sd15 --prompt "a red apple" --ratio 0.5`."""

import sys
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from pipelines.recipe import run


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        argv,
        StableDiffusionPipeline,
        description=__doc__,
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        steps=30,
        gpu_dtype=torch.float16,
    )


if __name__ == "__main__":
    sys.exit(main())
