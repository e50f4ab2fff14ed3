"""The models that `denoisers` times: their architectures, with random weights, and arguments of a step.

Configurations are those of the published models. The small ones are of the same families, with the same
kinds of blocks and fewer, narrower layers.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.nn import functional

from tofu_diffusers import FAMILIES

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
FLUX = {"guidance_embeds": True}
PIXART = {"caption_channels": 4096, "use_additional_conditions": False}
WAN_1B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}


@dataclass(frozen=True)
class Case:
    """A denoiser at a size.

    Args:
        size: In pixels, and frames of a video.
        latents: What the denoiser is given of one image: (channels, (frames,) rows, columns), or for
            FLUX and Qwen-Image (rows, columns) of tokens.
        text: Tokens of text.
        batch: Rows; `cfg_branches` parts of it are guidance.
        layers: Of the model where it is not built as a whole but with one and with two layers, and its
            times and FLOPs are extrapolated from the two; None: built as it is.
    """

    model: str
    size: str
    cls: Any
    config: Mapping[str, Any]
    latents: tuple[int, ...]
    text: int
    batch: int = 1
    cfg_branches: int = 1
    layers: int | None = None

    @property
    def family(self) -> Any:
        """Of tofu_diffusers."""
        return next(f for f in FAMILIES.values() if self.cls.__name__ in f.classes)

    @property
    def depths(self) -> dict[int | None, float]:
        """Layers to build and the weight of each build in the whole: t1 + (layers - 1) (t2 - t1)."""
        return {None: 1.0} if self.layers is None else {1: 2.0 - self.layers, 2: self.layers - 1.0}

    def shallow(self) -> Case:
        """Two layers of each kind; a UNet as it is."""
        layers = {"num_layers", "num_single_layers"} & signature_defaults(self.cls).keys()
        return replace(self, config={**self.config, **dict.fromkeys(layers, 2)}, layers=None)

    def build(self, device: torch.device, dtype: torch.dtype, depth: int | None = None) -> Any:
        """The denoiser with random weights, the same every time; global generators stay as they were."""
        config = dict(self.config) | ({} if depth is None else {"num_layers": depth})
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=forked), default_dtype(dtype), torch.device(device):
            torch.manual_seed(0)
            model = self.cls.from_config(config)
        # As `from_pretrained` loads them.
        wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if wide.intersection(name.split(".")):
                parameter.data = parameter.data.float()
        return model.eval().requires_grad_(False)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of one forward, drawn from a generator of their own."""
        draw = torch.Generator(device).manual_seed(1) if device.type != "meta" else None
        config = {**signature_defaults(self.cls), **self.config}

        def drawn(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=draw, device=device, dtype=dtype)

        def filled(value: float, *shape: int) -> Tensor:
            return torch.full((self.batch, *shape), value, device=device)

        match self.cls.__name__:
            case "UNet2DConditionModel":
                given = {
                    "sample": drawn(*self.latents),
                    "timestep": torch.tensor(500, device=device),
                    "encoder_hidden_states": drawn(self.text, config["cross_attention_dim"]),
                }
                if config["addition_embed_type"] == "text_time":
                    sizes = 6 * config["addition_time_embed_dim"]
                    pooled = config["projection_class_embeddings_input_dim"] - sizes
                    given["added_cond_kwargs"] = {
                        "text_embeds": drawn(pooled),
                        "time_ids": filled(1024.0, 6).to(dtype),
                    }
                return given
            case "SD3Transformer2DModel":
                return {
                    "hidden_states": drawn(*self.latents),
                    "timestep": filled(500.0),
                    "encoder_hidden_states": drawn(self.text, config["joint_attention_dim"]),
                    "pooled_projections": drawn(config["pooled_projection_dim"]),
                }
            case "FluxTransformer2DModel":
                rows, columns = self.latents
                cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
                return {
                    "hidden_states": drawn(rows * columns, config["in_channels"]),
                    "timestep": filled(0.5).to(dtype),
                    "guidance": filled(3.5).to(dtype) if config["guidance_embeds"] else None,
                    "encoder_hidden_states": drawn(self.text, config["joint_attention_dim"]),
                    "pooled_projections": drawn(config["pooled_projection_dim"]),
                    "txt_ids": torch.zeros(self.text, 3, device=device, dtype=dtype),
                    # Image, row, column.
                    "img_ids": functional.pad(cells, (1, 0)).to(device, dtype),
                }
            case "QwenImageTransformer2DModel":
                rows, columns = self.latents
                return {
                    "hidden_states": drawn(rows * columns, config["in_channels"]),
                    "timestep": filled(0.5).to(dtype),
                    "encoder_hidden_states": drawn(self.text, config["joint_attention_dim"]),
                    "img_shapes": [[(1, rows, columns)]] * self.batch,
                }
            case "PixArtTransformer2DModel":
                return {
                    "hidden_states": drawn(*self.latents),
                    "timestep": filled(500.0),
                    "encoder_hidden_states": drawn(self.text, config["caption_channels"]),
                    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
                }
            case "WanTransformer3DModel":
                return {
                    "hidden_states": drawn(*self.latents),
                    "timestep": filled(500.0),
                    "encoder_hidden_states": drawn(self.text, config["text_dim"]),
                }
        raise ValueError(f"no arguments are known for a {self.cls.__name__}")


