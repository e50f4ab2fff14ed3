"""A tiny pipeline around every denoiser class whose tokens are reduced: `PIPELINES`, by the class's name.

They are built as those of `tests.tiny`, around the denoisers of `tests.denoisers`.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.joyimage.image_processor import BUCKETS
from PIL import Image

from tests import tiny
from tests import tiny_parts as parts
from tests.denoisers import DENOISERS

PIPELINES: dict[str, Callable[[], Any]] = {
    "CogVideoXTransformer3DModel": tiny.tiny_cogvideox,
    "DiTTransformer2DModel": tiny.tiny_dit,
    "Flux2Transformer2DModel": tiny.tiny_flux2,
    "FluxTransformer2DModel": tiny.tiny_flux,
    "HunyuanVideo15Transformer3DModel": tiny.tiny_hunyuan_video15,
    "LTX2VideoTransformer3DModel": tiny.tiny_ltx2,
    "PixArtTransformer2DModel": tiny.tiny_pixart,
    "QwenImageTransformer2DModel": tiny.tiny_qwen,
    "SD3Transformer2DModel": tiny.tiny_sd3,
    "UNet2DConditionModel": tiny.tiny_sd,
    "UNet2DModel": tiny.tiny_ddpm,
    "WanTransformer3DModel": tiny.tiny_wan,
    "ZImageTransformer2DModel": tiny.tiny_z_image,
}
"""By the class of a denoiser, what builds a pipeline around it."""
NO_PIPELINES = {"Flux3Transformer2DModel": "diffusers has no pipeline that denoises with it"}
"""Classes without one, and why."""

PICTURE = {"height": 80, "width": 112}
"""Of 5 x 7 tokens in most."""
OF_32 = {"height": 96, "width": 160}
"""For pipelines that take multiples of 32 pixels: 3 x 5 tokens in most."""
VIDEO = {**PICTURE, "num_frames": 9}
FRAMES = {**PICTURE, "num_frames": 3}
SHORT = {"max_sequence_length": 16}
GIVEN = Image.linear_gradient("L").resize((112, 80)).convert("RGB")
FLOW = partial(
    UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
DDIM = partial(DDIMScheduler, **tiny.NOISE, clip_sample=False)
Components = dict[str, Any]


def add(
    pipeline: str,
    denoiser: str,
    components: Callable[[], Components],
    call: dict[str, Any],
    *,
    scheduler: Callable[[], Any] = FlowMatchEulerDiscreteScheduler,
    ready: Callable[[Any], None] = lambda pipe: None,
    **changes: Any,
) -> None:
    """Make a pipeline known by the name of the class that it denoises with.

    components: What gives all of its components but the denoiser and the scheduler.
    call: Arguments of its calls, for `tiny.generate`.
    ready: Done to the new pipeline.
    changes: Of the tiny denoiser's configuration.
    """
    kind: type[DiffusionPipeline] = getattr(diffusers, pipeline)
    tiny.CALLS[kind] = call

    @tiny.untouched_generator
    def build() -> Any:
        described = DENOISERS[denoiser]
        model = replace(described, config={**described.config, **changes}).build()
        part = "unet" if "UNet" in denoiser else "transformer"
        pipe = kind(**{part: model}, scheduler=scheduler(), **components())
        ready(pipe)
        return tiny.finish(pipe, seed=0)

    assert denoiser not in PIPELINES, denoiser
    PIPELINES[denoiser] = build


def plain_texts(pipe: Any) -> None:
    """Its file calls a package that is not here, and changes nothing in a plain text."""
    vars(sys.modules[type(pipe).__module__]).setdefault("ftfy", SimpleNamespace(fix_text=str))


@tiny.untouched_generator
def animatediff() -> Any:
    """AnimateDiff: Stable Diffusion with motion modules between its blocks."""
    pipe = tiny.tiny_sd()
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    taken = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    scheduler = DDIMScheduler(**tiny.NOISE, clip_sample=False)
    made = diffusers.AnimateDiffPipeline(**taken, motion_adapter=adapter, scheduler=scheduler)
    return tiny.finish(made, seed=0)


PIPELINES["UNetMotionModel"] = animatediff
tiny.CALLS[diffusers.AnimateDiffPipeline] = FRAMES

# ---- autoencoders -------------------------------------------------------------------------------


def four_channels(vae: type[Any]) -> Any:
    """A Wan or Qwen-Image VAE of latents of 4 channels instead of 16."""
    still: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return vae(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **still)


def hunyuan_vae() -> Any:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def ltx_vae() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )


def flux2_vae(channels: int) -> Any:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
    )


flux_vae = partial(parts.vae, 4, shift_factor=0.1)
plain_vae = partial(parts.vae, 4)
wan_vae = partial(four_channels, AutoencoderKLWan)
qwen_vae = partial(four_channels, AutoencoderKLQwenImage)


# ---- texts --------------------------------------------------------------------------------------


def t5(vae: Callable[[], Any], model: type[Any] = transformers.T5EncoderModel) -> Any:
    """Components of a pipeline of an autoencoder and T5 alone."""
    return lambda: {
        "vae": vae(),
        "text_encoder": parts.t5(16, model),
        "tokenizer": parts.t5_tokenizer(),
    }


def language(vae: Callable[[], Any], model: str, **more: Any) -> Callable[[], Components]:
    """Components of a pipeline of an autoencoder and one of transformers' language models."""

    def components() -> Components:
        tokenizer = parts.chat_tokenizer()
        kind = getattr(transformers, model)
        text = parts.language_model(kind, len(tokenizer), **more)
        return {"vae": vae(), "text_encoder": text, "tokenizer": tokenizer}

    return components


