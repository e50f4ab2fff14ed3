"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x and SDXL, whose attention sits in Transformer2DModels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..tokens.grid import TokenGrid
from .base import BlockStack, Kwargs, register_family
from .basic import BasicFamily
from .stages import stage_grids, stages


@register_family
class UNetFamily(BasicFamily):
    """A stack is the BasicTransformerBlocks of one Transformer2DModel; stages have a resolution each."""

    name = "unet"
    classes: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel",)
    sample_name = "sample"

    def block_stacks(self, model: Any) -> list[BlockStack]:
        stacks = []
        for stage, holder, resolution in stages(model):
            for i, transformer in enumerate(getattr(holder, "attentions", None) or []):
                blocks = getattr(transformer, "transformer_blocks", None)
                # Attention on 4-D maps (SimpleCrossAttn stages) has no token blocks to shrink.
                if not blocks or not getattr(transformer, "is_input_continuous", False):
                    continue
                name = f"{stage}.attentions.{i}.transformer_blocks"
                stacks.append(BlockStack.of(model, name, resolution))
        return stacks

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return stage_grids(model, self.sample(named))

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size if config.sample_size is not None else 64
        height, width = (size, size) if isinstance(size, int) else size
        width_of_text = config.cross_attention_dim
        if not isinstance(width_of_text, int):
            width_of_text = width_of_text[-1]
        kwargs: Kwargs = {
            "sample": torch.empty(2, config.in_channels, height, width, device="meta"),
            "timestep": torch.empty((), device="meta"),
            "encoder_hidden_states": torch.empty(2, 77, width_of_text, device="meta"),
        }
        if config.addition_embed_type == "text_time":
            pooled = (
                config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            )
            kwargs["added_cond_kwargs"] = {
                "text_embeds": torch.empty(2, pooled, device="meta"),
                "time_ids": torch.empty(2, 6, device="meta"),
            }
        return kwargs
