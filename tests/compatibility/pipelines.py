"""Other pipelines around a denoiser, and other batches."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    MotionAdapter,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableVideoDiffusionPipeline,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import tiny

from .base import (
    FLUX,
    PICTURE,
    STEPS,
    TRANSFORMER,
    UNET,
    Combination,
    as_pipeline,
    drawn_anew,
    sd,
    sd3,
    sdxl,
)

MASK = torch.zeros(1, 1, 128, 128)
MASK[..., 32:96, 16:80] = 1


def around(cls: Any, build: Any) -> Any:
    return lambda: as_pipeline(cls, build())


def animate_diff() -> Any:
    pipe = sd()
    with torch.random.fork_rng(devices=[]):
        adapter = MotionAdapter(
            block_out_channels=(32,),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
        )
        unet = UNetMotionModel.from_unet2d(pipe.unet, adapter)
    unet = tiny.randomise(unet, 3).eval().requires_grad_(False)
    made = AnimateDiffPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, unet, adapter, pipe.scheduler
    )
    made.set_progress_bar_config(disable=True)
    return made


def animate(pipe: Any, steps: int) -> Tensor:
    frames: Tensor = pipe(
        "a cat", num_frames=3, height=64, width=64, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames  # fmt: skip
    return frames


def stable_video() -> Any:
    unet = drawn_anew(
        UNetSpatioTemporalConditionModel,
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=2,
        cross_attention_dim=32,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = drawn_anew(
        AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
    )
    encoder = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=224, patch_size=56, projection_dim=32,
    )  # fmt: skip
    made = StableVideoDiffusionPipeline(
        vae,
        drawn_anew(CLIPVisionModelWithProjection, encoder),
        unet,
        EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        CLIPImageProcessorPil(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def film(pipe: Any, steps: int) -> Tensor:
    frames: Tensor = pipe(
        Image.new("RGB", (64, 64), "red"), height=64, width=64, num_frames=3, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames  # fmt: skip
    return frames


BOTH = TRANSFORMER | FLUX
everywhere = partial(Combination, unet=UNET, transformer=BOTH)
PART = {"image": PICTURE, "strength": 0.75}
PIPELINES = (
    Combination(
        "image-to-image",
        unet={
            "SD": around(StableDiffusionImg2ImgPipeline, sd),
            "SDXL": around(StableDiffusionXLImg2ImgPipeline, sdxl),
        },
        transformer={
            "SD3": around(StableDiffusion3Img2ImgPipeline, sd3),
            "FLUX": around(FluxImg2ImgPipeline, tiny.tiny_flux),
        },
        call=PART,
        count=STEPS * 4 // 3,
        note="steps are those that the strength leaves",
    ),
    Combination(
        "inpainting",
        unet={
            "SD": around(StableDiffusionInpaintPipeline, sd),
            "SDXL": around(StableDiffusionXLInpaintPipeline, sdxl),
        },
        transformer={"FLUX": around(FluxInpaintPipeline, tiny.tiny_flux)},
        call={**PART, "mask_image": MASK},
        count=STEPS * 4 // 3,
    ),
    Combination(
        "AnimateDiff",
        unet={"SD": animate_diff},
        run=animate,
    ),
    Combination(
        "Stable Video Diffusion",
        unet={"SVD": stable_video},
        run=film,
    ),
    Combination(
        "FreeU",
        unet={"SD": tiny.tiny_sd},
        put=lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        take=lambda pipe: pipe.disable_freeu(),
    ),
    everywhere("`num_images_per_prompt=2`", call={"num_images_per_prompt": 2}),
    everywhere("a batch of three prompts", call={"prompts": ["a cat", "a dog", "two hats"]}),
    everywhere(
        "`from_pipe`",
        put=lambda pipe: as_pipeline(type(pipe), pipe),
        note="both pipelines share the denoiser, and so tofu",
    ),
)