def llama(vae: Callable[[], Any]) -> Components:
    """A language model and CLIP, as in HunyuanVideo."""
    return {
        **language(vae, "LlamaModel", layers=3)(),
        "text_encoder_2": parts.clip(transformers.CLIPTextModel),
        "tokenizer_2": parts.clip_tokenizer(),
    }


def clip_text(vae: Callable[[], Any]) -> Components:
    """Components of a pipeline of an autoencoder and CLIP alone."""
    return {
        "vae": vae(),
        "text_encoder": parts.clip(transformers.CLIPTextModel),
        "tokenizer": parts.clip_tokenizer(),
    }


def pictures() -> Components:
    """An encoder of pictures, and what makes them ready for it."""
    return {
        "image_encoder": parts.clip_vision(transformers.CLIPVisionModelWithProjection),
        "feature_extractor": transformers.CLIPImageProcessor(),
    }


# ---- of T5 alone --------------------------------------------------------------------------------

add(
    "AuraFlowPipeline",
    "AuraFlowTransformer2DModel",
    t5(plain_vae, transformers.UMT5EncoderModel),
    PICTURE | SHORT,
)
add("BriaPipeline", "BriaTransformer2DModel", t5(plain_vae), PICTURE | SHORT, in_channels=16)
add("ChromaPipeline", "ChromaTransformer2DModel", t5(flux_vae), PICTURE | SHORT, in_channels=16)
add(
    "CogView3PlusPipeline",
    "CogView3PlusTransformer2DModel",
    t5(plain_vae),
    PICTURE | SHORT,
    scheduler=diffusers.CogVideoXDDIMScheduler,
)
add("LTXPipeline", "LTXVideoTransformer3DModel", t5(ltx_vae), VIDEO | SHORT | OF_32)
add(
    "LattePipeline",
    "LatteTransformer3DModel",
    t5(plain_vae),
    PICTURE | {"video_length": 3, "clean_caption": False},
    scheduler=DDIM,
)
add(
    "AllegroPipeline",
    "AllegroTransformer3DModel",
    t5(
        lambda: diffusers.AutoencoderKLAllegro(
            down_block_types=("AllegroDownBlock3D",) * 4,
            up_block_types=("AllegroUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
        )
    ),
    VIDEO | SHORT | {"num_frames": 12, "clean_caption": False},
    scheduler=DDIM,
)
add(
    "MochiPipeline",
    "MochiTransformer3DModel",
    t5(
        lambda: diffusers.AutoencoderKLMochi(
            latent_channels=4,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        )
    ),
    VIDEO | SHORT | {"num_frames": 13},
    max_sequence_length=16,
)
WAN = t5(wan_vae, transformers.UMT5EncoderModel)
add(
    "WanVACEPipeline",
    "WanVACETransformer3DModel",
    WAN,
    VIDEO | SHORT,
    scheduler=FLOW,
    ready=plain_texts,
    vace_in_channels=2 * 4 + 64,
)
add(
    "SkyReelsV2Pipeline",
    "SkyReelsV2Transformer3DModel",
    WAN,
    VIDEO | SHORT,
    scheduler=FLOW,
    ready=plain_texts,
    num_frame_per_block=1,
)
add(
    "ChronoEditPipeline",
    "ChronoEditTransformer3DModel",
    lambda: {
        **WAN(),
        "image_encoder": parts.clip_vision(transformers.CLIPVisionModel),
        "image_processor": transformers.CLIPImageProcessor(),
    },
    VIDEO | SHORT | {"image": GIVEN},
    scheduler=FLOW,
    ready=plain_texts,
    in_channels=2 * 4 + 4,
    image_dim=32,
)

# ---- of one language model ----------------------------------------------------------------------

add("OvisImagePipeline", "OvisImageTransformer2DModel", language(flux_vae, "Qwen3Model"), PICTURE)
add(
    "Lumina2Pipeline",
    "Lumina2Transformer2DModel",
    language(flux_vae, "Gemma2Model"),
    PICTURE | {"max_sequence_length": 64, "system_prompt": "", "negative_prompt": "a dog"},
)
add(
    "CogView4Pipeline",
    "CogView4Transformer2DModel",
    language(plain_vae, "GlmModel"),
    PICTURE | SHORT | {"negative_prompt": "a dog"},
)
add(
    "SanaPipeline",
    "SanaTransformer2DModel",
    language(
        lambda: diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock",) * 6,
            decoder_block_types=("ResBlock",) * 6,
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
        ),
        "Gemma2Model",
    ),
    OF_32 | SHORT | {"use_resolution_binning": False, "complex_human_instruction": None},
)
add(
    "PRXPipeline",
    "PRXTransformer2DModel",
    language(plain_vae, "Qwen3Model"),
    PICTURE | {"tokenizer_max_length": 16, "use_resolution_binning": False},
    ready=plain_texts,
)


