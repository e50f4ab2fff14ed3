"""The denoiser: a UNet heavy in transformer blocks, trained at 256 tokens, then at 1,024."""

import random
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import Budget, Loop, autocast, averaged
from pipelines.emoji.text import (
    WIDTH,
    Rows,
    new_tokenizer,
    row_caption,
    tokens,
    trained_text_encoder,
)
from pipelines.emoji.vae import Latents

DROP_CAPTION = 0.1  # for classifier-free guidance
MIN_SNR = 5.0


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        transformer_layers_per_block=(2, 1),
        attention_head_dim=(2, 4),  # diffusers' name for the number of heads: 32 channels each
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def shift(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Move each picture by at most one latent; the border is repeated.  [B, C, H, W]"""
    height, width = latents.shape[2:]
    padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    moves = torch.randint(3, (len(latents), 2), generator=generator).tolist()
    rows = [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, moves, strict=True)]
    return torch.stack(rows)


def v_loss(
    unet: nn.Module, latents: Tensor, words: Tensor, times: Tensor, noise: Tensor, alphas: Tensor
) -> Tensor:
    """Velocity prediction (Salimans and Ho 2022), its weight capped as min-SNR (Hang et al. 2023).

    v = sqrt(a) noise - sqrt(1 - a) x. Plain velocity weighs the error of x by snr + 1; capped, by
    min(snr + 1, 5). The cap without the 1 weighs the noisiest levels by nearly nothing, and there
    the layout of the whole picture is decided.
    """
    alpha = alphas[times].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    with autocast(latents.device):
        output = unet(noisy, times, words, return_dict=False)[0]
    snr = (alpha / (1 - alpha)).flatten()
    error = (output.float() - target).square().mean((1, 2, 3))
    return (error * (snr + 1).clamp(max=MIN_SNR) / (snr + 1)).mean()


def train_unet(
    emoji: Emoji,
    latents: Latents,
    work: Path,
    budget: Budget,
    device: torch.device,
    stage: str,
    batch: int,
    lr: float,
    shards: int = 1,
    stop_after: int | None = None,
) -> Loop:
    """Stage unet64 trains denoiser and text encoder on the small latents, unet128 the denoiser."""
    first = stage == "unet64"
    torch.manual_seed(2)
    tokenizer, rows, unet = new_tokenizer(emoji), Rows(emoji, latents), new_unet()
    data = latents.small if first else latents.large
    alphas = new_scheduler().alphas_cumprod.to(device)
    text = trained_text_encoder(emoji, work, "text" if first else "unet64").to(device)
    if not first:
        unet.load_state_dict(averaged(work / "unet64.pt", "unet."))
        text.requires_grad_(False)
    module = nn.ModuleDict({"unet": unet, "text": text} if first else {"unet": unet})
    rates = {"unet": lr, "text": lr / 4} if first else {"unet": lr}
    seed = 2 if first else 3
    loop = Loop(stage, module, work, budget, rates, device, seed=seed, shards=shards)
    count = batch // shards

    def encode(captions: list[str]) -> Tensor:
        with autocast(device):
            words: Tensor = text(tokens(tokenizer, captions).to(device)).last_hidden_state
        return words.float()

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        row = rows.draw(count, generator)
        captions = [
            "" if rng.random() < DROP_CAPTION else row_caption(emoji, latents, int(r), rng)
            for r in row
        ]
        picture = shift(data[row].float(), generator)
        # One noise level from each of equal ranges: less variance than free draws.
        spread = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        times = (spread / count * len(alphas)).long().clamp(max=len(alphas) - 1)
        noise = torch.randn(picture.shape, generator=generator)
        x, t, e = picture.to(device), times.to(device), noise.to(device)
        return {"loss": v_loss(unet, x, encode(captions), t, e, alphas)}

    def evaluate() -> dict[str, float]:
        result = {}
        for name, row in (("loss", rows.test[:32]), ("train_loss", rows.original[:32])):
            generator, rng = torch.Generator().manual_seed(0), random.Random(0)
            total = 0.0
            for part in row.split(32):
                x = data[part].float()
                times = torch.linspace(10, len(alphas) - 10, len(part)).long()
                noise = torch.randn(x.shape, generator=generator)
                words = encode([row_caption(emoji, latents, int(r), rng) for r in part])
                loss = v_loss(unet, x.to(device), words, times.to(device), noise.to(device), alphas)
                total += loss.item() * len(part) / len(row)
            result[name] = total
        return result

    loop.run(loss_fn, evaluate, stop_after=stop_after)
    return loop


def ceiling(unet: UNet2DConditionModel, size: int) -> dict[str, float]:
    """The most that halving the tokens of every transformer block can save, counted.

    Each block is counted alone at all tokens and at half of them (linear layers halve, the
    self-attention product quarters); everything around the blocks stays whole.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> int:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            module(*args, **kwargs)
        return counter.get_total_flops()

    model = type(unet).from_config(unet.config).eval()
    words = torch.zeros(1, 32, unet.config.cross_attention_dim)
    shapes: list[tuple[nn.Module, torch.Size]] = []
    hooks = [
        block.register_forward_pre_hook(lambda m, args: shapes.append((m, args[0].shape)))
        for block in model.modules()
        if isinstance(block, BasicTransformerBlock)
    ]
    total = count(model, torch.zeros(1, 4, size, size), torch.zeros(1), words)
    for hook in hooks:
        hook.remove()
    blocks = reduced = 0
    for block, (_, n, width) in shapes:
        blocks += count(block, torch.zeros(1, n, width), encoder_hidden_states=words)
        reduced += count(block, torch.zeros(1, n - n // 2, width), encoder_hidden_states=words)
    return {
        "tokens": float(size * size),
        "gflops": total / 1e9,
        "share_in_blocks": blocks / total,
        "ceiling": total / (total - blocks + reduced),
    }
