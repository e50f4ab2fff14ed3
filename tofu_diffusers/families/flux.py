"""FluxTransformer2DModel: FLUX.1, its fill, control and Kontext relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import BlockStack, Family, Kwargs, positions_given, register_family


@register_family
class FluxFamily(Family):
    """Joint blocks, then single blocks; text stands first in the attention of both.

    Reference images of an edit come after the image's own tokens and are never removed.
    """

    name = "flux"
    classes = ("FluxTransformer2DModel",)
    sample_name = "hidden_states"
    latents_are_tokens = True
    ids_name = "img_ids"
    output_index = 1
    args_between_blocks = ("controlnet_block_samples", "controlnet_single_block_samples")
    guidance_in_batch = False
    timestep_scale = 1e-3
    rotary = True
    shared_positions = True

    def block_stacks(self, model: Any) -> list[BlockStack]:
        return [
            BlockStack.of(model, "transformer_blocks"),
            BlockStack.of(model, "single_transformer_blocks"),
        ]

    def attentions(self, block: Any) -> dict[str, nn.Module]:
        return {"attn": block.attn}

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        ids = named["img_ids"]
        # (image, row, column) of each token; an edit's references are images 1 and up.
        image, row, column = (ids[0] if ids.ndim == 3 else ids)[:, :3].long().T.tolist()
        own = [i for i, number in enumerate(image) if number == image[0]]
        height = max(row[i] for i in own) - min(row[i] for i in own) + 1
        width = max(column[i] for i in own) - min(column[i] for i in own) + 1
        if height * width != len(own):
            raise ValueError(
                f"img_ids of {len(own)} tokens are no grid: {height} rows of {width} columns are "
                f"{height * width} tokens; give positions as FluxPipeline makes them, or ratio=0"
            )
        return {0: TokenGrid(height, width, text_after=len(image) - len(own))}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        return {"attn": norm(x, emb=kwargs["temb"])[0]}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        cos, sin = kwargs["image_rotary_emb"]
        # Positions have no batch axis: all rows of this call keep the same tokens.
        image = positions_given(plan, removed)[0]
        text = cos.shape[0] - plan.assign.shape[1]
        rows = torch.cat([torch.arange(text, device=image.device), image + text]).to(cos.device)
        return {**kwargs, "image_rotary_emb": (cos[rows], sin[rows])}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64, 512  # 1024 x 1024 pixels
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
        return {
            "hidden_states": torch.empty(2, side * side, config.in_channels, device="meta"),
            "encoder_hidden_states": torch.empty(
                2, text, config.joint_attention_dim, device="meta"
            ),
            "pooled_projections": torch.empty(2, config.pooled_projection_dim, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "img_ids": ids.float(),
            "txt_ids": torch.empty(text, 3, device="meta"),
            "guidance": torch.empty(2, device="meta") if config.guidance_embeds else None,
        }
