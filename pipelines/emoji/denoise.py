"""What training has in common for both denoisers: how a batch is drawn and how progress is measured."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import Loop
from pipelines.emoji.text import Captions, Rows
from pipelines.emoji.vae import SIDES

DROP_CAPTION = 0.1  # for classifier-free guidance

DenoisingLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(latents [B, C, H, W], token ids [B, T], noise levels [B] as quantiles in (0, 1), noise) -> scalar loss"""


def side_of(stage: str) -> int:
    """The side in pixels that a stage is named for: 64 of "unet64"."""
    return int(re.sub(r"\D", "", stage))


def stages_before(work: Path, stage: str) -> list[Path]:
    """The checkpoints of the same denoiser on smaller pictures, the largest of these first."""
    side = side_of(stage)
    return [work / f"{stage.removesuffix(str(side))}{s}.pt" for s in reversed(SIDES) if s < side]


def train_denoiser(
    loop: Loop,
    tokenizer: CLIPTokenizer,
    emoji: Emoji,
    data: Tensor,
    batch: int,
    loss: DenoisingLoss,
    stop_after: int | None = None,
) -> None:
    """Run the loop on `data` [R, C, H, W], `batch` rows a shard, and on held-out concepts now and then."""
    device = loop.device
    rows, captions = Rows(emoji, device), Captions(tokenizer, emoji, device)
    data = data.to(device)

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        def uniform() -> Tensor:
            return torch.rand(batch, generator=generator, device=device)

        row = rows.draw(batch, generator)
        dropped = uniform() < DROP_CAPTION
        ids = torch.where(dropped[:, None], captions.empty, captions.draw(row, generator))
        picture = data[row].float()
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
