"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x and SDXL, whose attention sits in Transformer2DModels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..plan import Plan
from .base import Args, Family, Kwargs, Run, register_family


@register_family
class UNetFamily(Family):
    """Runs are the BasicTransformerBlocks of one Transformer2DModel; levels are the UNet's resolutions."""

    name = "unet"
    classes = ("UNet2DConditionModel",)
    sample_name = "sample"

    def runs(self, model: Any) -> list[Run]:
        down, up = list(model.down_blocks), list(model.up_blocks)
        stages = [(f"down_blocks.{i}", block, i) for i, block in enumerate(down)]
        stages.append(("mid_block", model.mid_block, len(down) - 1))
        stages += [(f"up_blocks.{i}", block, len(up) - 1 - i) for i, block in enumerate(up)]
        runs = []
        for stage, holder, level in stages:
            for i, transformer in enumerate(getattr(holder, "attentions", None) or []):
                blocks = getattr(transformer, "transformer_blocks", None)
                # Attention on 4-D maps (SimpleCrossAttn stages) has no token blocks to shrink.
                if not blocks or not getattr(transformer, "is_input_continuous", False):
                    continue
                name = f"{stage}.attentions.{i}.transformer_blocks"
                runs.append(
                    Run(name, level, tuple((f"{name}.{j}", b) for j, b in enumerate(blocks)))
                )
        return runs

    def attentions(self, block: Any) -> dict[str, nn.Module]:
        return {} if block.only_cross_attention else {"attn1": block.attn1}

    def grids(self, model: Any, sample: Tensor) -> dict[int, TokenGrid]:
        height, width = sample.shape[-2:]
        grids = {}
        for level in range(len(model.down_blocks)):
            grids[level] = TokenGrid(height, width)
            # The stride-2 convolution rounds odd sides up when it pads by 1, down otherwise.
            pad = int(model.config.downsample_padding == 1)
            height, width = max(1, (height + pad) // 2), max(1, (width + pad) // 2)
        return grids

    def attention_inputs(
        self, block: Any, x: Tensor, args: Args, kwargs: Kwargs
    ) -> dict[str, Tensor]:
        if (
            block.norm_type not in ("layer_norm", "layer_norm_i2vgen")
            or block.pos_embed is not None
        ):
            raise ValueError(
                f"context 'fresh' does not know norm_type {block.norm_type!r} in a UNet's block; "
                "use context 'cached' or 'none'"
            )
        return {"attn1": block.norm1(x)}

    def refusal(self, scope: str, kwargs: Kwargs) -> str | None:
        extra = kwargs.get("cross_attention_kwargs") or {}
        if scope == "attention" or "ip_adapter_masks" not in extra:
            return None
        return (
            f"ip_adapter_masks need the whole grid in the cross-attention, which scope {scope!r} "
            "shrinks; use scope='attention'"
        )

    def follow(self, args: Args, kwargs: Kwargs, plan: Plan, context: str) -> tuple[Args, Kwargs]:
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        # A mask over self-attention keys [B, 1, N]; with a context all N keys are still there.
        if mask is None or context != "none":
            return args, kwargs
        kept = plan.kept[:, None].expand(-1, mask.shape[1], -1)
        mask = torch.gather(mask.expand(plan.kept.shape[0], -1, -1), 2, kept)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

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
