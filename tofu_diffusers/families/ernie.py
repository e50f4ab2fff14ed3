"""ErnieImageTransformer2DModel: ERNIE-Image, one sequence of image, then text, with tokens before rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from .base import Kwargs, patch_grid, register_family
from .sequence import SequenceFamily


@register_family
class ErnieFamily(SequenceFamily):
    """One stack of all blocks. They take their tokens as `x` [S, B, C], their attentions as [B, S, C].

    Modulation is shared by blocks and by tokens, for each of which it is written out.
    """

    name = "ernie"
    classes = ("ErnieImageTransformer2DModel",)
    sample_name = "hidden_states"
    stacks = ("layers",)
    attention_names = ("self_attention",)
    rotary_names = ("rotary_pos_emb", "image_rotary_emb")

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        grid = patch_grid(model, self.sample(named))[0]
        return {0: TokenGrid(grid.height, grid.width, text_after=named["text_bth"].shape[1])}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        shift, scale = (part[: x.shape[1]].transpose(0, 1).float() for part in kwargs["temb"][:2])
        return {"self_attention": (block.adaLN_sa_ln(x).float() * (1 + scale) + shift).to(x.dtype)}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        temb = kwargs.get("temb")
        if temb is None:
            return kwargs
        return {**kwargs, "temb": [part[: positions.shape[1]] for part in temb]}

    def hidden(self, kwargs: Kwargs) -> Tensor:
        tokens: Tensor = kwargs["x"].transpose(0, 1) if "x" in kwargs else kwargs["hidden_states"]
        return tokens

    def with_hidden(self, kwargs: Kwargs, x: Tensor) -> Kwargs:
        if "x" not in kwargs:
            return {**kwargs, "hidden_states": x}
        return {**kwargs, "x": x.transpose(0, 1)}

    def output(self, out: Any) -> Tensor:
        tokens: Tensor = out.transpose(0, 1)
        return tokens

    def with_output(self, out: Any, x: Tensor, kwargs: Kwargs) -> Any:
        return x.transpose(0, 1)

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64 * config.patch_size, 128  # 1024 x 1024 pixels
        return {
            "hidden_states": torch.empty(2, config.in_channels, side, side, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "text_bth": torch.empty(2, text, config.text_in_dim, device="meta"),
            "text_lens": torch.full((2,), text),
        }
