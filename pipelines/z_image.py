"""Z-Image: `python -m pipelines.z_image --prompt "a red apple" --ratio 0.5`.

The default model is distilled to 8 steps, with no past to build on: `--ratio` merges without memory there.
"""

import sys

import torch
from diffusers import ZImagePipeline

from pipelines.recipe import Recipe, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(ZImagePipeline,),
    family="z_image",
    model="Tongyi-MAI/Z-Image-Turbo",
    steps=9,
    gpu_dtype=torch.bfloat16,
    multiple=16,
    call={"guidance_scale": 0.0},
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
