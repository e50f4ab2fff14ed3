"""Stable Diffusion 3 and 3.5: `python -m pipelines.sd3 --prompt "a red apple" --ratio 0.5`."""

import sys
from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline

from pipelines.recipe import run


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        argv,
        StableDiffusion3Pipeline,
        description=__doc__,
        model="stabilityai/stable-diffusion-3.5-medium",
        steps=28,
        gpu_dtype=torch.bfloat16,
    )


if __name__ == "__main__":
    sys.exit(main())
