"""Hunyuan's pictures and videos: joint attention over the image, then the text, with a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import (
    TEXT,
    Family,
    Kwargs,
    MaskedText,
    cut_mask,
    positions_given,
    register_family,
    shared_rows,
)


class HunyuanFamily(Family):
    """Joint blocks, then single blocks where there are any; the image stands first in both."""

    sample_name = "hidden_states"
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    attention_names = ("attn",)
    guidance_in_batch = False
    rotary = True
    shared_positions = True
    image_first = True

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        config, sides = model.config, self.sample(named).shape[2:]
        patch = config.patch_size
        if isinstance(patch, int):
            patch = (config.patch_size_t, patch, patch)
        *frames, height, width = (side // cut for side, cut in zip(sides, patch, strict=True))
        return {0: TokenGrid(height, width, *frames)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        return {"attn": norm(x, emb=kwargs["temb"])[0]}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given = positions_given(plan, removed)
        sliced = dict(kwargs)
        for name in ("image_rotary_emb", "freqs_cis"):
            if kwargs.get(name) is not None:
                sliced[name] = tuple(shared_rows(part, given) for part in kwargs[name])
        mask = kwargs.get("attention_mask")
        # HunyuanVideo 1.5 gives a mask of the text alone, to which the attention adds the image.
        if mask is not None and mask.ndim == 4 and keys_values != "cached":
            sliced["attention_mask"] = cut_mask(mask, plan.assign.shape[1], given, first=True)
        return sliced

    def arguments_of_image(self, kwargs: Kwargs, row: int, batch: int) -> Kwargs:
        shared = {name: kwargs[name] for name in ("freqs_cis",) if name in kwargs}
        return super().arguments_of_image(kwargs, row, batch) | shared


GLYPHS = MaskedText("encoder_hidden_states_2", "encoder_attention_mask_2")
"""The words that are to be written, letter by letter; often none."""


@register_family
class HunyuanVideoFamily(HunyuanFamily):
    """HunyuanVideoTransformer3DModel. A first frame that is given (token_replace) is never removed."""

    name = "hunyuan_video"
    classes = ("HunyuanVideoTransformer3DModel",)
    # Blocks see as many tokens as the mask has ones, from the first on, wherever those are.
    texts = (TEXT,)

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        grid = super().grids(model, named)[0]
        if model.config.image_condition_type != "token_replace":
            return {0: grid}
        first = grid.height * grid.width
        return {0: TokenGrid(grid.height, grid.width, grid.frames - 1, text_before=first)}

    def prediction(self, out: Tensor, grid: TokenGrid) -> Tensor:
        return out[:, :, self._given(out, grid) :]

    def with_prediction(self, out: Tensor, grid: TokenGrid, maps: Tensor) -> Tensor:
        return torch.cat([out[:, :, : self._given(out, grid)], maps], dim=2)

    def _given(self, out: Tensor, grid: TokenGrid) -> int:
        """Frames of an output that are given."""
        return out.shape[2] * grid.text_before // grid.total

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        replaced = kwargs.get("token_replace_emb")
        if replaced is None:
            return super().attention_inputs(block, x, kwargs)
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        return {"attn": norm(x, kwargs["temb"], replaced, kwargs["num_tokens"])[0]}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        # Asked of removed tokens only, and those of the first frame are all kept.
        return {**kwargs, "num_tokens": 0} if "num_tokens" in kwargs else kwargs

    def example(self, model: Any) -> Kwargs:
        config = model.config
        video = (2, config.in_channels, 33, 90, 160)  # 129 frames of 720 x 1280 pixels
        text = 256
        return {
            "hidden_states": torch.empty(video, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, text, config.text_embed_dim, device="meta"),
            "encoder_attention_mask": torch.empty(2, text, device="meta"),
            "pooled_projections": torch.empty(2, config.pooled_projection_dim, device="meta"),
            "guidance": torch.empty(2, device="meta") if config.guidance_embeds else None,
        }


@register_family
class FramepackFamily(HunyuanFamily):
    """HunyuanVideoFramepackTransformer3DModel: frames made before stand before those of the window."""

    name = "hunyuan_framepack"
    classes = ("HunyuanVideoFramepackTransformer3DModel",)
    texts = (TEXT,)

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        # (frames, height and width) of a token of each part, which is padded to whole ones.
        parts = {
            "latents_clean": (1, 2),
            "latents_history_2x": (2, 4),
            "latents_history_4x": (4, 8),
        }
        before = 0
        for name, (depth, side) in parts.items():
            latents = named.get(name)
            if latents is not None and named.get(f"indices_{name}") is not None:
                frames, height, width = latents.shape[2:]
                before += -(-frames // depth) * -(-height // side) * -(-width // side)
        return {0: replace(super().grids(model, named)[0], text_before=before)}

    def example(self, model: Any) -> Kwargs:
        config = model.config
        # 33 frames of 640 x 640 pixels, and 1, 2 and 16 latents of those before.
        frames = {"": 9, "_clean": 2, "_history_2x": 2, "_history_4x": 16}
        kwargs: Kwargs = {
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, 256, config.text_embed_dim, device="meta"),
            "encoder_attention_mask": torch.empty(2, 256, device="meta"),
            "pooled_projections": torch.empty(2, config.pooled_projection_dim, device="meta"),
            "image_embeds": torch.empty(2, 729, config.image_proj_dim, device="meta"),
            "guidance": torch.empty(2, device="meta") if config.guidance_embeds else None,
        }
        for name, count in frames.items():
            video = torch.empty(2, config.in_channels, count, 80, 80, device="meta")
            kwargs[f"latents{name}" if name else "hidden_states"] = video
            kwargs[f"indices_latents{name}"] = torch.empty(count, device="meta")
        return kwargs


@register_family
class HunyuanImageFamily(HunyuanFamily):
    """HunyuanImageTransformer2DModel: the base, distilled and refining models."""

    name = "hunyuan_image"
    classes = ("HunyuanImageTransformer2DModel",)
    # Its refiner shows the first token to all, masked or not.
    texts = (TEXT, GLYPHS)

    def example(self, model: Any) -> Kwargs:
        config = model.config
        sides = [64] * len(config.patch_size)  # 2048 x 2048 pixels
        text = 1000
        sides[:-2] = [1] * (len(sides) - 2)
        kwargs = {
            "hidden_states": torch.empty(2, config.in_channels, *sides, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "encoder_hidden_states": torch.empty(2, text, config.text_embed_dim, device="meta"),
            "encoder_attention_mask": torch.empty(2, text, device="meta"),
            "guidance": torch.empty(2, device="meta") if config.guidance_embeds else None,
        }
        if config.use_meanflow:
            kwargs["timestep_r"] = torch.empty(2, device="meta")
        return kwargs


@register_family
class HunyuanVideo15Family(HunyuanFamily):
    """HunyuanVideo15Transformer3DModel: joint blocks only."""

    name = "hunyuan_video_1_5"
    classes = ("HunyuanVideo15Transformer3DModel",)
    stacks = ("transformer_blocks",)
    # Without a picture to begin with its place is taken by zeros, under a mask of the denoiser's own.
    texts = (TEXT, GLYPHS, MaskedText("image_embeds", None))

    def example(self, model: Any) -> Kwargs:
        config = model.config
        video = (2, config.in_channels, 31, 30, 53)  # 121 frames of 480 x 848 pixels
        texts = {"": (1000, config.text_embed_dim), "_2": (256, config.text_embed_2_dim)}
        return {
            "hidden_states": torch.empty(video, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "image_embeds": torch.empty(2, 729, config.image_embed_dim, device="meta"),
            **{
                f"encoder_hidden_states{number}": torch.empty(2, *sides, device="meta")
                for number, sides in texts.items()
            },
            **{
                f"encoder_attention_mask{number}": torch.empty(2, length, device="meta")
                for number, (length, _) in texts.items()
            },
        }
