"""What one `apply_tofu` decided about a denoiser: frozen, with the settings of a step as a pure function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..config import DenoiserConfig, StepSkipping, TokenReduction
from ..families.base import Family
from ..steps.fitted import FittedForecasts
from ..steps.forecast import corrector_weights, fitted_weights, forecast_weights
from ..steps.reference import Reference
from ..steps.rules import Steps, computed_steps, skipped_steps
from ..steps.sampler import Sampling
from ..tokens.methods import Method
from ..tokens.unmerges import UNMERGES
from .sites import PlanCache, Projection, Site


@dataclass(frozen=True)
class StepSettings:
    """What one step of a generation is run with.

    Attributes:
        ratios: Of every site; see `Site.ratio`.
        skip: Whether the denoiser is skipped.
        caches_are_warm: Whether the caches hold a past by now that the step builds on.
    """

    ratios: tuple[str, ...]
    skip: bool
    caches_are_warm: bool


@dataclass(frozen=True, eq=False)
class Setup:
    """What was asked for, and what follows from it once for all.

    Args:
        configs: What was asked for, resolved, one of each workflow at most.
        family: Of the denoiser.
        sites: Everything that shrinks, in the order of execution; the forwards refer to the same objects.
        projections: Key and value projections to remember (keys_values "cached" only).
        blocks: The modules that shrink.
        denoiser: The model itself.
        pipeline: What `apply_tofu` was given; nothing for a bare denoiser.
        stands_in: Whether this is what runs without memory, for one that was asked for.
        has_stand_in: Whether another one runs without memory where there is no past.
        drop_text_padding: Whether text tokens that a mask hides leave the sequence.

    Attributes:
        reduction: The TokenReduction among the configurations; None if it removes nothing.
        skipping: The StepSkipping among them; None if it skips nothing.
        method: Of the reduction.
        needs: Why the denoising step must be known; empty if each call can stand alone.
        max_age: Steps after which unmerges must not reuse an update; None: they need not look.
        needs_assignment: Whether anybody reads where removed tokens go.
        plan_caches: Those of the sites, each once.
    """

    configs: tuple[DenoiserConfig, ...]
    family: Family
    sites: tuple[Site, ...]
    projections: tuple[Projection, ...]
    blocks: tuple[nn.Module, ...]
    denoiser: nn.Module
    pipeline: Reference
    stands_in: bool = False
    has_stand_in: bool = False
    drop_text_padding: bool = False
    reduction: TokenReduction | None = field(init=False)
    skipping: StepSkipping | None = field(init=False)
    method: Method | None = field(init=False)
    needs: tuple[str, ...] = field(init=False)
    max_age: int | None = field(init=False)
    needs_assignment: bool = field(init=False)
    plan_caches: tuple[PlanCache, ...] = field(init=False)

    def __post_init__(self) -> None:
        reduction, skipping = in_force(self.configs)
        needs = [] if reduction is None else reduction.needs_steps
        if skipping is not None:
            needs = [*needs, f"speedup {skipping.speedup:g}"]
        derived: dict[str, Any] = {
            "reduction": reduction,
            "skipping": skipping,
            "method": None if reduction is None else reduction.make_method(),
            "needs": tuple(needs),
            "max_age": None,
            "needs_assignment": False,
            "plan_caches": tuple(dict.fromkeys(site.plan_cache for site in self.sites)),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if reduction is None or self.method is None:
            return
        # Where the choice of tokens keeps the bound, unmerges need not look for tokens beyond it.
        bounded = self.method.bounds_age and reduction.schedule.is_constant and reduction.reuse == 1
        object.__setattr__(self, "max_age", None if bounded else reduction.max_age or None)
        # With a past of its own to build on, no removed token gets another's update.
        own = all(UNMERGES[site.unmerge].own_past for site in self.sites)
        inside = reduction.scope in ("block", "span")
        alone = own and inside and self.max_age is None and self.warmup_steps > 0
        object.__setattr__(self, "needs_assignment", not alone)

    @property
    def scope(self) -> str:
        """Around what tokens shrink; "step" if steps are skipped and nothing else is done."""
        return "step" if self.reduction is None else str(self.reduction.scope)

    @property
    def keys_values(self) -> str:
        """What attention sees of removed tokens."""
        return "dropped" if self.reduction is None else str(self.reduction.keys_values)

    @property
    def memory_limit(self) -> float | None:
        """The smaller of the limits in GiB, if there is one."""
        limits = [each.memory_limit for each in self.configs if each.memory_limit is not None]
        return min(limits, default=None)

    @property
    def corrects_steps(self) -> bool:
        """Whether forecasts of skipped steps are corrected; where tokens are, that does it for both."""
        skipping, reduction = self.skipping, self.reduction
        by_token = reduction is not None and bool(reduction.corrector)
        return skipping is not None and skipping.corrector and skipping.order > 0 and not by_token

    @property
    def reduces(self) -> bool:
        """Whether anything is done at all."""
        return self.reduction is not None or self.skipping is not None

    @property
    def warmup_steps(self) -> int:
        """Steps at the start that compute all tokens: as asked, and until there is evidence."""
        return 0 if self.reduction is None else self.reduction.steps_needed

    @property
    def cooldown_steps(self) -> int:
        """Steps at the end that compute all tokens."""
        return 0 if self.reduction is None else self.reduction.cooldown_steps or 0

    def skipped_steps(self, sampling: Sampling) -> frozenset[int]:
        """The steps of a generation at which the denoiser is skipped, if enough was computed before."""
        config, total = self.skipping, len(sampling)
        if config is None or not total:
            return frozenset()
        fitted = self.fitted(sampling)
        if fitted is not None:
            return frozenset({*range(total)} - {*fitted.computed})
        free = range(config.steps_needed, total - config.cooldown_steps)
        steps = Steps(
            free,
            computed_steps(total, config.speedup, free),
            sampling.angles,
            sampling.sizes,
            config.trajectory,
            config.order,
            config.corrector and sampling.additive_sizes is not None,
        )
        return skipped_steps(str(config.rule), steps)

    def fitted(self, sampling: Sampling) -> FittedForecasts | None:
        """The fitted forecasts, if they are for the steps of this generation."""
        fitted = None if self.skipping is None else self.skipping.fitted
        return fitted if fitted is not None and fitted.fits(sampling) else None

    def forecasts(
        self, sampling: Sampling
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """How a generation's skipped steps are forecast, and what corrects its computed ones, if anything.

        See `forecast.forecast_weights` and `forecast.corrector_weights`.
        """
        config, total, fitted = self.skipping, len(sampling), self.fitted(sampling)
        assert config is not None
        if fitted is not None:
            weights, corrections = fitted_weights(fitted)
            return weights, corrections if self.corrects_steps else None
        skipped = self.skipped_steps(sampling)
        computed = [step for step in range(total) if step not in skipped]
        path = config.trajectory if config.order and total else None
        products = None if path is None else path.at(sampling.angles)
        weights = forecast_weights(total, computed, config.order, products)
        if not self.corrects_steps or sampling.additive_sizes is None:
            return weights, None
        return weights, corrector_weights(sampling.additive_sizes, weights)

    def settings_at(
        self, index: int, computed_steps: int, sampling: Sampling, past: int | None = None
    ) -> StepSettings:
        """What a step is run with.

        Args:
            index: Of the step; past the last one, or in a generation without steps, nothing is skipped.
            computed_steps: How many steps this denoiser has computed before.
            past: How many of them every branch of guidance remembers; None: all.
            sampling: All steps.
        """
        total = len(sampling)
        skip = index < total and self.skipping is not None
        if skip and self.skipping is not None:
            ready = computed_steps >= self.skipping.steps_needed
            # Guidance that begins or ends on the way leaves a branch without two steps to extrapolate.
            least = min(self.skipping.order + 1, self.skipping.steps_needed)
            ready = ready and (past is None or past >= least)
            skip = ready and index in self.skipped_steps(sampling)
        reduction = self.reduction
        if reduction is None:
            return StepSettings((), skip, False)
        level = sampling.noise[min(index, total - 1)] if total else 1.0
        first, last = self.warmup_steps, total - self.cooldown_steps
        whole = bool(total) and (computed_steps < first or index >= last)
        ratios = tuple(
            str(0.0 if whole else reduction.ratio_at(1.0 - level, site.depth))
            for site in self.sites
        )
        return StepSettings(ratios, skip, not whole and first > 0)

    def tokens_asked(self, tokens: int, ratio: str) -> int:
        """How many of a grid's tokens are to go at a ratio; none of a grid smaller than `min_tokens`."""
        least = 0 if self.reduction is None else self.reduction.min_tokens
        return 0 if tokens < least else int(tokens * float(ratio))


def in_force(
    configs: tuple[DenoiserConfig, ...],
) -> tuple[TokenReduction | None, StepSkipping | None]:
    """Those that do anything: at ratio 0 no tokens are reduced, at speedup 1 no steps skipped."""
    reduction = next((each for each in configs if isinstance(each, TokenReduction)), None)
    skipping = next((each for each in configs if isinstance(each, StepSkipping)), None)
    if reduction is not None and reduction.ratio == 0:
        reduction = None
    if skipping is not None and skipping.speedup == 1:
        skipping = None
    return reduction, skipping
