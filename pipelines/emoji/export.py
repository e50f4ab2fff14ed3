"""Write the trained parts in diffusers' folder format, in fp16: `weights/` and `mmdit/`."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import averaged, fingerprint
from pipelines.emoji.mmdit import new_flow_scheduler, new_transformer
from pipelines.emoji.text import new_tokenizer, trained_text_encoder
from pipelines.emoji.unet import new_scheduler, new_unet
from pipelines.emoji.vae import SIDES, encode_all, trained_vae

EMBEDDED = ("weights", "mmdit", "scorer")
LIMIT_BYTES, FILE_LIMIT_BYTES = 24_000_000, 15_000_000


def export(emoji: Emoji, work: Path, home: Path) -> None:
    """The averaged weights of the furthest stage of each denoiser replace those under `home`.

    Raises:
        SystemExit: if there is none, or one was trained with another autoencoder or text encoder.
    """
    unet, mmdit = (_furthest(work, name) for name in ("unet", "mmdit"))
    if unet is None and mmdit is None:
        raise SystemExit(
            f"no denoiser's checkpoint in {work}; train one first: "
            "python -m pipelines.emoji.train --stage unet32 --minutes 10"
        )
    latents = encode_all(emoji, work, torch.device("cpu"))
    text = trained_text_encoder(emoji, work, "unet32")
    basis = fingerprint(latents.basis, text)
    writers: dict[Path, Callable[[Path], object]] = {}  # all is read before anything is replaced
    if unet is not None:
        # The first stage trains the text encoder too.
        own = latents.basis if unet.stem == "unet32" else basis
        pipe = _unet_pipeline(emoji, trained_vae(work, latents), text, averaged(unet, "unet.", own))
        writers[home / "weights"] = pipe.save_pretrained
    if mmdit is not None:
        # One by one: the samples of the card lie beside them.
        transformer = _transformer(averaged(mmdit, "mmdit.", basis))
        writers[home / "mmdit" / "transformer"] = transformer.save_pretrained
        writers[home / "mmdit" / "scheduler"] = new_flow_scheduler().save_pretrained
    for folder, write in writers.items():
        _replace(folder, write)
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


def _unet_pipeline(
    emoji: Emoji, vae: AutoencoderKL, text: CLIPTextModel, weights: Mapping[str, Tensor]
) -> StableDiffusionPipeline:
    unet = new_unet()
    unet.load_state_dict(weights)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=new_tokenizer(emoji),
        unet=unet.eval(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)


def _transformer(weights: Mapping[str, Tensor]) -> SD3Transformer2DModel:
    """For large pictures, whichever stage the weights are of: all but the table of positions is alike."""
    transformer = new_transformer()
    missing, unexpected = transformer.load_state_dict(weights, strict=False)
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
