"""WanVACETransformer3DModel: Wan with control by videos, masks and pictures."""

from __future__ import annotations

from typing import Any

import torch

from .base import Kwargs, register_family
from .wan import WanFamily


@register_family
class WanVACEFamily(WanFamily):
    """The blocks of Wan; those of the control, one to five of these, see all tokens.

    What they say is added between blocks, so that spans of them do not exist.
    """

    name = "wan_vace"
    classes = ("WanVACETransformer3DModel",)
    args_between_blocks = ("control_hidden_states",)

    def example(self, model: Any) -> Kwargs:
        kwargs = super().example(model)
        _, _, *sides = kwargs["hidden_states"].shape
        control = torch.empty(2, model.config.vace_in_channels, *sides, device="meta")
        return {**kwargs, "control_hidden_states": control}
