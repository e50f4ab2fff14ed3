"""PixArt-Sigma and alpha: `python -m pipelines.pixart --prompt "a red apple" --ratio 0.5`.

For alpha add `--model PixArt-alpha/PixArt-XL-2-1024-MS`.
"""

import sys

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

from pipelines.recipe import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(PixArtSigmaPipeline, PixArtAlphaPipeline),
    family="pixart",
    model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    steps=20,
    gpu_dtype=torch.float16,
    multiple=16,
    call={
        # Compute the size asked for, not the nearest one of the training's: tokens are what counts here.
        "use_resolution_binning": False,
        # One prompt, one picture, whether or not the packages that would clean it are installed.
        "clean_caption": False,
    },
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
