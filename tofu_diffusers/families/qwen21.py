"""QwenImage21Transformer2DModel: Qwen-Image 2.1, one sequence whose text and references can be remembered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan
from .base import Kwargs, register_family
from .sequence import SequenceFamily


class RowOfCache:
    """A layer's remembered keys and values, for one row of the batch after another."""

    def __init__(self, layer: Any, row: int) -> None:
        self.layer, self.row = layer, row

    def store(self, *rows: Tensor) -> None:
        """Add those of this row to those of the rows before it."""
        before = self.layer.get() if self.row else (rows[0][:0], rows[1][:0])
        self.layer.store(*(torch.cat(pair) for pair in zip(before, rows, strict=True)))

    def get(self) -> tuple[Tensor, ...]:
        """Those of this row."""
        return tuple(rows[self.row : self.row + 1] for rows in self.layer.get())


@register_family
class QwenImage21Family(SequenceFamily):
    """One stack of all blocks. What stands before the image does not see it.

    Pipelines give the whole sequence in the first step alone, whose keys and values of what stands before the
    image are kept, and the image by itself later.
    """

    name = "qwen21"
    classes = ("QwenImage21Transformer2DModel",)
    sample_name = "hidden_states"
    attention_names = ("attn",)
    read_names = ("img_mask", "encoder_hidden_states_mask")
    cache_names = ("kv_cache",)
    latents_are_tokens = True
    returns_sequence = True
    guidance_in_batch = False
    timestep_scale = 1e-3
    shared_positions = True
    rotary_names = ("rotary_emb",)
    mask_names = ("attention_mask", "key_valid")

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        *references, (frames, height, width) = named["img_shapes"][0]
        if named.get("kv_cache_mode") == "cached":
            return {0: TokenGrid(height, width, frames)}
        seen = sum(f * h * w for f, h, w in references)
        # In the text a place stands for 4 tokens of a reference.
        text = named["encoder_hidden_states"].shape[1] - seen // 4
        return {0: TokenGrid(height, width, frames, text_before=text + seen)}

    def attention_inputs(self, block: Any, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        modulation = kwargs["modulation"].chunk(2, dim=-1)[0]
        mask = kwargs.get("target_token_mask")
        return {"attn": block._modulate(block.img_norm1(x), modulation, mask)[0]}

    def slice_per_token(self, kwargs: Kwargs, positions: Tensor) -> Kwargs:
        mask = kwargs.get("target_token_mask")
        if mask is None:
            return kwargs
        return {**kwargs, "target_token_mask": mask[positions[0]]}

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        mask, segments = kwargs.get("attention_mask"), kwargs.get("segments")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(
                "QwenImage21FlexAttnProcessor has a mask of all tokens; use QwenImage21AttnProcessor, or "
                "keep use_kv_cache=True and let the first step compute all tokens (warmup_steps=1)"
            )
        if segments is not None and keys_values != "dropped":
            # A product a segment has no place for the keys of removed tokens; one with a mask does.
            mask = self._mask(segments, kwargs["key_valid"], kwargs["rotary_emb"])
            kwargs = {**kwargs, "segments": None, "key_valid": None, "attention_mask": mask}
        return super().slice_block_arguments(kwargs, plan, keys_values, removed)

    def arguments_of_image(self, kwargs: Kwargs, row: int, batch: int) -> Kwargs:
        own = {**super().arguments_of_image(kwargs, row, batch), "rotary_emb": kwargs["rotary_emb"]}
        modulation, layer = kwargs.get("modulation"), kwargs.get("layer_cache")
        if modulation is not None and len(modulation) == batch + 1:  # the last is of the text
            own["modulation"] = modulation[[row, -1]]
        if layer is not None:
            own["layer_cache"] = RowOfCache(layer, row)
        return own

    def example(self, model: Any) -> Kwargs:
        config = model.config
        side, text = 64, 128  # 1024 x 1024 pixels
        return {
            "hidden_states": torch.empty(2, side * side, config.in_channels, device="meta"),
            "encoder_hidden_states": torch.empty(2, text, config.context_in_dim, device="meta"),
            "timestep": torch.empty(2, device="meta"),
            "img_shapes": [[(1, side, side)]] * 2,
            "img_mask": torch.arange(text + side * side // 4).expand(2, -1) >= text,
        }

    @staticmethod
    def _mask(segments: list[Any], valid: Tensor | None, positions: Tensor) -> Tensor:
        """Which keys each query sees, where segments have products of their own.  -> [1 or B, 1, S, S]."""
        tokens, device = positions.shape[0], positions.device
        key = torch.arange(tokens, device=device)
        ends = torch.full_like(key, tokens)
        for start, end, is_text in segments:
            ends[start:end] = key[start:end] + 1 if is_text else end
        seen = (key < ends[:, None])[None, None]
        return seen if valid is None else seen & valid[:, None, None]
