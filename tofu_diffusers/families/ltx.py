"""LTXVideoTransformer3DModel and LTX2VideoTransformer3DModel: LTX videos, the second with sound."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import (
    Family,
    Kwargs,
    gather_rows,
    padded_by_attention,
    positions_given,
    register_family,
)


@register_family
class LTXFamily(Family):
    """One stack of all blocks on packed latents, with a timestep for every token where a picture is given."""

    name = "ltx"
    classes = ("LTXVideoTransformer3DModel",)
    sample_name = "hidden_states"
    latents_are_tokens = True
    rotary = True
    per_token: ClassVar[tuple[str, ...]] = ("temb",)
    """A block's arguments with one row, or one a token."""
    rotations: ClassVar[tuple[str, ...]] = ("image_rotary_emb",)
    """Positions of the tokens, of blocks and of their attentions."""

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        tokens = self.sample(named).shape[1]
        sides: list[Any] = [named.get(name) for name in ("height", "width", "num_frames")]
        # Pipelines with video_coords leave the sides out, or give 1, and may put pictures in front.
        if None in sides or sides[0] * sides[1] * sides[2] != tokens:
            return {0: TokenGrid(1, tokens)}
        return {0: TokenGrid(*sides)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        table, temb = block.scale_shift_table, kwargs["temb"]
        modulation = table[None, None] + temb.reshape(*temb.shape[:2], len(table), -1)
        shift, scale = modulation[:, :, 0], modulation[:, :, 1]
        return {"attn1": block.norm1(x) * (1 + scale) + shift}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        rows = {name: kwargs[name] for name in self.per_token if name in kwargs}
        return kwargs | {
            name: gather_rows(each, positions) for name, each in rows.items() if each.shape[1] > 1
        }

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given = positions_given(plan, removed)
        tables = {name: kwargs[name] for name in self.rotations if kwargs.get(name) is not None}
        return self.slice_per_token(kwargs, plan.kept) | {
            name: tuple(at(part, given) for part in table) for name, table in tables.items()
        }

    def example(self, model: Any) -> Kwargs:
        config = model.config
        frames, height, width = 21, 15, 22  # 161 frames of 480 x 704 pixels
        return {
            "hidden_states": torch.empty(
                2, frames * height * width, config.in_channels, device="meta"
            ),
            "encoder_hidden_states": torch.empty(2, 128, config.caption_channels, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_attention_mask": torch.empty(2, 128, device="meta"),
            "num_frames": frames,
            "height": height,
            "width": width,
        }


@register_family
class LTX2Family(LTXFamily):
    """The same of the pictures; the sound beside them keeps all its tokens, and listens to theirs."""

    name = "ltx2"
    classes = ("LTX2VideoTransformer3DModel",)
    keys_values_refused = ("fresh",)
    refused_because = "the sound listens to tokens in the middle of a block"
    per_token = ("temb", "temb_ca_scale_shift", "temb_ca_gate")
    rotations = ("video_rotary_emb", "ca_video_rotary_emb", "query_rotary_emb")

    def listeners(self, block: Any) -> dict[str, nn.Module]:
        return {"video_to_audio_attn": block.video_to_audio_attn}

    def leaves_product_out(self, kwargs: Kwargs) -> bool:
        return bool(kwargs.get("all_perturbed"))

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        grid = TokenGrid(named["height"], named["width"], named["num_frames"])
        # References and keyframes come behind.
        after = self.sample(named).shape[1] - grid.tokens
        return {0: TokenGrid(grid.height, grid.width, grid.frames, text_after=after)}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        name = "attention_mask" if "attention_mask" in kwargs else "self_attention_mask"
        mask = kwargs.get(name)
        kwargs = super().slice_block_arguments(kwargs, plan, keys_values, removed)
        if mask is None:
            return kwargs
        if keys_values == "cached":
            raise padded_by_attention("video_self_attention_mask")
        seen = gather_rows(gather_rows(mask, plan.kept).mT, plan.kept).mT
        return {**kwargs, name: seen}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        frames, height, width, sound = 16, 16, 24, 126  # 121 frames of 512 x 768 pixels
        video, audio = config.caption_channels, config.caption_channels
        if not config.use_prompt_embeddings:
            video, audio = config.cross_attention_dim, config.audio_cross_attention_dim
        return {
            "hidden_states": torch.empty(
                2, frames * height * width, config.in_channels, device="meta"
            ),
            "audio_hidden_states": torch.empty(2, sound, config.audio_in_channels, device="meta"),
            "encoder_hidden_states": torch.empty(2, 1024, video, device="meta"),
            "audio_encoder_hidden_states": torch.empty(2, 1024, audio, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "sigma": torch.empty(2, device="meta"),
            "num_frames": frames,
            "height": height,
            "width": width,
            "audio_num_frames": sound,
        }


def at(table: Tensor, positions: Tensor) -> Tensor:
    """The rotations of these positions.  [1 or B, N, C] or [1 or B, H, N, D], [B, M] -> .. of M."""
    if table.ndim == 4:
        return gather_rows(table.transpose(1, 2), positions).transpose(1, 2)
    return gather_rows(table, positions)
