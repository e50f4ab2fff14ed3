"""What families share whose blocks run on one sequence of image and text, given to attentions whole."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.utils._pytree import tree_map

from ..tokens.plan import Plan
from .base import Family, Kwargs, cut_mask, gather_rows, positions_given, shared_rows


class SequenceFamily(Family):
    """Positions and masks of a block cover the whole sequence, and follow the kept tokens alike."""

    rotary = True
    rotary_names: ClassVar[tuple[str, ...]] = ("image_rotary_emb",)
    """Arguments of both that are positions: [B, S, ...], or [S, ...] where rows of the batch share them."""
    mask_names: ClassVar[tuple[str, ...]] = ("attention_mask",)
    """Arguments of both that are masks: [B, S] or [B, 1, 1 or S, S], maybe with other keys in front."""

    def widths(self, attention: Any) -> tuple[int, int]:
        # At the product keys are repeated for the heads that share them.
        return int(attention.to_q.in_features), int(attention.to_q.out_features)

    def heads(self, attention: Any) -> int:
        return int(getattr(attention, "num_heads", None) or attention.heads)

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        given = positions_given(plan, removed)

        rows = shared_rows if self.shared_positions else gather_rows
        changed = self.slice_per_token(kwargs, plan.kept)
        for name in self.rotary_names:
            if kwargs.get(name) is not None:
                changed = {
                    **changed,
                    name: tree_map(lambda table: rows(table, given), kwargs[name]),
                }
        # Remembered keys are those of all tokens.
        for name in self.mask_names if keys_values != "cached" else ():
            mask = kwargs.get(name)
            if mask is not None:
                changed = {**changed, name: cut_mask(mask, plan.assign.shape[1], given)}
        return changed
