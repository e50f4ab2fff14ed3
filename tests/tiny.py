"""Tiny pipelines with random weights: diffusers' own classes, built offline in a fraction of a
second.

Weights depend on the arguments only, and building leaves the global generator as it was. Latents
are an eighth of the image, as in the real models: 120 pixels give an odd grid of 15 rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

# The constructors of diffusers draw weights that are replaced below.
untouched_generator = torch.random.fork_rng(devices=[])
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@untouched_generator
def tiny_sd(
    prediction: str = "epsilon",
    *,
    channels: Sequence[int] = (32, 64),
    transformer_layers: int | Sequence[int] = 1,
    layers_per_block: int = 1,
    linear_projection: bool = False,
    sample_size: int = 16,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: attention at both levels, 256 and 64 tokens at 128 x 128 pixels."""
    text = _clip(CLIPTextModel)
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=layers_per_block,
        transformer_layers_per_block=_plain(transformer_layers),
        attention_head_dim=tuple(width // 16 for width in channels),  # read as the number of heads
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=linear_projection,
    )
    pipe = StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=text,
        tokenizer=_clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            **NOISE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _finish(pipe, seed)


def tiny_sd2(
    *, transformer_layers: int | Sequence[int] = 1, seed: int = 0
) -> StableDiffusionPipeline:
    """Stable Diffusion 2.x: predicts v, and projects into its transformers with linear layers."""
    return tiny_sd(
        "v_prediction", transformer_layers=transformer_layers, linear_projection=True, seed=seed
    )


@untouched_generator
def tiny_sdxl(
    *,
    channels: Sequence[int] = (32, 32, 64),
    transformer_layers: Sequence[int] = (1, 1, 2),
    sample_size: int = 16,
    seed: int = 0,
) -> StableDiffusionXLPipeline:
    """SDXL: no attention at the top level; 64 and 16 tokens below it at 128 x 128 pixels."""
    below = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * below,
        up_block_types=("CrossAttnUpBlock2D",) * below + ("UpBlock2D",),
        layers_per_block=1,
        transformer_layers_per_block=tuple(transformer_layers),
        attention_head_dim=tuple(width // 16 for width in channels),  # read as the number of heads
        cross_attention_dim=64,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,  # 6 sizes x 8, and 32 of the pooled text
    )
    pipe = StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return _finish(pipe, seed)


@untouched_generator
def tiny_sd3(
    dual: bool = False,
    *,
    qk_norm: str | None = None,
    num_layers: int = 4,
    sample_size: int = 32,
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """SD3: joint blocks, 256 image tokens at 256 x 256 pixels.

    dual: as SD3.5 medium, a second, image-only attention in the first two blocks, and RMS-normed
    queries and keys.
    """
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm=qk_norm or ("rms_norm" if dual else None),
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, shift_factor=0.06),
        text_encoder=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(64),
        tokenizer_3=_t5_tokenizer(),
    )
    return _finish(pipe, seed)


def generate(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str] = "a cat",
    steps: int = 2,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Latents of a run, [B, C, H, W].  Image i has a generator of its own, seeded seed + i."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    images = len(prompts) * options.get("num_images_per_prompt", 1)
    options.setdefault(
        "generator", [torch.Generator().manual_seed(seed + image) for image in range(images)]
    )
    options.setdefault("output_type", "latent")
    if isinstance(pipe, StableDiffusion3Pipeline):
        # The default of 256 text tokens would outweigh the image in a model of this size.
        options.setdefault("max_sequence_length", 16)
    images_out = pipe(prompts, num_inference_steps=steps, **options).images
    return images_out if isinstance(images_out, Tensor) else torch.as_tensor(images_out)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter, also biases and norms, so that every layer changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):  # a norm's
                parameter.copy_(1 + 0.1 * drawn)
            else:
                parameter.copy_(0.1 * drawn)
    return module


def _finish(pipe: Any, seed: int) -> Any:
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            # By name: a model's weights do not depend on what else its pipeline holds.
            randomise(component, seed + sum(map(ord, name))).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _plain(layers: int | Sequence[int]) -> int | tuple[int, ...]:
    return layers if isinstance(layers, int) else tuple(layers)


def _vae(latent_channels: int, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    )


def _byte_letters() -> list[str]:
    """The 256 letters of byte-level BPE: printable bytes as themselves, the others moved up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def _clip_tokenizer() -> CLIPTokenizer:
    letters = _byte_letters()
    pieces = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    return T5Tokenizer(
        vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=64,
    )


def _clip(model: type[nn.Module]) -> nn.Module:
    return model(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=98,
            d_model=width,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )
