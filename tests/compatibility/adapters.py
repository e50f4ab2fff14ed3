"""Weights and networks that are loaded beside a pipeline's own: LoRA, adapters, ControlNets."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from tests import tiny

from .base import (
    FLUX,
    PICTURE,
    TRANSFORMER,
    UNET,
    Combination,
    Refused,
    as_pipeline,
    denoiser,
    drawn_anew,
    sd,
    sd3,
    sdxl,
)

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
WIDTH = 24  # of the embeddings of pictures


# ---- LoRA


def add_lora(pipe: Any) -> None:
    """With weights that PEFT draws from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, init_lora_weights=False, target_modules=list(PROJECTIONS))
        denoiser(pipe).add_adapter(config, "style")


def load_lora(pipe: Any) -> None:
    """From a dict, as from a file."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    draw, weights = torch.Generator().manual_seed(1), {}
    for path, module in denoiser(pipe).named_modules():
        if isinstance(module, nn.Linear) and path.endswith(PROJECTIONS):
            for key, shape in (
                ("lora_A", (4, module.in_features)),
                ("lora_B", (module.out_features, 4)),
            ):
                weights[f"{name}.{path}.{key}.weight"] = 0.3 * torch.randn(shape, generator=draw)
    pipe.load_lora_weights(weights, adapter_name="style")


def load_half(pipe: Any) -> None:
    load_lora(pipe)
    pipe.set_adapters("style", 0.5)


def load_fused(pipe: Any) -> None:
    load_lora(pipe)
    pipe.fuse_lora()


def unload_fused(pipe: Any) -> None:
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


def delete_lora(pipe: Any) -> None:
    denoiser(pipe).delete_adapters("style")


def unload_lora(pipe: Any) -> None:
    pipe.unload_lora_weights()


BOTH_TRANSFORMERS = TRANSFORMER | FLUX
lora = partial(Combination, unet=UNET, transformer=BOTH_TRANSFORMERS)
LORA = (
    lora("LoRA, `add_adapter` and `delete_adapters`", put=add_lora, take=delete_lora),
    lora("LoRA, `load_lora_weights` and `unload_lora_weights`", put=load_lora, take=unload_lora),
    lora("LoRA, scaled by `set_adapters`", put=load_half, take=unload_lora),
    lora(
        "LoRA, `fuse_lora` and `unfuse_lora`",
        put=load_fused,
        take=unload_fused,
        close=True,
        note="unfused weights are rounded, also without tofu",
    ),
)


# ---- IP-Adapter


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projection(width: int) -> dict[str, Tensor]:
    """Of a picture's embedding to four tokens."""
    return {
        "proj.weight": drawn(4 * width, WIDTH) / WIDTH**0.5,
        "proj.bias": drawn(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def unet_ip_adapter(pipe: Any) -> None:
    unet, weights = pipe.unet, {}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(names):
        out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * i + 1}.{key}.weight"] = drawn(out, 32, seed=i) / 32**0.5
    both = {"image_proj": projection(32), "ip_adapter": weights}
    pipe.load_ip_adapter(both, None, "none", image_encoder_folder=None)


def flux_ip_adapter(pipe: Any) -> None:
    model, weights = pipe.transformer, {}
    for i in range(len(model.transformer_blocks)):
        for key in ("to_k_ip", "to_v_ip"):
            weights[f"{i}.{key}.weight"] = drawn(model.inner_dim, 64, seed=i) / 8
            weights[f"{i}.{key}.bias"] = drawn(model.inner_dim, seed=i)
    both = {"image_proj": projection(64), "ip_adapter": weights}
    pipe.load_ip_adapter(both, "none", image_encoder_pretrained_model_name_or_path=None)


def load_ip_adapter(pipe: Any) -> None:
    if hasattr(pipe, "unet"):
        unet_ip_adapter(pipe)
    else:
        flux_ip_adapter(pipe)


def unload_ip_adapter(pipe: Any) -> None:
    pipe.unload_ip_adapter()


# Those of no picture, and of one.
EMBEDDINGS = [torch.cat([torch.zeros(1, 1, WIDTH), drawn(1, 1, WIDTH)])]
MASK = [(PICTURE[:, :1] > 0.5).float()]
IP_ADAPTERS = (
    Combination(
        "IP-Adapter",
        unet=UNET,
        put=load_ip_adapter,
        take=unload_ip_adapter,
        call={"ip_adapter_image_embeds": EMBEDDINGS},
    ),
    Combination(
        "IP-Adapter of FLUX",
        transformer=FLUX,
        put=load_ip_adapter,
        take=unload_ip_adapter,
        call={
            "ip_adapter_image_embeds": [EMBEDDINGS[0][1:]],
            "negative_ip_adapter_image_embeds": [EMBEDDINGS[0][:1]],
        },
    ),
    Combination(
        "IP-Adapter with masks",
        unet=UNET,
        put=load_ip_adapter,
        take=unload_ip_adapter,
        call={
            "ip_adapter_image_embeds": EMBEDDINGS,
            "cross_attention_kwargs": {"ip_adapter_masks": MASK},
        },
        tokens=Refused("ip_adapter_masks need the whole grid"),
        instead={"scope": "attention"},
    ),
)


# ---- networks beside the denoiser


def sd_controlnet() -> Any:
    pipe = sd()
    net = drawn_anew(ControlNetModel.from_unet, pipe.unet)
    return as_pipeline(StableDiffusionControlNetPipeline, pipe, controlnet=net)


def sdxl_controlnet() -> Any:
    pipe = sdxl()
    net = drawn_anew(ControlNetModel.from_unet, pipe.unet)
    return as_pipeline(StableDiffusionXLControlNetPipeline, pipe, controlnet=net)


def sd3_controlnet() -> Any:
    pipe = sd3()
    net = drawn_anew(
        SD3ControlNetModel.from_transformer,
        pipe.transformer,
        num_layers=2,
        num_extra_conditioning_channels=0,
    )
    return as_pipeline(StableDiffusion3ControlNetPipeline, pipe, controlnet=net)


def flux_controlnet() -> Any:
    pipe = tiny.tiny_flux()
    net = drawn_anew(
        FluxControlNetModel.from_transformer,
        pipe.transformer,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
    )
    return as_pipeline(FluxControlNetPipeline, pipe, controlnet=net)


def t2i_adapter() -> Any:
    adapter = drawn_anew(T2IAdapter, channels=[32], num_res_blocks=1, downscale_factor=8)
    return as_pipeline(StableDiffusionAdapterPipeline, sd(), adapter=adapter)


def gligen() -> Any:
    pipe = sd()
    config = {**pipe.unet.config, "attention_type": "gated", "_use_default_values": []}
    unet = drawn_anew(UNet2DConditionModel.from_config, config)
    return as_pipeline(StableDiffusionGLIGENPipeline, pipe, unet=unet)


NETWORKS = (
    Combination(
        "ControlNet (SD, SDXL)",
        unet={"SD": sd_controlnet, "SDXL": sdxl_controlnet},
        call={"image": PICTURE},
        note="rests at skipped steps",
    ),
    Combination(
        "ControlNet (SD3, FLUX)",
        transformer={"SD3": sd3_controlnet, "FLUX": flux_controlnet},
        call={"control_image": PICTURE},
        note="rests at skipped steps",
    ),
    Combination("T2I-Adapter", unet={"SD": t2i_adapter}, call={"image": PICTURE}),
    Combination(
        "GLIGEN",
        unet={"SD": gligen},
        call={
            "gligen_phrases": ["a cat"],
            "gligen_boxes": [[0.1, 0.1, 0.6, 0.7]],
            "gligen_scheduled_sampling_beta": 0.5,
        },
    ),
)

ADAPTERS = (*LORA, *IP_ADAPTERS, *NETWORKS)