# ---- of several ---------------------------------------------------------------------------------

HUNYUAN = VIDEO | SHORT | {"prompt_template": {"template": "{}", "crop_start": 0}}
add(
    "HunyuanVideoPipeline",
    "HunyuanVideoTransformer3DModel",
    lambda: llama(hunyuan_vae),
    HUNYUAN,
    pooled_projection_dim=32,
)
add(
    "HunyuanVideoFramepackPipeline",
    "HunyuanVideoFramepackTransformer3DModel",
    lambda: {
        **llama(hunyuan_vae),
        "image_encoder": parts.siglip(),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    },
    HUNYUAN | {"image": GIVEN, "latent_window_size": 3},
    pooled_projection_dim=32,
    image_proj_dim=16,
)


def kandinsky5() -> Components:
    processor = parts.TextProcessor()
    return {
        "vae": hunyuan_vae(),
        "text_encoder": parts.qwen_text(len(processor.tokenizer)),
        "tokenizer": processor,
        "text_encoder_2": parts.clip(transformers.CLIPTextModel),
        "tokenizer_2": parts.clip_tokenizer(),
    }


def prompt_alone(pipe: Any) -> None:
    """Without a template, which has more tokens here than are cut off in front."""
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "{}", 0


add(
    "Kandinsky5T2VPipeline",
    "Kandinsky5Transformer3DModel",
    kandinsky5,
    VIDEO | SHORT | {"negative_prompt": "a dog"},
    ready=prompt_alone,
    in_text_dim=64,
    in_text_dim2=32,
)


