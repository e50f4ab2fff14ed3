"""Tiny pipelines with random weights: diffusers' own classes, built offline in a fraction of a
second.

Weights depend on the arguments only, and building leaves the global generator as it was. Latents
are an eighth of the image, as in the real models: 120 pixels give an odd grid of 15 rows.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15Pipeline,
    LTX2Pipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    ZImagePipeline,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    ByT5Tokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLTextModel,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5EncoderModel,
)

from pipelines.emoji.captions import held_out
from pipelines.emoji.data import Emoji
from tests import tiny_parts as parts
from tests.denoisers import DENOISERS

# The constructors of diffusers draw weights that are replaced below.
untouched_generator = torch.random.fork_rng(devices=[])
SHORT = {"warmup_steps": 2, "cooldown_steps": 0}
"""For token profiles, as generations here are short: tokens are reduced from the third step to the last."""

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# How `generate` calls them unless told otherwise. With models of this size, text of the pipelines' own
# length would outweigh the image, and their own sizes would take minutes. Those of `tests.tiny_pipelines` are
# added there.
CALLS: dict[type[DiffusionPipeline], dict[str, Any]] = {
    StableDiffusion3Pipeline: {"max_sequence_length": 16},
    FluxPipeline: {"height": 128, "width": 128, "max_sequence_length": 16},
    PixArtSigmaPipeline: {
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    WanPipeline: {"height": 64, "width": 96, "num_frames": 5, "max_sequence_length": 16},
    QwenImagePipeline: {"height": 128, "width": 128, "max_sequence_length": 16},
    ZImagePipeline: {"height": 128, "width": 128, "max_sequence_length": 64},
    CogVideoXPipeline: {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16},
    Flux2KleinPipeline: {"height": 128, "width": 128, "max_sequence_length": 16},
    HunyuanVideo15Pipeline: {"height": 64, "width": 96, "num_frames": 9},
    LTX2Pipeline: {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16},
    DDPMPipeline: {"output_type": "pt"},  # no latents: it draws the picture itself
}


@untouched_generator
def tiny_sd(
    prediction: str = "epsilon",
    *,
    channels: Sequence[int] = (32, 64),
    transformer_layers: int | Sequence[int] = 1,
    layers_per_block: int = 1,
    linear_projection: bool = False,
    middle: bool = True,
    sample_size: int = 16,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: attention at both levels, 256 and 64 tokens at 128 x 128 pixels.

    middle: a block between the way down and the way up, as the real ones have.
    """
    text = parts.clip(CLIPTextModel)
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=layers_per_block,
        transformer_layers_per_block=_plain(transformer_layers),
        attention_head_dim=tuple(width // 16 for width in channels),  # read as the number of heads
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=linear_projection,
    )
    pipe = StableDiffusionPipeline(
        vae=parts.vae(4),
        text_encoder=text,
        tokenizer=parts.clip_tokenizer(),
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
    return finish(pipe, seed)


def small_sd(*, transformer_layers: int = 1) -> StableDiffusionPipeline:
    """Half of the layers of `tiny_sd`: one level and no middle, where more would try nothing more."""
    return tiny_sd(channels=(32,), transformer_layers=transformer_layers, middle=False)


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
        vae=parts.vae(4),
        text_encoder=parts.clip(CLIPTextModel),
        text_encoder_2=parts.clip(CLIPTextModelWithProjection),
        tokenizer=parts.clip_tokenizer(),
        tokenizer_2=parts.clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_sd3(
    dual: bool = False,
    *,
    qk_norm: str | None = None,
    num_layers: int = 3,
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
        vae=parts.vae(4, shift_factor=0.06),
        text_encoder=parts.clip(CLIPTextModelWithProjection),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip(CLIPTextModelWithProjection),
        tokenizer_2=parts.clip_tokenizer(),
        text_encoder_3=parts.t5(64),
        tokenizer_3=parts.t5_tokenizer(),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_flux(
    *,
    num_layers: int = 2,
    num_single_layers: int = 2,
    guidance_embeds: bool = False,
    seed: int = 0,
) -> FluxPipeline:
    """FLUX.1: joint blocks, then single ones; 64 image tokens at 128 x 128 pixels.

    guidance_embeds: as FLUX.1-dev, told the guidance scale; otherwise as FLUX.1-schnell.
    """
    transformer = FluxTransformer2DModel(
        in_channels=4,  # one latent channel in patches of 2 x 2, which the pipeline packs
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=parts.vae(1, shift_factor=0.1),
        text_encoder=parts.clip(CLIPTextModel),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.t5(64),
        tokenizer_2=parts.t5_tokenizer(),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_pixart(*, num_layers: int = 2, seed: int = 0) -> PixArtSigmaPipeline:
    """PixArt-Sigma: one modulation for all blocks, learned sigma; 256 tokens at 256 x 256 pixels."""
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        cross_attention_dim=32,
        caption_channels=64,
    )
    pipe = PixArtSigmaPipeline(
        transformer=transformer,
        # Where the real ones start, in more noise, a random model's first guess is in the thousands.
        scheduler=DPMSolverMultistepScheduler(**NOISE, timestep_spacing="leading"),
        vae=parts.vae(4),
        text_encoder=parts.t5(64),
        tokenizer=parts.t5_tokenizer(),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_dit(*, num_layers: int = 2, seed: int = 0) -> DiTPipeline:
    """DiT: of one square size, 64 tokens; classes for prompts, and 1000 for none, as in ImageNet."""
    transformer = DiTTransformer2DModel(
        sample_size=16,
        out_channels=8,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
    )
    pipe = DiTPipeline(
        transformer=transformer,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False),
        vae=parts.vae(4),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_wan(
    *, two: bool = False, per_token: bool = False, num_layers: int = 2, seed: int = 0
) -> WanPipeline:
    """Wan: 5 frames of 64 x 96 pixels are 2 latent frames of 4 x 6 tokens.

    two: as Wan 2.2, a second denoiser for the low noise; each has a turn from two steps on.
    per_token: as Wan 2.2 TI2V, a timestep for every token.
    """
    transformers = [
        WanTransformer3DModel(
            num_layers=num_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            text_dim=64,
            freq_dim=32,
            ffn_dim=64,
        )
        for _ in range(1 + two)
    ]
    pipe = WanPipeline(
        transformer=transformers[0],
        transformer_2=transformers[1] if two else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=parts.t5(64, UMT5EncoderModel),
        tokenizer=parts.t5_tokenizer(),
        boundary_ratio=0.875 if two else None,
        expand_timesteps=per_token,
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_qwen(*, num_layers: int = 2, seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image: joint blocks; 64 image tokens at 128 x 128 pixels."""
    transformer = QwenImageTransformer2DModel(
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer = parts.qwen_tokenizer()
    pipe = QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=parts.qwen_text(len(tokenizer)),
        tokenizer=tokenizer,
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_z_image(*, seed: int = 0) -> ZImagePipeline:
    """Z-Image: image and text in one sequence; 64 image tokens at 128 x 128 pixels."""
    tokenizer = parts.chat_tokenizer()
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(4, shift_factor=0.1),
        text_encoder=parts.language_model(Qwen3Model, len(tokenizer)),
        tokenizer=tokenizer,
        transformer=DENOISERS["ZImageTransformer2DModel"].build(seed),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_cogvideox(*, seed: int = 0) -> CogVideoXPipeline:
    """CogVideoX: joint text and video; 3 frames of 4 x 6 tokens at 9 frames of 64 x 96 pixels."""
    model = DENOISERS["CogVideoXTransformer3DModel"]
    config = {**model.config, "in_channels": 4, "ofs_embed_dim": None, "max_text_seq_length": 16}
    pipe = CogVideoXPipeline(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(16),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        transformer=replace(model, config=config).build(seed),
        scheduler=CogVideoXDDIMScheduler(),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_flux2(*, seed: int = 0) -> Flux2KleinPipeline:
    """FLUX.2 Klein: joint blocks, then single ones; 64 image tokens at 128 x 128 pixels."""
    model, tokenizer = DENOISERS["Flux2Transformer2DModel"], parts.chat_tokenizer()
    config = {**model.config, "guidance_embeds": False, "joint_attention_dim": 3 * 16}
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=parts.language_model(
            Qwen3ForCausalLM, len(tokenizer), layers=28
        ),  # it reads 9, 18, 27
        tokenizer=tokenizer,
        transformer=replace(model, config=config).build(seed),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_hunyuan_video15(*, seed: int = 0) -> HunyuanVideo15Pipeline:
    """HunyuanVideo 1.5: joint blocks; 3 frames of 4 x 6 tokens at 9 frames of 64 x 96 pixels."""
    model, tokenizer = DENOISERS["HunyuanVideo15Transformer3DModel"], parts.chat_tokenizer()
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = parts.language_model(
        Qwen2_5_VLTextModel, len(tokenizer), layers=3, rope_parameters=rotary
    )
    pipe = HunyuanVideo15Pipeline(
        text_encoder=text,
        tokenizer=tokenizer,
        transformer=replace(model, config={**model.config, "task_type": "t2v"}).build(seed),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=parts.t5(12, vocabulary=384),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    # What is before the prompt, of its own template, has more tokens here.
    pipe.tokenizer_max_length, pipe.prompt_template_encode_start_idx = 16, 0
    pipe.tokenizer_2_max_length = 16
    return finish(pipe, seed)


@untouched_generator
def tiny_ltx2(*, seed: int = 0) -> LTX2Pipeline:
    """LTX-2: video beside sound; 2 frames of 2 x 3 tokens at 9 frames of 64 x 96 pixels."""
    model, tokenizer = DENOISERS["LTX2VideoTransformer3DModel"], parts.chat_tokenizer()
    text = {**parts.TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 2}
    never_shown = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=never_shown, mm_tokens_per_image=4)
    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    connectors = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in {**connector, "num_learnable_registers": None}.items()
    }
    sound = {"base_channels": 6, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": None}
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLLTX2Video(
            latent_channels=model.config["in_channels"],
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            upsample_factor=(1, 1, 1),
            upsample_residual=(False,) * 3,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            **sound, latent_channels=2, mid_block_add_attention=False, mel_bins=12
        ),
        text_encoder=Gemma3ForConditionalGeneration(config),
        tokenizer=tokenizer,
        connectors=LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=3, **connectors, connector_rope_base_seq_len=32
        ),
        transformer=model.build(seed),
        vocoder=LTX2Vocoder(
            in_channels=24,
            hidden_channels=8,
            upsample_kernel_sizes=[4],
            upsample_factors=[2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        ),
    )
    return finish(pipe, seed)


@untouched_generator
def tiny_ddpm(
    *,
    channels: Sequence[int] = (16, 32),
    sample_size: int | tuple[int, int] = 16,
    seed: int = 0,
) -> DDPMPipeline:
    """DDPM: no text and no latents; attention at both levels, 256 and 64 tokens, and between."""
    unet = UNet2DModel(
        sample_size=sample_size,
        block_out_channels=tuple(channels),
        down_block_types=("AttnDownBlock2D",) * len(channels),
        up_block_types=("AttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
    )
    return finish(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()), seed)


def denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The models that the pipeline denoises with, in the order in which they have their turns."""
    names = ("unet", "transformer", "transformer_2", "unconditional_transformer")
    models = [getattr(pipe, name, None) for name in names]
    return [model for model in models if model is not None]


def generate(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str | int] = "a cat",
    steps: int = 2,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Latents of a run, [B, ...].  Image i has a generator of its own, seeded seed + i.

    They are [B, C, H, W]; of Wan [B, C, F, H, W]; of Flux and Qwen-Image packed, [B, N, C]; DDPM
    has pictures instead. DiT takes classes: a string stands for one of them.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    images = len(prompts) * options.get("num_images_per_prompt", 1)
    options = {
        "generator": [torch.Generator().manual_seed(seed + image) for image in range(images)],
        "num_inference_steps": steps,
        "output_type": "latent",
        **CALLS.get(type(pipe), {}),
        **options,
    }
    asked: Any = prompts
    if isinstance(pipe, DDPMPipeline):
        asked = len(prompts)
    elif isinstance(pipe, WanVACEPipeline):  # takes no list
        (asked,), (options["generator"],) = prompts, options["generator"]
    elif isinstance(pipe, DiTPipeline):
        asked = [text if isinstance(text, int) else sum(map(ord, text)) % 1000 for text in prompts]
        if options["output_type"] == "latent":
            return _dit_latents(pipe, asked, options)
    elif isinstance(pipe, QwenImagePipeline) and options.get("true_cfg_scale", 4.0) > 1:
        # It guides only with a negative prompt, and a single one would not do for a batch.
        options.setdefault("negative_prompt", [""] * len(prompts))
    first, *others = inspect.signature(pipe.__call__).parameters
    if "prompt" in others:  # behind a picture
        output = pipe(prompt=asked, **options)
    elif first == "image":  # made of a picture alone
        output = pipe(**options)
    else:
        output = pipe(asked, **options)
    result = next(iter(output.values()))  # beside which there may be sound
    if isinstance(result, list) and isinstance(result[0], Tensor):
        return result[-1]  # of FramePack, which grows piece by piece
    return result if isinstance(result, Tensor) else torch.as_tensor(result)


def model_inputs(model: nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of a direct call of a denoiser; no two rows of the batch are the same.

    The grid is not square, 6 x 10 tokens where they are patches of 2 x 2; only DiT, which takes
    nothing else, has a square one. Where text has a mask, the first row is shorter.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    match model:
        case UNet2DModel():
            return {"sample": drawn(config.in_channels, 12, 20), "timestep": torch.tensor(500)}
        case UNet2DConditionModel():
            inputs = {
                "sample": drawn(config.in_channels, 10, 14),
                "timestep": torch.tensor(500),
                "encoder_hidden_states": drawn(7, config.cross_attention_dim),
            }
            if config.addition_embed_type == "text_time":
                sizes = torch.tensor([80.0, 112.0, 0.0, 0.0, 80.0, 112.0])
                width = config.projection_class_embeddings_input_dim
                inputs["added_cond_kwargs"] = {
                    "text_embeds": drawn(width - 6 * config.addition_time_embed_dim),
                    "time_ids": sizes.expand(batch, 6),
                }
            return inputs
        case DiTTransformer2DModel():
            return {
                "hidden_states": drawn(config.in_channels, 12, 12),
                "timestep": torch.full((batch,), 500),
                "class_labels": torch.arange(batch),
            }
        case PixArtTransformer2DModel():
            return {
                "hidden_states": drawn(config.in_channels, 12, 20),
                "timestep": torch.full((batch,), 500),
                "encoder_hidden_states": drawn(7, config.caption_channels),
                "encoder_attention_mask": _mask(batch, 7),
            }
        case WanTransformer3DModel():
            return {
                "hidden_states": drawn(config.in_channels, 3, 12, 20),
                "timestep": torch.full((batch,), 500.0),
                "encoder_hidden_states": drawn(7, config.text_dim),
            }
        case SD3Transformer2DModel():
            return {
                "hidden_states": drawn(config.in_channels, 12, 20),
                "timestep": torch.full((batch,), 500.0),
                "encoder_hidden_states": drawn(5, config.joint_attention_dim),
                "pooled_projections": drawn(config.pooled_projection_dim),
            }
        case QwenImageTransformer2DModel():
            return {
                "hidden_states": drawn(60, config.in_channels),
                "timestep": torch.full((batch,), 0.5),
                "encoder_hidden_states": drawn(7, config.joint_attention_dim),
                "encoder_hidden_states_mask": _mask(batch, 7),
                "img_shapes": [[(1, 6, 10)]] * batch,
            }
        case FluxTransformer2DModel():
            cells = torch.cartesian_prod(torch.arange(6.0), torch.arange(10.0))
            return {
                "hidden_states": drawn(60, config.in_channels),
                "timestep": torch.full((batch,), 0.5),
                "guidance": torch.full((batch,), 3.5) if config.guidance_embeds else None,
                "encoder_hidden_states": drawn(5, config.joint_attention_dim),
                "pooled_projections": drawn(config.pooled_projection_dim),
                "txt_ids": torch.zeros(5, 3),
                "img_ids": functional.pad(cells, (1, 0)),  # 0, row, column
            }
    raise TypeError(f"no inputs for a {type(model).__name__}")


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


def finish(pipe: Any, seed: int) -> Any:
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            # By name: a model's weights do not depend on what else its pipeline holds.
            randomise(component, seed + sum(map(ord, name))).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dit_latents(pipe: DiTPipeline, labels: list[int], options: dict[str, Any]) -> Tensor:
    """What it hands to its VAE: it has no output type for latents, and clamps the picture."""
    seen: list[Tensor] = []
    hook = pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.extend(args))
    try:
        pipe(labels, **options)
    finally:
        hook.remove()
    return seen[0] * pipe.vae.config.scaling_factor


def _mask(batch: int, length: int) -> Tensor:
    """Of texts that fill it, but for the first."""
    mask = torch.ones(batch, length)
    mask[0, length // 2 :] = 0
    return mask


def _plain(layers: int | Sequence[int]) -> int | tuple[int, ...]:
    return layers if isinstance(layers, int) else tuple(layers)


def emoji_data() -> Emoji:
    """Nine pictures of four concepts: an apple, a car and a ball in several colours, and one held out.

    The split holds out yellow balls, too.
    """
    names = [["apple", "fruit"], ["car"], ["ball"]]
    names.append([next(name for i in range(1000) if held_out(name := f"thing number {i}"))])
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    return Emoji(
        images=pixels.repeat(8, 1).repeat(8, 2),
        names=[*names, names[0], names[0], names[1], names[2], names[2]],
        colours=["red", "blue", None, "pink", "green", "blue", "red", "yellow", "blue"],
        recoloured=np.array([False] * 4 + [True] * 5),
    )
