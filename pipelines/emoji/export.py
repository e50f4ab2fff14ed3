"""Write the trained parts as a standard StableDiffusionPipeline folder, in fp16."""

import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import averaged
from pipelines.emoji.text import new_tokenizer, trained_text_encoder
from pipelines.emoji.unet import new_scheduler, new_unet
from pipelines.emoji.vae import trained_vae

LIMIT_BYTES = 15_000_000


def export(emoji: Emoji, work: Path, weights: Path) -> None:
    """The averaged weights of the furthest stage trained so far replace the folder at once."""
    stage = "unet128" if (work / "unet128.pt").exists() else "unet64"
    unet = new_unet()
    unet.load_state_dict(averaged(work / f"{stage}.pt", "unet."))
    pipe = StableDiffusionPipeline(
        vae=trained_vae(work),
        text_encoder=trained_text_encoder(emoji, work, "unet64").eval(),
        tokenizer=new_tokenizer(emoji),
        unet=unet.eval(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    part, old = weights.with_suffix(".part"), weights.with_suffix(".old")
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(part, safe_serialization=True)
    if weights.exists():
        weights.rename(old)
    part.rename(weights)
    shutil.rmtree(old, ignore_errors=True)
    sizes = [f.stat().st_size for f in weights.rglob("*.safetensors")]
    print(f"exported {stage}: {sum(sizes) / 1e6:.2f} MB of weights in {weights}")
    if sum(sizes) > LIMIT_BYTES:
        raise SystemExit(f"{sum(sizes)} bytes of weights exceed {LIMIT_BYTES}; use a smaller model")
