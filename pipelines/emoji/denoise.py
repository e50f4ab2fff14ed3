"""What training has in common for both denoisers: how a batch is drawn and how progress is measured."""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import Loop
from pipelines.emoji.text import Captions, Rows
from pipelines.emoji.vae import Latents

DROP_CAPTION = 0.1  # for classifier-free guidance

DenoisingLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(latents [B, C, H, W], token ids [B, T], noise levels [B] as quantiles in (0, 1), noise) -> scalar loss"""


def shift(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Move each picture by at most one latent; the border is repeated.  [B, C, H, W]"""
    count, _, height, width = latents.shape
    device = latents.device
    moves = torch.randint(-1, 2, (2, count, 1), generator=generator, device=device)
    rows = (torch.arange(height, device=device) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + moves[1]).clamp(0, width - 1)
    picture = torch.arange(count, device=device)[:, None, None]
    # Indexed places come first, channels last.
    moved = latents[picture, :, rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2).contiguous()


def train_denoiser(
    loop: Loop,
    tokenizer: CLIPTokenizer,
    emoji: Emoji,
    latents: Latents,
    data: Tensor,
    batch: int,
    loss: DenoisingLoss,
    stop_after: int | None = None,
) -> None:
    """Run the loop on `data` [R, C, H, W], `batch` rows a shard, and on held-out concepts now and then."""
    device = loop.device
    rows, captions = Rows(emoji, latents, device), Captions(tokenizer, emoji, latents, device)
    data = data.to(device)

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        def uniform() -> Tensor:
            return torch.rand(batch, generator=generator, device=device)

        row = rows.draw(batch, generator)
        dropped = uniform() < DROP_CAPTION
        ids = torch.where(dropped[:, None], captions.empty, captions.draw(row, generator))
        picture = shift(data[row].float(), generator)
        # One noise level from each of equal ranges: less variance than free draws.
        level = (uniform().argsort() + uniform()) / batch
        noise = torch.randn(picture.shape, generator=generator, device=device)
        return {"loss": loss(picture, ids, level, noise)}

    def evaluate() -> dict[str, float]:
        result = {}
        for name, row in (("loss", rows.test[:32]), ("train_loss", rows.original[:32])):
            x = data[row].float()
            # Of the CPU: the same on every device.
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
            level = torch.linspace(0.01, 0.99, len(row), device=device)
            result[name] = loss(x, captions.first(row), level, noise).item()
        return result

    loop.run(loss_fn, evaluate, stop_after=stop_after)
