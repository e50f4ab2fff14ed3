"""The denoiser: a UNet heavy in transformer blocks, trained at 64 tokens, then at 256 and at 1,024."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from pipelines.emoji import WEIGHTS
from pipelines.emoji.data import Emoji
from pipelines.emoji.denoise import side_of, stages_before, train_denoiser
from pipelines.emoji.loop import Budget, Loop, autocast, begin_with, compiled, with_module
from pipelines.emoji.text import WIDTH, latest_text_encoder, new_tokenizer, trained_text_encoder
from pipelines.emoji.vae import Latents

MIN_SNR = 5.0


def new_unet() -> UNet2DConditionModel:
    """The denoiser of the `unet` pipeline, untrained."""
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
    """The noise schedule that the UNet is trained and sampled with."""
    return DDIMScheduler(
        beta_start=0.00085,
        # Large pictures of one object on white still show through the usual 0.012 at the noisiest step.
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


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
    """Stage unet32 trains denoiser and text encoder on the smallest latents, the others the denoiser."""
    side, first = side_of(stage), stage == "unet32"
    torch.manual_seed(side)
    tokenizer, unet = new_tokenizer(emoji), new_unet()
    alphas = new_scheduler().alphas_cumprod.to(device)
    text = (latest_text_encoder if first else trained_text_encoder)(emoji, work)
    basis = latents.basis if first else with_module(latents.basis, text)
    text.to(device)
    begin_with(unet, WEIGHTS / "unet", stages_before(work, stage), "unet.")
    if not first:
        text.requires_grad_(False)
    module = nn.ModuleDict({"unet": unet, "text": text} if first else {"unet": unet})
    rates = {"unet": lr, "text": lr / 4} if first else {"unet": lr}
    loop = Loop(stage, module, work, budget, rates, device, basis, seed=side, shards=shards)

    fast = compiled(unet, device, budget)

    def loss(x: Tensor, ids: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        with autocast(device):
            words = text(ids).last_hidden_state
        times = (level * len(alphas)).long().clamp(max=len(alphas) - 1)
        return v_loss(fast if unet.training else unet, x, words.float(), times, noise, alphas)

    train_denoiser(loop, tokenizer, emoji, latents.by_side[side], batch // shards, loss, stop_after)
    return loop
