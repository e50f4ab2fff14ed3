"""What UNets share: the order of their stages and the grid of every resolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..tokens.grid import TokenGrid


def stages(model: Any) -> list[tuple[str, nn.Module, int]]:
    """(name, module, resolution) of every stage, in the order of execution; 0 is the finest."""
    down, up = list(model.down_blocks), list(model.up_blocks)
    return [
        *((f"down_blocks.{i}", block, i) for i, block in enumerate(down)),
        ("mid_block", model.mid_block, len(down) - 1),
        *((f"up_blocks.{i}", block, len(up) - 1 - i) for i, block in enumerate(up)),
    ]


def stage_grids(model: Any, sample: Tensor) -> dict[int, TokenGrid]:
    """The grid of every resolution, of latents [B, C, H, W]."""
    height, width = sample.shape[-2:]
    grids = {}
    for resolution in range(len(model.down_blocks)):
        grids[resolution] = TokenGrid(height, width)
        # The stride-2 convolution rounds odd sides up when it pads by 1, down otherwise.
        pad = int(model.config.get("downsample_padding", 1) == 1)
        height, width = max(1, (height + pad) // 2), max(1, (width + pad) // 2)
    return grids
