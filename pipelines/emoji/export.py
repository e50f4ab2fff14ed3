"""Write the trained parts in diffusers' folder format, in fp16: `weights/` and `mmdit/`."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import averaged, with_module
from pipelines.emoji.mmdit import new_flow_scheduler, new_transformer
from pipelines.emoji.text import new_tokenizer, trained_text_encoder
from pipelines.emoji.unet import new_scheduler, new_unet
from pipelines.emoji.vae import SIDES, encode_all, encoder_of, trained_vae

EMBEDDED = ("weights", "mmdit", "scorer")
LIMIT_BYTES, FILE_LIMIT_BYTES = 24_000_000, 15_000_000


def export(emoji: Emoji, work: Path, home: Path) -> None:
    """The averaged weights of the furthest stage of each denoiser replace those under `home`.

    So does a decoder that was trained further, of the UNet's pipeline or alone.

    Raises:
        SystemExit: if there is nothing, or one was trained with another autoencoder or text encoder than it
            would lie beside.
    """
    unet, mmdit = (_furthest(work, name) for name in ("unet", "mmdit"))
    decoder = work / "decoder.pt"
    if unet is None and mmdit is None and not decoder.exists():
        raise SystemExit(
            f"no denoiser's checkpoint in {work}; train one first: "
            "python -m pipelines.emoji.train --stage unet32 --minutes 10"
        )
    latents = encode_all(emoji, work, torch.device("cpu"))
    vae, text = trained_vae(work, latents), trained_text_encoder(emoji, work)
    basis = with_module(latents.basis, text)
    changed = _changed(vae, text, home / "weights")
    if unet is None and changed:
        raise SystemExit(
            f"{changed} in {work} is not that of {home / 'weights'}, and there is no UNet to be exported "
            "with it; train that first: python -m pipelines.emoji.train --stage unet32 --minutes 10"
        )
    if mmdit is None and changed and (home / "mmdit" / "transformer").is_dir():
        print(
            f"{changed} is another one now: train the transformer in {home / 'mmdit'} with it, and export "
            "again: python -m pipelines.emoji.train --stage mmdit32 --minutes 10",
            flush=True,
        )
    writers: dict[Path, Callable[[Path], object]] = {}  # all is read before anything is replaced
    if unet is not None:
        # The first stage trains the text encoder too.
        own = latents.basis if unet.stem == "unet32" else basis
        pipe = _unet_pipeline(emoji, vae, text, averaged(unet, "unet.", own))
        writers[home / "weights"] = pipe.save_pretrained
    elif decoder.exists():
        writers[home / "weights" / "vae"] = vae.to(torch.float16).save_pretrained
    if mmdit is not None:
        # One by one: the samples of the card lie beside them.
        transformer = _transformer(averaged(mmdit, "mmdit.", basis))
        writers[home / "mmdit" / "transformer"] = transformer.save_pretrained
        writers[home / "mmdit" / "scheduler"] = new_flow_scheduler().save_pretrained
    for folder, write in writers.items():
        _replace(folder, write)
    for folder in writers:
        print(f"exported {folder}")
    check_sizes(home)


def _changed(vae: AutoencoderKL, text: CLIPTextModel, weights: Path) -> str | None:
    """Which part that denoisers depend on is not the one in a folder of weights, if there is one."""
    if not weights.is_dir():
        return None
    theirs = CLIPTextModel.from_pretrained(weights / "text_encoder", local_files_only=True)
    if not _alike(text, theirs):
        return "the text encoder"
    saved = AutoencoderKL.from_pretrained(weights / "vae", local_files_only=True)
    alike = _alike(encoder_of(vae), encoder_of(saved))
    return None if alike else "the encoder of the autoencoder"


def _alike(mine: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules are the same as exported, in half precision."""
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(one.half(), other.half()) for one, other in pairs)


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
