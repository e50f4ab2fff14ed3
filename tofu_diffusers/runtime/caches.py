"""Everything that is remembered from step to step: allocated, counted against the limit and cleared as one.

Plans and cached updates lie on the sites, keys and values on the projections, where a compiled block reaches
them without a name; this holds the lists of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..steps.corrector import Corrector, CorrectorState
from ..steps.forecast import Forecaster
from ..steps.sampler import Sampling
from ..tokens.statistics import TokenStatistics
from ..tokens.unmerges import UNMERGES
from ..tokens.update_cache import UpdateCache
from .call import Call
from .setup import Setup

GIB = 2**30


class Caches:
    """The caches of one denoiser.

    Attributes:
        forecaster: Of skipped steps; None where none is.
        corrector: Of single tokens; None where nothing corrects them.
        statistics: Ages and scores of the tokens; None until there is a call.
        memo: What methods make once a generation.
        peak_bytes: Most that was held in this generation.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        skipping, reduction = setup.skipping, setup.reduction
        self.forecaster = None if skipping is None else Forecaster()
        corrects = reduction is not None and bool(reduction.corrector)
        self.corrector = Corrector() if corrects else None
        self.statistics: TokenStatistics | None = None
        self.memo: dict[Any, Any] = {}
        self.peak_bytes = 0

    def begin(self, sampling: Sampling) -> None:
        """Tell what forecasts and corrects outputs of the steps of a generation."""
        if self.forecaster is not None:
            self.forecaster.begin(*self.setup.forecasts(sampling))
        if self.corrector is not None:
            # Single tokens are corrected under solvers of higher order, too.
            self.corrector.begin(None if sampling.sizes is None else list(sampling.sizes))

    def to(self, device: torch.device) -> None:
        """Move what is read at every step to where the denoiser is."""
        for each in (self.forecaster, self.corrector):
            if each is not None:
                each.to(device)

    @property
    def corrects_tokens(self) -> bool:
        """Whether outputs of this generation are corrected by tokens."""
        return self.corrector is not None and self.corrector.step_sizes is not None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        updates = [cache.nbytes for site in self.setup.sites for cache in site.updates.values()]
        rows = [rows for each in self.setup.projections for rows in each.rows.values()]
        kept = sum(each.nbytes for each in (self.forecaster, self.corrector) if each is not None)
        return kept + sum(updates) + sum(each.numel() * each.element_size() for each in rows)

    def clear(self) -> None:
        """Drop everything that belongs to one generation."""
        self.clear_plans()
        for site in self.setup.sites:
            site.updates.clear()
        for projection in self.setup.projections:
            projection.rows.clear()
        self.memo.clear()
        if self.forecaster is not None:
            self.forecaster.past.clear()
        if self.corrector is not None:
            self.corrector.states.clear()
        self.statistics = None

    def keep_tokens(self, start: int, tokens: int) -> None:
        """Drop what was noted of tokens that turned out to be none of the image's: its own are so many."""
        if self.statistics is not None:
            self.statistics.keep_tokens(start, tokens)
        if self.corrector is not None:
            for state in self.corrector.states.values():
                state.keep_tokens(start, tokens)

    def clear_plans(self) -> None:
        """Drop the plans, so that the next call makes new ones."""
        for plan_cache in self.setup.plan_caches:
            plan_cache.clear()

    def require(self, needed: int) -> None:
        """Note that so many bytes are about to be held.

        Raises:
            MemoryError: if they are more than `memory_limit`.
        """
        self.check_limit(needed)
        self.peak_bytes = max(self.peak_bytes, needed)

    def check_limit(self, needed: int) -> None:
        """Raise MemoryError if so many bytes are more than `memory_limit`."""
        limit = self.setup.memory_limit
        if limit is not None and needed > limit * GIB:
            ways = ["raise it"]
            if self.setup.projections:
                ways.append("use keys_values 'fresh' or 'dropped'")
            if any(UNMERGES[site.unmerge].cached for site in self.setup.sites):
                ways.append("use unmerge 'copy'")
            if self.corrector is not None:
                ways.append("use corrector=False")
            raise MemoryError(
                f"caches need {needed / GIB:.3g} GiB, above memory_limit {limit:g} GiB; "
                f"{', '.join(ways)}, or take a smaller batch"
            )

    def allocate(self, call: Call, sample: Tensor) -> None:
        """Make room for what this branch remembers, in place of what it did.

        Raises:
            MemoryError: if that passes the limit; nothing is allocated then.
        """
        setup, branch, batch = self.setup, call.cfg_branch, sample.shape[0]
        sites = [
            site for site in setup.sites if UNMERGES[site.unmerge].cached and call.in_use(site)
        ]
        for site in sites:
            site.updates.pop(branch, None)
        for projection in setup.projections:
            projection.rows.pop(branch, None)
        if self.corrector is not None:
            self.corrector.states.pop(branch, None)
        if self.forecaster is not None:
            # How much room an output takes shows when there is one.
            self.forecaster.past.pop(branch, None)
        needed = self.nbytes
        for site in sites:
            tokens = call.grids[site.resolution].total
            kind = UNMERGES[site.unmerge].cache
            needed += UpdateCache.nbytes_for(kind, batch, tokens, site.width, sample.dtype)
        for projection in setup.projections:
            tokens = call.grids[projection.resolution].total
            needed += batch * tokens * projection.width * sample.element_size()
        # An output is as large as the latents, or its own check comes behind the first call.
        later = 0
        if self.corrects_tokens:
            finest = call.grids[min(each.resolution for each in setup.plan_caches)]
            later = CorrectorState.nbytes_for(setup.family.prediction(sample, finest))
        self.check_limit(needed + later)
        for site in sites:
            tokens = call.grids[site.resolution].total
            site.updates[branch] = UpdateCache.empty(
                UNMERGES[site.unmerge].cache, batch, tokens, site.width, sample.dtype, sample.device
            )
        for projection in setup.projections:
            tokens = call.grids[projection.resolution].total
            projection.rows[branch] = sample.new_zeros(batch, tokens, projection.width)
        self.peak_bytes = max(self.peak_bytes, needed)
        self._begin_statistics(call, sample)

    def _begin_statistics(self, call: Call, sample: Tensor) -> None:
        setup = self.setup
        sources = () if setup.method is None else setup.method.sources
        if not call.step_known or not sources:
            return
        used = {each.resolution for each in setup.plan_caches}
        grids = {resolution: grid for resolution, grid in call.grids.items() if resolution in used}
        if setup.family.latents_are_tokens:
            grids = {resolution: grid.row for resolution, grid in grids.items()}
        sides = {resolution: grid.sides for resolution, grid in grids.items()}
        if self.statistics is not None and self.statistics.sides == sides:
            return
        # None yet, or a pipeline went on with fewer frames (ChronoEdit).
        self.statistics = TokenStatistics(sources, call.images, grids, sample.device)
