"""BriaTransformer2DModel and BriaFiboTransformer2DModel: FLUX blocks, and guidance in one batch."""

from __future__ import annotations

from typing import Any

import torch

from .base import Kwargs, register_family
from .flux import FluxFamily, TextInSequenceFamily, packed_example


@register_family
class BriaFamily(FluxFamily):
    """Joint blocks, then single blocks, of Bria 3."""

    name = "bria"
    classes = ("BriaTransformer2DModel",)
    guidance_in_batch = True
    timestep_scale = 1.0

    def example(self, model: Any) -> Kwargs:
        return packed_example(model)


@register_family
class BriaFiboFamily(TextInSequenceFamily):
    """Every block is given half of the text's channels anew; the tokens stay where they are."""

    name = "bria_fibo"
    classes = ("BriaFiboTransformer2DModel",)
    args_between_blocks = ()
    guidance_in_batch = True
    timestep_scale = 1.0

    def example(self, model: Any) -> Kwargs:
        kwargs = packed_example(model)
        text = kwargs["encoder_hidden_states"].shape[1]
        layer = torch.empty(2, text, model.config.text_encoder_dim, device="meta")
        return {**kwargs, "text_encoder_layers": [layer] * len(model.caption_projection)}
