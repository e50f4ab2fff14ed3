"""CogVideoX, text to video: `python -m pipelines.cogvideox --prompt "a cat walks on grass" --out cat.mp4`.

An .mp4 needs `pip install imageio imageio-ffmpeg`; a .gif or .webp needs nothing more.
"""

import sys

import torch
from diffusers import CogVideoXPipeline

from pipelines.recipe import Recipe, Video, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(CogVideoXPipeline,),
    family="cogvideox",
    model="THUDM/CogVideoX-5b",
    steps=50,
    gpu_dtype=torch.bfloat16,
    multiple=16,
    video=Video(frames=49, step=8, fps=8),
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
