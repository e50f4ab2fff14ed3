"""Ways of guidance, and none."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import (
    QwenImageAutoBlocks,
    StableDiffusion3AutoBlocks,
    StableDiffusionXLAutoBlocks,
)
from torch import Tensor

from tests import tiny

from .base import (
    FLUX,
    TRANSFORMER,
    UNET,
    Combination,
    Refused,
    as_pipeline,
    denoiser,
    sd,
    sd3,
    sdxl,
)


def modular(blocks: Any, build: Callable[[], Any]) -> Any:
    """A modular pipeline with the parts of another one."""
    parts = build().components
    pipe = blocks().init_pipeline()
    names = [name for name in pipe.components if parts.get(name) is not None]
    pipe.update_components(**{name: parts[name] for name in names})
    unguided(pipe)
    return pipe


MODULAR_UNET = {"SDXL": lambda: modular(StableDiffusionXLAutoBlocks, sdxl)}
MODULAR_TRANSFORMER = {"SD3": lambda: modular(StableDiffusion3AutoBlocks, sd3)}


MODULAR_QWEN = {"Qwen-Image": lambda: modular(QwenImageAutoBlocks, tiny.tiny_qwen)}


def stack(pipe: Any) -> str:
    """A stack of blocks in its denoiser."""
    return (
        "mid_block.attentions.0.transformer_blocks"
        if hasattr(pipe, "unet")
        else "transformer_blocks"
    )


def skipped(pipe: Any) -> LayerSkipConfig:
    """A block, or of SD3's, whose order of outputs diffusers turns round there, the feed-forward."""
    return LayerSkipConfig([0], fqn=stack(pipe), skip_attention=hasattr(pipe, "unet"))


def run_modular(pipe: Any, steps: int) -> Tensor:
    options = {"max_sequence_length": 16} if hasattr(pipe, "transformer") else {}
    try:
        latents: Tensor = pipe(
            prompt="a cat",
            negative_prompt="a dog",
            num_inference_steps=steps,
            height=128,
            width=128,
            generator=torch.Generator().manual_seed(0),
            output="latents",
            **options,
        )
    except ValueError:
        # Broken off, a guider leaves its hooks behind.
        pipe.guider.cleanup_models(denoiser(pipe))
        raise
    return latents


def guided(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Puts a guider on a modular pipeline."""
    return lambda pipe: pipe.update_components(guider=make(pipe))


def unguided(pipe: Any) -> None:
    """Gives a modular pipeline the guider of every row that has no other."""
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=7.5))


def guider(name: str, make: Callable[[Any], Any], **options: Any) -> Combination:
    found = {"unet": MODULAR_UNET, "transformer": MODULAR_TRANSFORMER} | options
    return Combination(
        f"modular pipeline, `{name}`", run=run_modular, put=guided(make), take=unguided, **found
    )


def end_guidance(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A callback that ends guidance on the way, as is done to save time."""
    if index == 6:
        pipe._guidance_scale = 0.0
        for name in {*kwargs} - {"latents"}:
            kwargs[name] = kwargs[name].chunk(2)[-1]
    return kwargs


def ended(*names: str) -> dict[str, Any]:
    return {
        "callback_on_step_end": end_guidance,
        "callback_on_step_end_tensor_inputs": ["latents", *names],
    }


GUIDANCE = (
    Combination(
        "no guidance",
        unet=UNET,
        transformer=TRANSFORMER,
        call={"guidance_scale": 1.0},
    ),
    Combination(
        "guidance that a callback ends on the way (SD)",
        unet=UNET,
        call=ended("prompt_embeds"),
        count=12,
        note="one step more is computed there",
    ),
    Combination(
        "guidance that a callback ends on the way (SD3)",
        transformer=TRANSFORMER,
        call=ended("prompt_embeds", "pooled_prompt_embeds"),
        count=12,
        note="one step more is computed there",
    ),
    Combination(
        "guidance in two calls (`true_cfg_scale`)",
        transformer=FLUX,
        call={"negative_prompt": "a dog", "true_cfg_scale": 3.0},
    ),
    Combination(
        "PAG pipeline",
        unet={
            "SD": lambda: as_pipeline(StableDiffusionPAGPipeline, sd(), pag_applied_layers="mid")
        },
        transformer={"SD3": lambda: as_pipeline(StableDiffusion3PAGPipeline, sd3())},
        tokens=Refused("perturbed-attention guidance"),
        instead={"keys_values": "dropped"},
    ),
    Combination(
        "modular pipeline", unet=MODULAR_UNET, transformer=MODULAR_TRANSFORMER, run=run_modular
    ),
    guider("AdaptiveProjectedGuidance", lambda pipe: AdaptiveProjectedGuidance(guidance_scale=3.0)),
    guider(
        "AdaptiveProjectedMixGuidance",
        lambda pipe: AdaptiveProjectedMixGuidance(guidance_scale=3.0),
    ),
    guider("ClassifierFreeZeroStarGuidance", lambda pipe: ClassifierFreeZeroStarGuidance()),
    guider("TangentialClassifierFreeGuidance", lambda pipe: TangentialClassifierFreeGuidance()),
    guider(
        "AutoGuidance",
        lambda pipe: AutoGuidance(auto_guidance_config=skipped(pipe)),
    ),
    guider(
        "SkipLayerGuidance",
        lambda pipe: SkipLayerGuidance(
            skip_layer_config=skipped(pipe), skip_layer_guidance_stop=1.0
        ),
    ),
    guider(
        "PerturbedAttentionGuidance",
        lambda pipe: PerturbedAttentionGuidance(
            perturbed_guidance_config=LayerSkipConfig(
                [0],
                fqn=stack(pipe),
                skip_attention=False,
                skip_attention_scores=True,
                skip_ff=False,
            ),
            perturbed_guidance_stop=1.0,
        ),
        transformer=MODULAR_QWEN,
        tokens=Refused("a guider perturbs attentions"),
        instead={"keys_values": "dropped"},
        note="one that stops in the warm-up is not",
    ),
)
