"""Tiny encoders of transformers with random weights, and a call of each: a batch of two different rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)

END = 49
COMMON = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
WIDE = {**COMMON, "intermediate_size": 64}
IMAGE = {"image_size": (24, 20), "patch_size": 4}
SQUARE = {"image_size": 24, "patch_size": 4}
TEXT = {"vocab_size": 50, "max_position_embeddings": 24}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def _clip_text() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    return CLIPTextModelWithProjection(CLIPTextConfig(**WIDE, **TEXT, **ends, projection_dim=8))


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}
    return T5EncoderModel(T5Config(**sizes, vocab_size=50))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**WIDE, **IMAGE, **DROPOUT)),
    "clip_vision": lambda: CLIPVisionModelWithProjection(
        CLIPVisionConfig(**WIDE, **SQUARE, attention_dropout=0.1, projection_dim=8)
    ),
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE, **SQUARE)),
    "dinov2": lambda: Dinov2ForImageClassification(
        Dinov2Config(**COMMON, **SQUARE, **DROPOUT, mlp_ratio=2, drop_path_rate=0.2)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**WIDE, **TEXT, **DROPOUT)),
    "clip_text": _clip_text,
    "t5": _t5,
}
"""One of each family, by its name."""


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BUILDERS[name]().eval()
        for parameter in model.parameters():
            # Weights as they begin are so small that every token is alike.
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    return model


def arguments(name: str, model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        side = model.config.image_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return {"pixel_values": torch.randn(2, 3, height, width, generator=draw).to(dtype)}
    ids = torch.randint(3, END, (2, 24), generator=draw)
    if name == "clip_text":
        ids[:, 0], ids[0, 11], ids[1, 17] = 1, END, END
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask}
