"""Stable Diffusion 3 and 3.5: `python -m pipelines.sd3 --prompt "a red apple" --ratio 0.5`."""

import sys

import torch
from diffusers import StableDiffusion3Pipeline

from pipelines.recipe import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(StableDiffusion3Pipeline,),
    family="sd3",
    model="stabilityai/stable-diffusion-3.5-medium",
    steps=28,
    gpu_dtype=torch.bfloat16,
    multiple=16,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