def hunyuan_image() -> Components:
    tokenizer = parts.qwen_tokenizer()
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
    )
    return {
        "vae": vae,
        "text_encoder": parts.qwen_text(len(tokenizer)),
        "tokenizer": tokenizer,
        "text_encoder_2": parts.t5(12, vocabulary=384),
        "tokenizer_2": transformers.ByT5Tokenizer(),
    }


def short_texts(pipe: Any) -> None:
    pipe.tokenizer_max_length = pipe.tokenizer_2_max_length = 16


add(
    "HunyuanImagePipeline",
    "HunyuanImageTransformer2DModel",
    hunyuan_image,
    PICTURE,
    ready=short_texts,
    text_embed_dim=64,
)


def longcat() -> Components:
    processor = parts.TextProcessor()
    return {
        "vae": flux_vae(),
        "text_encoder": parts.qwen_text(len(processor.tokenizer)),
        "tokenizer": processor.tokenizer,
        "text_processor": processor,
    }


add(
    "LongCatImagePipeline",
    "LongCatImageTransformer2DModel",
    longcat,
    PICTURE | {"enable_prompt_rewrite": False},
    ready=short_texts,
    in_channels=64,
    joint_attention_dim=64,
)


def hidream() -> Components:
    return {
        "vae": flux_vae(),
        "text_encoder": parts.clip(transformers.CLIPTextModelWithProjection),
        "tokenizer": parts.clip_tokenizer(),
        "text_encoder_2": parts.clip(transformers.CLIPTextModelWithProjection),
        "tokenizer_2": parts.clip_tokenizer(),
        "text_encoder_3": parts.t5(16),
        "tokenizer_3": parts.t5_tokenizer(),
        "text_encoder_4": parts.language_model(
            transformers.LlamaForCausalLM, len(parts.chat_tokenizer()), layers=4
        ),
        "tokenizer_4": parts.chat_tokenizer(),
    }


add(
    "HiDreamImagePipeline",
    "HiDreamImageTransformer2DModel",
    hidream,
    PICTURE | SHORT,
    ready=lambda pipe: setattr(pipe, "default_sample_size", 12),  # to which it scales
    caption_channels=[16, 16],
    text_emb_dim=64,
)


def bert() -> Components:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *parts.byte_letters()]
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return {
        "vae": plain_vae(),
        "text_encoder": transformers.BertModel(config),
        "tokenizer": transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}),
        "text_encoder_2": parts.t5(24),
        "tokenizer_2": parts.t5_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
    }


add(
    "HunyuanDiTPipeline",
    "HunyuanDiT2DModel",
    bert,
    PICTURE | {"use_resolution_binning": False},
    scheduler=DDIM,
    text_len=77,
    text_len_t5=256,
)


# ---- of Qwen3-VL --------------------------------------------------------------------------------


def krea2() -> Components:
    tokenizer = parts.qwen_tokenizer()
    return {
        "vae": qwen_vae(),
        "text_encoder": parts.qwen3_vl(transformers.Qwen3VLModel, len(tokenizer)),
        "tokenizer": tokenizer,
        "text_encoder_select_layers": (0, 1, 2),
    }


add("Krea2Pipeline", "Krea2Transformer2DModel", krea2, PICTURE | SHORT)


def ideogram4() -> Components:
    """Two denoisers, the second without text."""
    tokenizer = parts.chat_tokenizer()
    described = DENOISERS["Ideogram4Transformer2DModel"]
    config = {**described.config, "llm_features_dim": 13 * 16}
    return {
        "vae": flux2_vae(2),
        "text_encoder": parts.qwen3_vl(transformers.Qwen3VLModel, len(tokenizer), layers=36),
        "tokenizer": tokenizer,
        "unconditional_transformer": replace(described, config=config).build(seed=1),
    }


