"""Wan, text to video: `python -m pipelines.wan --prompt "a cat walks on grass" --out cat.mp4`.

An .mp4 needs `pip install imageio imageio-ffmpeg`; a .gif or .webp needs nothing more. Wan 2.2 has two
denoisers, and tofu is applied to both: `--model Wan-AI/Wan2.2-T2V-A14B-Diffusers --offload`.
"""

import sys

import torch
from diffusers import WanPipeline

from pipelines.recipe import Recipe, Video, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(WanPipeline,),
    family="wan",
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    steps=50,
    gpu_dtype={"default": torch.bfloat16, "vae": torch.float32},
    multiple=16,
    video=Video(frames=81, step=4, fps=16),
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
