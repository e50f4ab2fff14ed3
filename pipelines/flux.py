"""FLUX.1: `python -m pipelines.flux --prompt "a red apple" --ratio 0.5`.

The default model is 34 GB; with --offload a GPU holds 24 GB of it at once, the denoiser. To download it
accept the licence on its hub page and log in with `hf auth login`.
"""

import sys

import torch
from diffusers import FluxPipeline

from pipelines.recipe import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(FluxPipeline,),
    family="flux",
    model="black-forest-labs/FLUX.1-dev",
    steps=28,
    gpu_dtype=torch.bfloat16,
    multiple=16,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