def here() -> tuple[torch.device, torch.dtype]:
    """What is measured on: the GPU in bfloat16, or the CPU in float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def free_memory() -> None:
    """Give back what was just let go of."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def twin(model: nn.Module) -> Any:
    """A copy of the modules around the same weights, to patch or compile."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def signature_defaults(cls: Any) -> dict[str, Any]:
    """Of a model's configuration."""
    return {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this dtype: a 12B model is never held in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unet(model: str, config: Mapping[str, Any], side: int, text: int = 77) -> Case:
    size = f"{8 * side}x{8 * side}"
    return Case(model, size, UNet2DConditionModel, config, (4, side, side), text, 2, 2)


def _sd3(model: str, config: Mapping[str, Any], side: int, text: int = 333) -> Case:
    size, latents = f"{8 * side}x{8 * side}", (16, side, side)
    return Case(
        model, size, SD3Transformer2DModel, {"sample_size": side, **config}, latents, text, 2, 2
    )


def _flux(model: str, config: Mapping[str, Any], side: int, text: int = 512) -> Case:
    size = f"{16 * side}x{16 * side}"
    return Case(model, size, FluxTransformer2DModel, config, (side, side), text)


def _qwen(model: str, config: Mapping[str, Any], side: int, text: int = 128) -> Case:
    size = f"{16 * side}x{16 * side}"
    return Case(model, size, QwenImageTransformer2DModel, config, (side, side), text)


def _pixart(model: str, config: Mapping[str, Any], side: int, text: int = 300) -> Case:
    size = f"{8 * side}x{8 * side}"
    config = {"sample_size": side, "interpolation_scale": max(1, side // 64), **config}
    return Case(model, size, PixArtTransformer2DModel, config, (4, side, side), text)


def _wan(
    model: str, config: Mapping[str, Any], frames: int, height: int, width: int, text: int = 512
) -> Case:
    size = f"{8 * height}x{8 * width}x{4 * frames - 3}"
    return Case(model, size, WanTransformer3DModel, config, (16, frames, height, width), text)


# At the sizes that people use; their FLOPs are counted.
USUAL = (
    _unet("SD1.5", SD15, 64),
    _unet("SDXL", SDXL, 128),
    _sd3("SD3.5-large", SD35_LARGE, 128),
    _flux("FLUX.1", FLUX, 64),
    _pixart("PixArt-Sigma", PIXART, 128),
    _qwen("Qwen-Image", {}, 83),
    _wan("Wan-14B", WAN_14B, 21, 60, 104),
)

SUITES: dict[str, tuple[Case, ...]] = {
    # The most important first.
    "full": (
        _flux("FLUX.1", FLUX, 64),
        _unet("SDXL", SDXL, 128),
        _sd3("SD3.5-large", SD35_LARGE, 128),
        _unet("SD1.5", SD15, 128),
        _flux("FLUX.1", FLUX, 128),
        _unet("SDXL", SDXL, 256),
        replace(_wan("Wan-14B", WAN_14B, 21, 90, 160), layers=40),
        _wan("Wan-1.3B", WAN_1B, 21, 60, 104),
        _sd3("SD3.5-medium", SD35_MEDIUM, 128),
        _unet("SD1.5", SD15, 64),
        _pixart("PixArt-Sigma", PIXART, 128),
        _pixart("PixArt-Sigma", PIXART, 256),
        replace(_wan("Wan-14B", WAN_14B, 21, 60, 104), layers=40),
        _wan("Wan-1.3B", WAN_1B, 21, 90, 160),
    ),
    "cpu": (
        _flux(
            "FLUX-small",
            FLUX | {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4},
            32,
            64,
        ),
        _unet(
            "SDXL-small",
            SDXL
            | {
                "block_out_channels": (64, 128, 256),
                "transformer_layers_per_block": (1, 1, 3),
                "attention_head_dim": (1, 2, 4),
                "cross_attention_dim": 256,
            },
            64,
        ),
        _sd3(
            "SD3.5-small",
            SD35_LARGE | {"num_layers": 6, "num_attention_heads": 6, "caption_projection_dim": 384},
            64,
            64,
        ),
        _unet("SD1.5-small", SD15 | {"block_out_channels": (64, 128, 256, 256)}, 32),
        _pixart(
            "PixArt-small",
            PIXART | {"num_layers": 6, "num_attention_heads": 4, "cross_attention_dim": 288},
            64,
            64,
        ),
        _wan(
            "Wan-small",
            WAN_1B | {"num_layers": 4, "num_attention_heads": 3, "ffn_dim": 1536},
            3,
            32,
            56,
            64,
        ),
    ),
    # A try of the whole in seconds: its times mean nothing.
    "tiny": (
        _flux(
            "FLUX-tiny",
            FLUX
            | {
                "num_layers": 1,
                "num_single_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "axes_dims_rope": (4, 6, 6),
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
            },
            6,
            4,
        ),
        _unet(
            "SD-tiny",
            {
                "block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock2D",) * 2,
                "up_block_types": ("CrossAttnUpBlock2D",) * 2,
                "layers_per_block": 1,
                "attention_head_dim": 2,
                "cross_attention_dim": 32,
                "norm_num_groups": 8,
            },
            8,
            4,
        ),
    ),
}
