"""Stable Diffusion XL: `python -m pipelines.sdxl --prompt "a red apple" --ratio 0.5`."""

import sys

import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.recipe import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(StableDiffusionXLPipeline,),
    family="unet",
    model="stabilityai/stable-diffusion-xl-base-1.0",
    steps=30,
    gpu_dtype=torch.float16,
    multiple=8,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
