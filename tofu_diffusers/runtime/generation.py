"""The generation that a denoiser is in: plain Python between its calls, with all numbers of a step.

It hands over to the call by `call.step`, `call.skip` and the sites' ratios, and is the only one that may read
the device: once when a generation starts, and what was deferred when a step is over.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..steps.clock import is_watched, watch
from ..steps.sampler import noise_level, noise_levels, step_sizes
from .runtime import Runtime

FEW_STEPS = 8


@dataclass(frozen=True)
class StepRecord:
    """What one denoising step ran with: calls of the denoiser, every site's ratio, whether it was skipped."""

    calls: int
    ratios: tuple[str, ...]
    skipped: bool = False


class Generation:
    """Follows a scheduler, or a user's own loop, through the steps of one generation after another.

    Attributes:
        runtime: Whose calls it sets up.
        index: Of the step.
        noise: Levels of all its steps (1: pure noise); empty: there is no generation.
        computed_steps: How many steps the denoiser has computed.
        history: Of the steps that are over.
        compute_counts: By resolution, at how many steps each token was computed, [I, N].
        schedulers: Those that tell the steps.
        removed: Whether tofu was taken off.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.index = 0
        self.noise: list[float] = []
        self.computed_steps = 0
        self.history: list[StepRecord] = []
        self.compute_counts: dict[int, Tensor] = {}
        self.schedulers: list[Any] = []
        self.removed = False
        self._apply_settings()

    # ---- told from outside ---------------------------------------------------------------------

    @property
    def pipeline(self) -> Any:
        """The pipeline whose scheduler and guidance are read; None if there is none, or it is gone."""
        return self.runtime.setup.pipeline.get()

    def start(self, scheduler: Any) -> None:
        """Start the generation that a scheduler has set its timesteps for."""
        self.begin(noise_levels(scheduler))
        corrects = self.runtime.caches.with_step_sizes
        if corrects is not None:
            corrects.begin(step_sizes(scheduler))

    def begin(self, noise: list[float], cfg_branches: int | None = None) -> None:
        """Start a generation whose steps have these noise levels.

        Args:
            noise: 1 is pure noise; empty: none, what is remembered is dropped.
            cfg_branches: Of guidance in a batch; None: as the pipeline says.
        """
        call, caches = self.runtime.call, self.runtime.caches
        branches = self._branches_of_pipeline() if cfg_branches is None else cfg_branches
        call.cfg_branches = str(branches)
        self.noise = noise
        # Anew: a tensor made in inference mode cannot be written outside of it.
        call.step = None
        self.history = []
        self.compute_counts = {}
        call.number = self.computed_steps = 0
        caches.peak_bytes = 0
        self.runtime.reader.start()
        self.forget()
        if caches.with_step_sizes is not None:
            caches.with_step_sizes.begin(None)
        self._set_index(0)

    def advance(self, scheduler: Any, timestep: Any) -> None:
        """Go on by one step. One that this denoiser had no part in (its pipeline has two) counts as time."""
        call = self.runtime.call
        if call.step_known:
            if self.index == 0:
                # Where the call was traced, nobody could look before it.
                self._trim_to_executed(scheduler, timestep)
                self._warn_of_few()
            self._finish_step()
            self._set_index(self.index + 1)
            if not call.step_known:
                # The generation is over: what decodes the latents may need the memory.
                self.forget()

    def set_step(self, index: int, total: int, cfg_branches: int) -> None:
        """Take a bare model's step from its user."""
        if index == 0 or not self.runtime.call.step_known or total != len(self.noise):
            self.begin([1.0 - i / total for i in range(total)], cfg_branches)
            self._warn_of_few()
        else:
            self._finish_step()
        self._set_index(index)

    def find_scheduler(self, named: dict[str, Any]) -> None:
        """Follow a scheduler swapped after `apply_tofu`, and see which of its steps are really executed."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        if scheduler is None:
            return
        if not is_watched(scheduler, self):
            watch(scheduler, self)
            self.start(scheduler)
        call = self.runtime.call
        if call.step_known and self.index == 0 and call.number == 0:
            scale = self.runtime.setup.family.timestep_scale
            self._trim_to_executed(scheduler, named["timestep"] / scale)

    def forget(self) -> None:
        """Drop everything that belongs to one generation."""
        self.runtime.caches.clear()
        self.runtime.call.shapes.clear()
        self.runtime.call.open_span = None

    # ---- asked from outside --------------------------------------------------------------------

    @property
    def has_past(self) -> bool:
        """Whether a call can build on earlier ones: its step is known, and steps are not few."""
        if self.runtime.call.step_known:
            return len(self.noise) > FEW_STEPS
        return self.runtime.setup.pipeline.given

    def steps(self) -> list[StepRecord]:
        """The steps of the last generation, the running one included."""
        return self.history + ([self._record()] if self.runtime.call.number else [])

    # ---- parts of the above --------------------------------------------------------------------

    def _branches_of_pipeline(self) -> int:
        """Branches of guidance in a batch, as the pipeline says; 0: it does not, see `GridReader.resolve`."""
        setup, pipeline = self.runtime.setup, self.pipeline
        if pipeline is None and setup.pipeline.given:
            raise RuntimeError(
                "the pipeline that apply_tofu was given is gone, and with it what tells guidance; call "
                "apply_tofu on the pipeline that generates"
            )
        if pipeline is None or not setup.family.guidance_in_batch:
            return 1
        guided = getattr(pipeline, "do_classifier_free_guidance", None)
        if guided is None:
            return 0
        # Guidance by a text and by a picture apart from each other (InstructPix2Pix) has three branches.
        others = 2 if hasattr(pipeline, "image_guidance_scale") else 1
        perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)
        return 1 + others * bool(guided) + bool(perturbed)

    def _trim_to_executed(self, scheduler: Any, timestep: Any) -> None:
        """See which of the scheduler's steps are executed, from the first one's timestep.

        Image-to-image leaves out the first of them, a base model before a refiner the last. The timestep is
        read where the pipeline announces fewer steps than were set, once.
        """
        planned = getattr(self.pipeline, "num_timesteps", None)
        if planned and planned < len(self.noise):
            level = noise_level(scheduler, timestep)
            distances = [abs(noise - level) for noise in self.noise]
            begin = min(distances.index(min(distances)), len(self.noise) - planned)
            self.noise = self.noise[begin : begin + planned]
            corrects = self.runtime.caches.with_step_sizes
            if corrects is not None and corrects.step_sizes is not None:
                corrects.begin(corrects.step_sizes[begin : begin + planned])
            self._apply_settings()

    def _warn_of_few(self) -> None:
        setup, steps = self.runtime.setup, len(self.noise)
        reduces = setup.reduction is not None and setup.reduction.ratio > 0
        if steps <= FEW_STEPS and setup.warmup_steps and reduces and not setup.has_stand_in:
            warnings.warn(
                f"{steps} steps, of which {min(steps, setup.warmup_steps)} compute all tokens: little is "
                "left to save; with so few steps choose a method and unmerge without memory (method='tofu')",
                stacklevel=2,
            )
        if setup.skipping is not None and setup.skipping.speedup > 1:
            computed = max(1, steps - len(setup.skipped_steps(steps)))
            if steps / computed < setup.skipping.speedup - 1e-6:
                warnings.warn(
                    f"speedup {setup.skipping.speedup:g} is not reached: {computed} of {steps} steps must be "
                    f"computed ({steps / computed:.2f}x); lower warmup_steps or cooldown_steps, or ask for "
                    "more steps",
                    stacklevel=2,
                )

    def _set_index(self, index: int) -> None:
        call, reduction = self.runtime.call, self.runtime.setup.reduction
        self.index = index
        call.step_known = index < len(self.noise)
        call.number = 0
        if reduction is None or index % reduction.reuse == 0:
            self.runtime.caches.clear_plans()
        if call.step is None:
            call.step = torch.full((), float(index))
        else:
            call.step.fill_(float(index))
        self._apply_settings()

    def _apply_settings(self) -> None:
        """Hand over to the call what its step is run with."""
        setup, call = self.runtime.setup, self.runtime.call
        settings = setup.settings_at(self.index, self.computed_steps, self.noise)
        call.skip, call.caches_are_warm = settings.skip, settings.caches_are_warm
        for site, ratio in zip(setup.sites, settings.ratios, strict=True):
            site.ratio = ratio

    def _record(self) -> StepRecord:
        call, sites = self.runtime.call, self.runtime.setup.sites
        ratios = tuple("0.0" if call.all_tokens else site.ratio for site in sites)
        return StepRecord(call.number, ratios, call.skip)

    def _finish_step(self) -> None:
        call = self.runtime.call
        if not call.number:
            return
        self.history.append(self._record())
        self._count_computed()
        self.computed_steps += not call.skip
        branches = self.runtime.reader.resolve(self.computed_steps)
        if branches is not None:
            call.cfg_branches = str(branches)
            # All that is remembered is of the whole batch, apart from the statistics of each image.
            statistics = self.runtime.caches.statistics
            if branches == 2 and statistics is not None:
                statistics.halve(self.runtime.setup.family.conditional_first)

    def _count_computed(self) -> None:
        """Add to every token's count of steps that computed it, by the first plan of its resolution."""
        setup, call = self.runtime.setup, self.runtime.call
        for resolution, grid in call.grids.items():
            cache = next((c for c in setup.plan_caches if c.resolution == resolution), None)
            if call.step is None or (cache is None and setup.reduction is not None):
                continue
            counts = self.compute_counts.get(resolution)
            if counts is None:
                counts = torch.zeros(call.images, grid.tokens, device=call.step.device)
            # Rows that were taken for images until guidance was seen (`GridReader.resolve`) ran in full.
            counts = self.compute_counts[resolution] = counts[: call.images]
            if call.skip:
                continue
            kept = cache.kept() if cache is not None else []
            if kept:
                counts.scatter_add_(1, kept[0], torch.ones_like(kept[0], dtype=counts.dtype))
            else:
                counts += 1
