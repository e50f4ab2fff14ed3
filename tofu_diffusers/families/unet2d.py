"""UNet2DModel: unconditional UNets (DDPM, DDIM), whose attention works on maps [B, C, H, W]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tokens.grid import TokenGrid
from .base import BlockStack, Family, Kwargs, register_family
from .stages import stage_grids, stages


@register_family
class UNet2DFamily(Family):
    """A site is an attention with its group norm and residual inside; between two stand convolutions."""

    name = "unet2d"
    classes = ("UNet2DModel",)
    sample_name = "sample"
    guidance_in_batch = False
    blocks_are_attentions = True

    def block_stacks(self, model: Any) -> list[BlockStack]:
        return [
            BlockStack(
                f"{stage}.attentions.{i}", resolution, ((f"{stage}.attentions.{i}", attention),)
            )
            for stage, holder, resolution in stages(model)
            for i, attention in enumerate(getattr(holder, "attentions", None) or [])
            if attention is not None
        ]

    def attentions(self, block: nn.Module) -> dict[str, nn.Module]:
        return {"self": block}

    def norms(self, block: Any) -> list[nn.GroupNorm]:
        return [] if block.group_norm is None else [block.group_norm]

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return stage_grids(model, self.sample(named))

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        if block.spatial_norm is not None:
            raise ValueError(
                "keys_values 'fresh' does not know the spatial norm of this UNet's attention; "
                "use keys_values 'cached' or 'dropped'"
            )
        normed = x if block.group_norm is None else block.group_norm(x.transpose(1, 2)).mT
        return {"self": normed}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        size = config.sample_size if config.sample_size is not None else 32
        height, width = (size, size) if isinstance(size, int) else size
        kwargs: Kwargs = {
            "sample": torch.empty(2, config.in_channels, height, width, device="meta"),
            "timestep": torch.empty((), device="meta"),
        }
        if model.class_embedding is not None:
            kwargs["class_labels"] = torch.empty(2, dtype=torch.int64, device="meta")
        return kwargs

    def hidden(self, kwargs: Kwargs) -> Tensor:
        return as_tokens(kwargs["hidden_states"])

    def output(self, out: Tensor) -> Tensor:
        return as_tokens(out)

    def with_output(self, out: Tensor, x: Tensor, kwargs: Kwargs) -> Tensor:
        return x.mT.reshape(kwargs["hidden_states"].shape)


def as_tokens(x: Tensor) -> Tensor:
    """A map as tokens; tokens stay as they are.  [B, C, H, W] -> [B, H * W, C]."""
    return x.flatten(2).mT if x.ndim == 4 else x
