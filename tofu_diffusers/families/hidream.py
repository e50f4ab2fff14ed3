"""HiDreamImageTransformer2DModel: HiDream-I1, image first, with a text of its own for every block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import (
    Family,
    Kwargs,
    gather_rows,
    patch_grid,
    positions_given,
    register_family,
)


@register_family
class HiDreamFamily(Family):
    """Joint blocks, then blocks on one sequence. Attentions have another name for their tokens than blocks.

    An image that is not square is padded to the longest sequence; padding is never removed.
    """

    name = "hidream"
    classes = ("HiDreamImageTransformer2DModel",)
    sample_name = "hidden_states"
    stacks = ("double_stream_blocks", "single_stream_blocks")
    one_grid = False
    timestep_name = "timesteps"
    rotary = True
    image_first = True

    def splits_stacks(self, named: Kwargs) -> str | None:
        return "a text for every block"

    def attentions(self, block: Any) -> dict[str, nn.Module]:
        return {"attn1": block.block.attn1}

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        sample = self.sample(named)
        grid = patch_grid(model, sample)[0]
        square = sample.shape[-2] == sample.shape[-1]
        padding = 0 if square else model.max_seq - grid.tokens
        # Of the language model, states of its last layer and of the block's own.
        texts = (named["encoder_hidden_states_t5"], *[named["encoder_hidden_states_llama3"][0]] * 2)
        text = sum(each.shape[1] for each in texts)
        return {
            0: replace(grid, text_after=padding),
            1: replace(grid, text_after=padding + text),
        }

    def refusal(self, scope: str, named: Kwargs) -> str | None:
        if named.get("hidden_states_masks") is None:
            return None
        return (
            "hidden_states_masks come with patches in place of latents, whose grids may differ from row to "
            "row; give latents [B, C, H, W], or skip steps instead (speedup=2.0)"
        )

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        modulation = block.block.adaLN_modulation(kwargs["temb"])[:, None]
        shift, scale = modulation[..., : 2 * x.shape[-1]].chunk(2, dim=-1)
        return {"attn1": block.block.norm1_i(x) * (1 + scale) + shift}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given, tokens = positions_given(plan, removed), plan.assign.shape[1]
        table, mask = kwargs["image_rotary_emb"], kwargs.get("hidden_states_masks")
        # In joint blocks it goes on with the text.
        rotary = torch.cat([gather_rows(table[:, :tokens], given), table[:, tokens:]], dim=1)
        if mask is not None:  # of the attention's own keys, before the product
            mask = gather_rows(mask, given)
        return {**kwargs, "image_rotary_emb": rotary, "hidden_states_masks": mask}

    def hidden(self, kwargs: Kwargs) -> Tensor:
        tokens: Tensor = kwargs[self._name(kwargs)]
        return tokens

    def with_hidden(self, kwargs: Kwargs, x: Tensor) -> Kwargs:
        return {**kwargs, self._name(kwargs): x}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, layers = 64 * config.patch_size, max(config.llama_layers) + 1
        pooled, (t5, llama) = config.text_emb_dim, config.caption_channels
        return {
            "hidden_states": torch.empty(2, config.in_channels, side, side, device="meta"),
            "timesteps": torch.empty(2, device="meta"),
            "encoder_hidden_states_t5": torch.empty(2, 128, t5, device="meta"),
            "encoder_hidden_states_llama3": torch.empty(layers, 2, 128, llama, device="meta"),
            "pooled_embeds": torch.empty(2, pooled, device="meta"),
        }

    @staticmethod
    def _name(kwargs: Kwargs) -> str:
        return "hidden_states" if "hidden_states" in kwargs else "norm_hidden_states"
