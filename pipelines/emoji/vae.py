"""The autoencoder: 128x128 pixels to 32x32 latents of 4 channels, and the cache of all latents."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pipelines.emoji import WEIGHTS
from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import (
    Budget,
    Loop,
    autocast,
    averaged,
    begin_with,
    save_atomic,
    with_module,
)

KL_WEIGHT = 2e-4
DECODER_NOISE = 0.1
"""At most so much is added to latents, whose standard deviation is 1, when the decoder is trained alone."""
SIDES = (32, 64, 128)
"""Of the pictures in pixels, in the order in which denoisers are trained on them."""


def new_vae() -> AutoencoderKL:
    """An autoencoder that halves each side twice, untrained."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,  # a StableDiffusion3Pipeline adds it, None or not
        mid_block_add_attention=False,
    )
    # Start as a plain autoencoder: with the noise of a unit posterior it first learns to ignore z.
    nn.init.constant_(vae.quant_conv.bias.data[4:], -6.0)
    return vae


def encoder_of(vae: AutoencoderKL) -> nn.ModuleList:
    """The part that latents come from."""
    return nn.ModuleList([vae.encoder, vae.quant_conv])


def to_unit(images: Tensor) -> Tensor:
    """Pictures as the autoencoder takes them.  uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def resized(pixels: Tensor, side: int) -> Tensor:
    """Resample pictures, if they are of another size.  [B, 3, H, W] -> [B, 3, side, side]."""
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours, down and across.  [B, C, H, W] -> [B, C, H - 1, W], [B, C, H, W - 1]."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def chroma(x: Tensor) -> Tensor:
    """How each channel differs from the grey of its pixel.  [B, 3, H, W]."""
    return x - x.mean(1, keepdim=True)


def picture_loss(output: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """L1 of pixels and of their edges, squared error of coarse pixels and their colours.

    L1 alone is content with the most common colour (orange for red); the square is not, and the colours
    are weighed again because a small green leaf on a red apple hardly counts among the pixels.
    """
    l1 = F.l1_loss(output, pixels)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(pixels), strict=True))
    error = F.avg_pool2d(output - pixels, 2)
    coarse = error.square().mean() + 4 * chroma(error).square().mean()
    return {"loss": l1 + 0.5 * edge + 6 * coarse, "l1": l1, "coarse": coarse}


def vae_loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """That of the pictures, and a small KL term."""
    with autocast(pixels.device):
        posterior = vae.encode(pixels).latent_dist
        shape, device = posterior.mean.shape, pixels.device
        noise = torch.randn(shape, generator=generator, device=device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    losses = picture_loss(output.float(), pixels)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return losses | {"loss": losses["loss"] + KL_WEIGHT * kl, "kl": kl}


def train_vae(
    emoji: Emoji,
    work: Path,
    budget: Budget,
    device: torch.device,
    batch: int = 4,
    shards: int = 1,
    stop_after: int | None = None,
) -> Loop:
    """Trained on pictures of all sides; begins with the embedded weights, if there are any."""
    torch.manual_seed(0)
    train = torch.from_numpy(emoji.trained).nonzero().flatten().to(device)
    images = torch.from_numpy(emoji.images).to(device)
    vae = new_vae()
    begin_with(vae, WEIGHTS / "vae")
    loop = Loop("vae", vae, work, budget, 2e-3, device, emoji.digest, shards=shards)

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        # Small pictures are cheap, and the denoisers begin with their latents; large ones are what is shown.
        side = rng.choices(SIDES, (0.15, 0.5, 0.35))[0]
        size = (batch * SIDES[-1] // side // shards,)
        index = torch.randint(len(train), size, generator=generator, device=device)
        return vae_loss(vae, resized(to_unit(images[train[index]]), side), generator)

    loop.run(loss_fn, lambda: psnr(vae, emoji, device), stop_after=stop_after)
    return loop


def psnr(vae: AutoencoderKL, emoji: Emoji, device: torch.device) -> dict[str, float]:
    """Of pictures that are held out, decoded from their latents, in dB at every size."""
    test = torch.from_numpy(emoji.images[~emoji.trained])
    result = {}
    for side in SIDES:
        errors = []
        for part in test.split(16):
            pixels = resized(to_unit(part).to(device), side)
            with autocast(device):
                output = vae(pixels).sample.float().clamp(-1, 1)
            errors.append((output - pixels).square().mean((1, 2, 3)))
        result[f"psnr{side}"] = -10 * torch.cat(errors).div(4).mean().log10().item()
    return result


def train_decoder(
    emoji: Emoji,
    latents: Latents,
    work: Path,
    budget: Budget,
    device: torch.device,
    batch: int = 4,
    shards: int = 1,
    stop_after: int | None = None,
) -> Loop:
    """Trained further alone, whatever the denoisers have learned: the latents stay the code that they are.

    A denoiser's latents are never quite those of a picture, so that some noise is added here.
    """
    torch.manual_seed(0)
    train = torch.from_numpy(emoji.trained).nonzero().flatten().to(device)
    images = torch.from_numpy(emoji.images).to(device)
    stored = {side: z.to(device) for side, z in latents.by_side.items()}
    vae = _standardised_vae(work, latents).train()
    encoder_of(vae).requires_grad_(False)
    loop = Loop("decoder", vae, work, budget, 1e-3, device, latents.basis, shards=shards)

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        side = rng.choices(SIDES, (0.05, 0.25, 0.7))[0]
        size = (batch * SIDES[-1] // side // shards,)
        index = train[torch.randint(len(train), size, generator=generator, device=device)]
        z = stored[side][index].float()
        level = DECODER_NOISE * torch.rand((len(z), 1, 1, 1), generator=generator, device=device)
        z = z + level * torch.randn(z.shape, generator=generator, device=device)
        with autocast(device):
            output = vae.decode(z).sample
        return picture_loss(output.float(), resized(to_unit(images[index]), side))

    loop.run(loss_fn, lambda: psnr(vae, emoji, device), stop_after=stop_after)
    return loop


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold (z - mean) / std into the 1x1 convolutions, so that latents need no further scaling.

    White backgrounds give raw latents a large mean, which a pipeline's scaling_factor cannot take
    away.  With z' = (z - mean) / std the decoder's input is W (z' std + mean) + b.
    """
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    into.weight[:channels] /= std.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std.view(1, -1, 1, 1)


