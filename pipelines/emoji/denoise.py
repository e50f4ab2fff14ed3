"""What training has in common for both denoisers: how a batch is drawn and how progress is measured."""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import Loop
from pipelines.emoji.text import Rows, row_caption
from pipelines.emoji.vae import Latents

DROP_CAPTION = 0.1  # for classifier-free guidance

DenoisingLoss = Callable[[Tensor, list[str], Tensor, Tensor], Tensor]
"""(latents [B, C, H, W], captions, noise levels [B] as quantiles in (0, 1), noise) -> scalar loss"""


def shift(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Move each picture by at most one latent; the border is repeated.  [B, C, H, W]"""
    height, width = latents.shape[2:]
    padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    moves = torch.randint(3, (len(latents), 2), generator=generator).tolist()
    rows = [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, moves, strict=True)]
    return torch.stack(rows)


def train_denoiser(
    loop: Loop,
    emoji: Emoji,
    latents: Latents,
    data: Tensor,
    batch: int,
    loss: DenoisingLoss,
    stop_after: int | None = None,
) -> None:
    """Run the loop on `data` [R, C, H, W], `batch` rows a shard, and on held-out concepts now and then."""
    rows = Rows(emoji, latents)
    device = loop.device

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        row = rows.draw(batch, generator)
        captions = [
            "" if rng.random() < DROP_CAPTION else row_caption(emoji, latents, int(r), rng)
            for r in row
        ]
        picture = shift(data[row].float(), generator)
        # One noise level from each of equal ranges: less variance than free draws.
        spread = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
        noise = torch.randn(picture.shape, generator=generator)
        level = (spread / batch).to(device)
        return {"loss": loss(picture.to(device), captions, level, noise.to(device))}

    def evaluate() -> dict[str, float]:
        result = {}
        for name, row in (("loss", rows.test[:32]), ("train_loss", rows.original[:32])):
            generator, rng = torch.Generator().manual_seed(0), random.Random(0)
            x = data[row].float()
            noise = torch.randn(x.shape, generator=generator)
            captions = [row_caption(emoji, latents, int(r), rng) for r in row]
            level = torch.linspace(0.01, 0.99, len(row), device=device)
            result[name] = loss(x.to(device), captions, level, noise.to(device)).item()
        return result

    loop.run(loss_fn, evaluate, stop_after=stop_after)