add(
    "Ideogram4Pipeline",
    "Ideogram4Transformer2DModel",
    ideogram4,
    PICTURE | {"max_sequence_length": 64, "guidance_scale": 5.0, "guidance_schedule": None},
    llm_features_dim=13 * 16,
)


def joy() -> Components:
    """Without a picture to edit: what reads one needs torchvision, which is not here."""
    processor = parts.TextProcessor()
    vocabulary = len(processor.tokenizer)
    return {
        "vae": wan_vae(),
        "text_encoder": parts.qwen3_vl(transformers.Qwen3VLForConditionalGeneration, vocabulary),
        "tokenizer": processor.tokenizer,
        "processor": processor,
    }


def joy_size(pipe: Any) -> None:
    BUCKETS[96] = [(80, 112)]  # all others are of a million pixels
    pipe.vae_image_processor.register_to_config(basesize=96)


add("JoyImageEditPipeline", "JoyImageEditTransformer3DModel", joy, PICTURE | SHORT, ready=joy_size)
add("JoyImageEditPlusPipeline", "JoyImageEditPlusTransformer3DModel", joy, PICTURE | SHORT)


def qwen21() -> Components:
    processor = parts.TextProcessor()
    vocabulary = len(processor.tokenizer)
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=16,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    return {
        "vae": vae,
        "text_encoder": parts.qwen3_vl(transformers.Qwen3VLForConditionalGeneration, vocabulary),
        "processor": processor,
    }


def prompt_alone21(pipe: Any) -> None:
    """As `prompt_alone`."""
    pipe.prompt_template_t2i, pipe._drop_idx = "{}", 0


add(
    "QwenImage21Pipeline",
    "QwenImage21Transformer2DModel",
    qwen21,
    PICTURE,
    ready=prompt_alone21,
)

# ---- others -------------------------------------------------------------------------------------

add(
    "ErnieImagePipeline",
    "ErnieImageTransformer2DModel",
    language(partial(flux2_vae, 2), "MistralModel"),
    PICTURE,
)
add(
    "BriaFiboPipeline",
    "BriaFiboTransformer2DModel",
    language(wan_vae, "SmolLM3ForCausalLM"),
    PICTURE | SHORT | {"negative_prompt": "a dog"},
    joint_attention_dim=2 * 16,
    text_encoder_dim=16,
)
add(
    "MotifVideoPipeline",
    "MotifVideoTransformer3DModel",
    lambda: {**t5(wan_vae)(), "guider": diffusers.AdaptiveProjectedGuidance()},
    VIDEO | SHORT,
)


def glm() -> Components:
    """Without the model that writes the prior: it is given."""
    return {**t5(flux_vae)(), "vision_language_encoder": None, "processor": None}


add(
    "GlmImagePipeline",
    "GlmImageTransformer2DModel",
    glm,
    OF_32 | SHORT | {"prior_token_ids": torch.arange(6 * 10)[None] % 20},
)


add(
    "TextToVideoSDPipeline",
    "UNet3DConditionModel",
    lambda: clip_text(plain_vae),
    FRAMES,
    scheduler=DDIM,
    cross_attention_dim=32,
)
add(
    "I2VGenXLPipeline",
    "I2VGenXLUNet",
    lambda: {**clip_text(plain_vae), **pictures()},
    FRAMES | {"image": GIVEN, "clip_skip": None},
    scheduler=DDIM,
    cross_attention_dim=32,
)
add(
    "StableVideoDiffusionPipeline",
    "UNetSpatioTemporalConditionModel",
    lambda: {
        **pictures(),
        "vae": diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            layers_per_block=1,
        ),
    },
    FRAMES | {"image": GIVEN},
    scheduler=partial(
        diffusers.EulerDiscreteScheduler,
        **tiny.NOISE,
        interpolation_type="linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    ),
    cross_attention_dim=32,
)
