"""Stable Diffusion 1.x and 2.x: `python -m pipelines.sd15 --prompt "a red apple" --ratio 0.5`."""

import sys

import torch
from diffusers import StableDiffusionPipeline

from pipelines.recipe import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(StableDiffusionPipeline,),
    family="unet",
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    steps=30,
    gpu_dtype=torch.float16,
    multiple=8,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
