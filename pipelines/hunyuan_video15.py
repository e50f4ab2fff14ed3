"""HunyuanVideo 1.5, text to video: `python -m pipelines.hunyuan_video15 --prompt "a cat" --out cat.mp4`.

An .mp4 needs `pip install imageio imageio-ffmpeg`; a .gif or .webp needs nothing more.
"""

import sys

import torch
from diffusers import HunyuanVideo15Pipeline

from pipelines.recipe import Recipe, Video, run

RECIPE = Recipe(
    description=__doc__,
    pipelines=(HunyuanVideo15Pipeline,),
    family="hunyuan_video_1_5",
    model="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    steps=50,
    gpu_dtype=torch.bfloat16,
    multiple=16,
    video=Video(frames=121, step=4, fps=24),
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