def _standardised_vae(work: Path, latents: Latents) -> AutoencoderKL:
    """The autoencoder whose latents these are, its decoder not trained further."""
    vae = _raw_vae(work)
    standardise(vae, latents.mean, latents.std)
    return vae


def trained_vae(work: Path, latents: Latents) -> AutoencoderKL:
    """The autoencoder whose latents these are."""
    vae = _standardised_vae(work, latents)
    if (decoder := work / "decoder.pt").exists():
        vae.load_state_dict(averaged(decoder, basis=latents.basis))
    return vae


@dataclass(frozen=True)
class Latents:
    """All latents, one row a picture of the data set.

    by_side: [I, 4, side / 4, side / 4] of pictures of each of `SIDES`, standardised as those of the
    largest; mean, std: [4] of the raw ones; basis: hashes of the data and the encoder.
    """

    by_side: dict[int, Tensor]
    mean: Tensor
    std: Tensor
    basis: str


def _raw_vae(work: Path) -> AutoencoderKL:
    """As its stage left it, or else the embedded one."""
    vae = new_vae()
    begin_with(vae, WEIGHTS / "vae", [work / "vae.pt"])
    return vae.eval()


@torch.no_grad()
def encode_all(emoji: Emoji, work: Path, device: torch.device) -> Latents:
    """Every picture's latents at every size of training, from a file in `work` if they are there.

    The file is written anew where it is of other data or of another autoencoder.
    """
    path, vae = work / "latents.pt", _raw_vae(work)
    # A decoder that was trained further leaves them as they are.
    basis = with_module(emoji.digest, encoder_of(vae))
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept.get("basis") == basis:
            return Latents(**kept)
    vae.to(device)
    raw: dict[int, list[Tensor]] = {side: [] for side in SIDES}
    for images in torch.from_numpy(emoji.images).split(32):
        pixels = to_unit(images.to(device))
        for side, parts in raw.items():
            with autocast(device):
                parts.append(vae.encode(resized(pixels, side)).latent_dist.mean.float().cpu())
    whole = {side: torch.cat(parts) for side, parts in raw.items()}
    std, mean = torch.std_mean(whole[SIDES[-1]][torch.from_numpy(emoji.trained)], (0, 2, 3))
    if not (work / "vae.pt").exists():  # the embedded one is standardised, whatever a rounding says
        std, mean = torch.ones_like(std), torch.zeros_like(mean)
    shape = (1, -1, 1, 1)
    by_side = {side: ((z - mean.view(shape)) / std.view(shape)).half() for side, z in whole.items()}
    latents = Latents(by_side, mean, std, basis)
    save_atomic(vars(latents), path)
    spread = ", ".join(f"{z.float().std():.3f} of {side} px" for side, z in by_side.items())
    print(f"{len(emoji.images)} latents; their standard deviation is {spread}", flush=True)
    return latents
