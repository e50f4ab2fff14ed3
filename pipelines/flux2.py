"""FLUX.2: `python -m pipelines.flux2 --prompt "a red apple" --ratio 0.5 --offload`.

It also runs FLUX.2 Klein: `--model black-forest-labs/FLUX.2-klein-base-4B`.
"""

import sys

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline

from pipelines.recipe import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(Flux2Pipeline, Flux2KleinPipeline),
    family="flux2",
    model="black-forest-labs/FLUX.2-dev",
    steps=50,
    gpu_dtype=torch.bfloat16,
    multiple=16,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
