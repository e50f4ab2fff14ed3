"""Reads what shapes do not tell without making a step wait: at once where that is free, else later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..families.base import Family
from ..steps.reference import Reference
from ..tokens.grid import TokenGrid
from .call import Call
from .text_padding import version_of


class GridReader:
    """The token grids of a denoiser, and what is to be read once the step is over.

    Attributes:
        fixed: Grids to take whatever the arguments are; None: read them.
        known: What was read from positions in this generation.
        deferred_ids: Positions to be read when the step is over.
        deferred_latents: Latents to be compared then.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.fixed: dict[int, TokenGrid] | None = None
        self.known: dict[int, TokenGrid] | None = None
        self.deferred_ids: Tensor | None = None
        self.deferred_latents: Tensor | None = None
        self._read_from = (Reference(), 0)

    def start(self) -> None:
        """Forget what the last generation was read to be."""
        self.known = self.deferred_ids = self.deferred_latents = None

    def grids(
        self, model: Any, named: dict[str, Any], call: Call, ids: Tensor | None
    ) -> dict[int, TokenGrid]:
        """The grid of every resolution; where its numbers cannot be read now, a row of as many tokens.

        Args:
            ids: Positions as they were given (`Family.ids_name`), if it reads any.

        Raises:
            RuntimeError: if they cannot be read now and there is no step to wait for.
        """
        family = self.family
        if self.fixed is not None:
            return family.around(self.fixed, named)
        if family.ids_name is None or ids is None:
            return family.grids(model, named)
        if not torch.compiler.is_compiling():
            source, version = self._read_from
            if self.known is None or source() is not ids or version != version_of(ids):
                self.known = family.grids(None, {family.ids_name: ids})
                self._read_from = Reference(ids), version_of(ids)
            return family.around(self.known, named)
        if not call.step_known:
            raise RuntimeError(
                f"a compiled {type(model).__name__} must be told its steps, or it cannot be known which "
                "tokens are neighbours: call handle.step(i, n) before each step of a bare model, or "
                "apply tofu to the whole pipeline"
            )
        if self.known is not None:
            return family.around(self.known, named)
        call.all_tokens, self.deferred_ids = True, ids
        return family.around({0: TokenGrid(1, ids.shape[-2])}, named)

    def resolve_grid(self) -> TokenGrid | None:
        """Read the grid from positions, where the call was traced; until then all tokens are computed.

        Returns:
            The finest, if it was to be read.
        """
        seen, self.deferred_ids = self.deferred_ids, None
        if seen is None or self.family.ids_name is None:
            return None
        self.known = self.family.grids(None, {self.family.ids_name: seen})
        return self.known[0]

    def resolve_branches(self, computed_steps: int) -> int | None:
        """Read how many branches of guidance a batch holds, where the pipeline does not say.

        Two, if its halves have the same latents, also after the first step, which moves those of different
        prompts apart. Until then all tokens are computed.

        Returns:
            How many, if that was to be read.
        """
        seen, self.deferred_latents = self.deferred_latents, None
        if seen is None or computed_steps <= 1:
            return None
        first, second = seen.chunk(2)
        return 1 + torch.equal(first, second)
