"""Write the trained parts in diffusers' folder format, in fp16: `weights/` and `mmdit/`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusionPipeline

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import averaged
from pipelines.emoji.mmdit import new_flow_scheduler, new_transformer
from pipelines.emoji.text import new_tokenizer, trained_text_encoder
from pipelines.emoji.unet import new_scheduler, new_unet
from pipelines.emoji.vae import SIDES, trained_vae

EMBEDDED = ("weights", "mmdit", "scorer")
LIMIT_BYTES, FILE_LIMIT_BYTES = 24_000_000, 15_000_000


def export(emoji: Emoji, work: Path, home: Path) -> None:
    """The averaged weights of the furthest stage of each denoiser replace those under `home`."""
    unet, mmdit = (_furthest(work, name) for name in ("unet", "mmdit"))
    if unet is None and mmdit is None:
        raise SystemExit(
            f"no denoiser's checkpoint in {work}; train one first: "
            "python -m pipelines.emoji.train --stage unet32 --minutes 10"
        )
    if unet is not None:
        pipe = _unet_pipeline(emoji, work, unet)
        _replace(home / "weights", pipe.save_pretrained)
    if mmdit is not None:
        # One by one: the samples of the card lie beside them.
        _replace(home / "mmdit" / "transformer", _transformer(mmdit).save_pretrained)
        _replace(home / "mmdit" / "scheduler", new_flow_scheduler().save_pretrained)
    for checkpoint in filter(None, (unet, mmdit)):
        print(f"exported {checkpoint.stem}")
    check_sizes(home)


def check_sizes(home: Path) -> None:
    """What a clone of the repository downloads has a limit, and so has each of its files."""
    sizes = {f: f.stat().st_size for name in EMBEDDED for f in (home / name).rglob("*.safetensors")}
    total = sum(sizes.values())
    print(f"{total / 1e6:.2f} MB of weights in {home}")
    if total > LIMIT_BYTES:
        raise SystemExit(f"{total} bytes of weights exceed {LIMIT_BYTES}; use smaller models")
    for file, size in sizes.items():
        if size > FILE_LIMIT_BYTES:
            raise SystemExit(f"{file} has {size} bytes, more than {FILE_LIMIT_BYTES}; split it")


def _furthest(work: Path, denoiser: str) -> Path | None:
    """The checkpoint of the last stage that a denoiser was trained in."""
    stages = (work / f"{denoiser}{side}.pt" for side in reversed(SIDES))
    return next(filter(Path.exists, stages), None)


def _unet_pipeline(emoji: Emoji, work: Path, checkpoint: Path) -> StableDiffusionPipeline:
    unet = new_unet()
    unet.load_state_dict(averaged(checkpoint, "unet."))
    return StableDiffusionPipeline(
        vae=trained_vae(work),
        text_encoder=trained_text_encoder(emoji, work, "unet32").eval(),
        tokenizer=new_tokenizer(emoji),
        unet=unet.eval(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)


def _transformer(checkpoint: Path) -> SD3Transformer2DModel:
    """For large pictures, whichever stage the weights are of: all but the table of positions is alike."""
    transformer = new_transformer()
    missing, unexpected = transformer.load_state_dict(averaged(checkpoint, "mmdit."), strict=False)
    assert missing == ["pos_embed.pos_embed"] and not unexpected, (missing, unexpected)
    return transformer.to(torch.float16).eval()


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Write beside the folder, then rename: a kill leaves the old one or the new one, whole."""
    part, old = folder.with_suffix(".part"), folder.with_suffix(".old")
    for rest in (part, old):
        shutil.rmtree(rest, ignore_errors=True)
    write(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
