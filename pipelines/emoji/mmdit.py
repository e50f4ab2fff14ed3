"""The second denoiser: a joint-attention transformer as in Stable Diffusion 3, on the same latents.

It shares autoencoder and text encoder with the UNet's pipeline, and is trained by flow matching, first on
8 x 8 latents (64 tokens), then on 16 x 16 (256) and on 32 x 32 (1,024).
"""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from pipelines.emoji import MMDIT
from pipelines.emoji.data import Emoji
from pipelines.emoji.denoise import side_of, stages_before, train_denoiser
from pipelines.emoji.loop import Budget, Loop, autocast, begin_with, compiled, with_module
from pipelines.emoji.sd3 import with_projection
from pipelines.emoji.text import WIDTH, new_tokenizer, trained_text_encoder
from pipelines.emoji.vae import Latents

HEADS, HEAD_WIDTH, LAYERS = 5, 32, 5


def new_transformer(side: int = 32) -> SD3Transformer2DModel:
    """For latents of that side, or others: positions are fractions of the picture.

    The table of positions is half again as long as the picture's side. For half the side it has half as
    many rows at twice the distance, so a small picture lies where the large one will.
    """
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        # A StableDiffusion3Pipeline has two text encoders side by side; here it is one, twice.
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=side * 3 // 2,
        qk_norm="rms_norm",
    )


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of flow matching, with a little more of them at high noise."""
    return FlowMatchEulerDiscreteScheduler(shift=1.5)


def encode(text: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a StableDiffusion3Pipeline makes of a text with this encoder in both places.

    Its words are the last hidden states but one.  [B, T] -> [B, T, 2 C], [B, 2 C]
    """
    with autocast(ids.device):
        out = text(ids, output_hidden_states=True)
    words, pooled = out.hidden_states[-2].float(), out.text_embeds.float()
    return words.repeat(1, 1, 2), pooled.repeat(1, 2)


def flow_loss(
    transformer: nn.Module,
    latents: Tensor,
    words: Tensor,
    pooled: Tensor,
    sigma: Tensor,
    noise: Tensor,
) -> Tensor:
    """Rectified flow (Esser et al. 2024): from x + sigma (noise - x), predict noise - x."""
    mix = sigma.view(-1, 1, 1, 1)
    with autocast(latents.device):
        output = transformer(
            (1 - mix) * latents + mix * noise, words, pooled, sigma * 1000, return_dict=False
        )[0]
    return (output.float() - (noise - latents)).square().mean()


def train_mmdit(
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
    """Each stage trains on the latents of its pictures' side; the text encoder is frozen."""
    side = side_of(stage)
    torch.manual_seed(side + 1)
    data = latents.by_side[side]
    transformer = new_transformer(data.shape[-1])
    begin_with(transformer, MMDIT / "transformer", stages_before(work, stage), "mmdit.")
    tokenizer = new_tokenizer(emoji)
    encoder = trained_text_encoder(emoji, work)
    basis = with_module(latents.basis, encoder)
    text = with_projection(encoder).to(device)
    text.requires_grad_(False)
    module = nn.ModuleDict({"mmdit": transformer})
    loop = Loop(stage, module, work, budget, lr, device, basis, seed=side + 1, shards=shards)

    fast = compiled(transformer, device, budget)

    def loss(x: Tensor, ids: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        words, pooled = encode(text, ids)
        sigma = torch.special.ndtri(level.clamp(1e-3, 1 - 1e-3)).sigmoid()  # logit-normal
        model = fast if transformer.training else transformer
        return flow_loss(model, x, words, pooled, sigma, noise)

    train_denoiser(loop, tokenizer, emoji, data, batch // shards, loss, stop_after)
    return loop
