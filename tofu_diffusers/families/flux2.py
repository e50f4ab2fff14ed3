"""Flux2Transformer2DModel: FLUX.2 and FLUX.2 Klein, whose blocks are all given one modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Kwargs, register_family
from .flux import TextInSequenceFamily, packed_example


@register_family
class Flux2Family(TextInSequenceFamily):
    """Joint blocks, then single blocks on one sequence, which project it once for everything."""

    name = "flux2"
    classes = ("Flux2Transformer2DModel",)
    args_between_blocks = ()
    keys_values_refused = ("fresh",)
    refused_because = "its single blocks project keys and values together with all else"

    def widths(self, attention: Any) -> tuple[int, int]:
        return attention.query_dim, attention.inner_dim

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        joint = hasattr(block, "norm1")
        modulation = kwargs["temb_mod_img" if joint else "temb_mod"]
        normed = (block.norm1 if joint else block.norm)(x)
        shift, scale, *_ = modulation.view(len(modulation), 1, -1).split(x.shape[-1], dim=-1)
        return {"attn": (1 + scale) * normed + shift}

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        mode = named.get("kv_cache_mode")
        if mode is None:
            return None
        return (
            f"kv_cache_mode {mode!r} keeps keys and values of references from the first step on, where they "
            "stand before the image; take Flux2KleinPipeline, which runs them at every step, or skip steps "
            "instead (speedup=2.0)"
        )

    def example(self, model: Any) -> Kwargs:
        kwargs = packed_example(model, axes=4)
        if model.config.guidance_embeds:
            kwargs["guidance"] = torch.empty(2, device="meta")
        return kwargs
