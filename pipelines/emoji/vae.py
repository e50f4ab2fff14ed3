"""The autoencoder: 128x128 pixels to 32x32 latents of 4 channels, and the cache of all latents."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from pipelines.emoji.captions import dominant_colour
from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import Budget, Loop, autocast, averaged, save_atomic

KL_WEIGHT = 2e-4
# A picture of these colours keeps its meaning in another colour; faces and hands do not.
RECOLOURED = {"red", "green", "blue", "purple", "orange", "pink"}
TURNS = (60, 120, 180, 240, 300)


def new_vae() -> AutoencoderKL:
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


def to_unit(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def halve(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)


def turn_hue(pixels: Tensor, degrees: int) -> Tensor:
    """The same picture with its hues turned.  uint8 [H, W, 3] -> uint8 [H, W, 3]"""
    hsv = Image.fromarray(pixels.numpy()).convert("HSV")
    hue, saturation, value = hsv.split()
    hue = hue.point(lambda h: (h + round(degrees / 360 * 256)) % 256)
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return torch.frombuffer(bytearray(turned.tobytes()), dtype=torch.uint8).view_as(pixels)


@dataclass(frozen=True)
class Shown:
    """All pictures that training knows, recoloured ones after the originals, one row a picture.

    images: uint8 [R, 128, 128, 3]; source: [R] row in the data set.
    """

    images: Tensor
    source: Tensor
    colours: list[str | None]


def shown(emoji: Emoji) -> Shown:
    """Pictures of one strong colour are there with two turns of their hues, too."""
    images = list(torch.from_numpy(emoji.images))
    source, colours = list(range(len(images))), list(emoji.colours)
    for i, colour in enumerate(emoji.colours):
        if colour in RECOLOURED:
            for turn in random.Random(i).sample(TURNS, 2):
                turned = turn_hue(images[i], turn)
                foreground = turned[(turned < 245).any(-1)].numpy() / 255
                new = dominant_colour(foreground.astype("float32"))
                if new is not None and new != colour:
                    images.append(turned)
                    source.append(i)
                    colours.append(new)
    return Shown(torch.stack(images), torch.tensor(source), colours)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def vae_loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """L1 of pixels and of their edges, squared error of coarse colours, plus a small KL term.

    L1 alone is content with the most common colour (orange for red); the square is not.
    """
    with autocast(pixels.device):
        posterior = vae.encode(pixels).latent_dist
        shape, device = posterior.mean.shape, pixels.device
        noise = torch.randn(shape, generator=generator, device=device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
    output, mean, logvar = output.float(), posterior.mean.float(), posterior.logvar.float()
    l1 = F.l1_loss(output, pixels)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(pixels), strict=True))
    coarse = F.mse_loss(F.avg_pool2d(output, 4), F.avg_pool2d(pixels, 4))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return {
        "loss": l1 + 0.5 * edge + 4 * coarse + KL_WEIGHT * kl,
        "l1": l1,
        "coarse": coarse,
        "kl": kl,
    }


def train_vae(
    emoji: Emoji,
    work: Path,
    budget: Budget,
    device: torch.device,
    batch: int = 4,
    shards: int = 1,
    stop_after: int | None = None,
) -> Loop:
    torch.manual_seed(0)
    pictures = shown(emoji)
    train = torch.from_numpy(~emoji.held_out)[pictures.source].nonzero().flatten()
    # The originals twice, so that about a quarter of what is drawn is recoloured.
    train = torch.cat([train[train < len(emoji.names)], train]).to(device)
    test = torch.from_numpy(emoji.images[emoji.held_out][:128])
    images = pictures.images.to(device)
    vae = new_vae()
    loop = Loop("vae", vae, work, budget, 2e-3, device, shards=shards)

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        # Small pictures first, because they are cheap; some to the end, for the 256-token stage.
        small = rng.random() < (0.95 if loop.progress < 0.8 else 0.2)
        size = (batch // shards,)
        index = torch.randint(len(train), size, generator=generator, device=device)
        pixels = to_unit(images[train[index]])
        return vae_loss(vae, halve(pixels) if small else pixels, generator)

    def evaluate() -> dict[str, float]:
        l1 = mse = 0.0
        for part in test.split(16):
            pixels = to_unit(part).to(device)
            with autocast(device):
                output = vae(pixels).sample.float()
            l1 += (output - pixels).abs().mean().item() * len(part) / max(len(test), 1)
            mse += (output - pixels).square().mean().item() * len(part) / max(len(test), 1)
        return {"l1": l1, "psnr": -10 * torch.log10(torch.tensor(mse / 4)).item()}

    loop.run(loss_fn, evaluate, stop_after=stop_after)
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


def trained_vae(work: Path) -> AutoencoderKL:
    """The autoencoder of the latents in the cache."""
    vae = new_vae()
    vae.load_state_dict(averaged(work / "vae.pt"))
    latents = load_latents(work)
    standardise(vae, latents.mean, latents.std)
    return vae.eval()


@dataclass(frozen=True)
class Latents:
    """All latents, recoloured pictures after the originals, one row a picture.

    large: [R, 4, 32, 32] of 128 pixels, small: [R, 4, 16, 16] of 64 pixels, both standardised;
    source: [R] row in the data set; mean, std: [4] of the raw latents.
    """

    large: Tensor
    small: Tensor
    source: Tensor
    colours: list[str | None]
    recoloured: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def cache_latents(emoji: Emoji, work: Path, device: torch.device) -> None:
    vae = new_vae()
    vae.load_state_dict(averaged(work / "vae.pt"))
    vae.to(device).eval()
    pictures = shown(emoji)
    source = pictures.source
    large, small = [], []
    for images in pictures.images.split(32):
        pixels = to_unit(images.to(device))
        with autocast(device):
            large.append(vae.encode(pixels).latent_dist.mean.float().cpu())
            small.append(vae.encode(halve(pixels)).latent_dist.mean.float().cpu())
    z, half = torch.cat(large), torch.cat(small)
    train = torch.from_numpy(~emoji.held_out)[source]
    std, mean = torch.std_mean(z[train], (0, 2, 3))
    shape = (1, -1, 1, 1)
    state = {
        "large": ((z - mean.view(shape)) / std.view(shape)).half(),
        "small": ((half - mean.view(shape)) / std.view(shape)).half(),
        "source": source,
        "colours": pictures.colours,
        "recoloured": torch.arange(len(source)) >= len(emoji.names),
        "mean": mean,
        "std": std,
    }
    save_atomic(state, work / "latents.pt")
    print(f"{len(source)} latents; std of the small ones {state['small'].float().std():.3f}")


def load_latents(work: Path) -> Latents:
    path = work / "latents.pt"
    if not path.exists():
        raise SystemExit(
            f"no latents at {path}; train the autoencoder first: "
            "python -m pipelines.emoji.train --stage vae --minutes 10"
        )
    return Latents(**torch.load(path, weights_only=True))
