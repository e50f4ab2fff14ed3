"""What joint transformers share whose positions of the image are one table, without a batch axis."""

from __future__ import annotations

from torch import Tensor

from ..tokens.plan import Plan
from .base import Family, Kwargs, positions_given, shared_rows


class TableFamily(Family):
    """One stack of joint blocks with an attention `attn1`; text stands first in it, and has no position."""

    sample_name = "hidden_states"
    rotary = True
    shared_positions = True

    def slice_block_arguments(
        self, kwargs: Kwargs, plan: Plan, keys_values: str, removed: Tensor | None
    ) -> Kwargs:
        table = kwargs.get("image_rotary_emb")
        if table is None:
            return kwargs
        given = positions_given(plan, removed)
        return {**kwargs, "image_rotary_emb": tuple(shared_rows(part, given) for part in table)}
