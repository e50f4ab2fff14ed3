"""LTX-2.3, text to video: `python -m pipelines.ltx2 --prompt "a cat walks on grass" --out cat.mp4`.

Its sound is not written. An .mp4 needs `pip install imageio imageio-ffmpeg`; a .gif or .webp
needs nothing more.
"""

import sys

import torch
from diffusers import LTX2Pipeline

from pipelines.recipe import Recipe, Video, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(LTX2Pipeline,),
    family="ltx2",
    model="diffusers/LTX-2.3-Diffusers",
    steps=30,
    gpu_dtype=torch.bfloat16,
    multiple=32,
    video=Video(frames=121, step=8, fps=24),
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
