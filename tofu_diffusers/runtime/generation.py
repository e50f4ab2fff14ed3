"""The generation that a denoiser is in: plain Python between its calls, with all numbers of a step.

It hands over to the call by `call.step`, `call.skip` and the sites' ratios, and is the only one that may read
the device: once when a generation starts, and what was deferred when a step is over.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..steps.clock import exchanged, is_watched, watch
from ..steps.pipelines import cached_by_cache_dit, generating, holds, schedulers
from ..steps.reference import Reference
from ..steps.sampler import Sampling
from .call import untold
from .runtime import Runtime

FEW_STEPS = 8


@dataclass(frozen=True)
class StepRecord:
    """What one denoising step ran with: calls of the denoiser, every site's ratio, whether it was skipped.

    Where guidance begins on the way, its first call is computed, and others of that step may be forecast.

    Attributes:
        batch: Rows of a call, fewer where guidance ended on the way.
    """

    calls: int
    ratios: tuple[str, ...]
    skipped: bool = False
    forecast: int = 0
    batch: int = 1

    @property
    def ran(self) -> int:
        """How many of its calls were computed."""
        return 0 if self.skipped else self.calls - self.forecast


class Turn:
    """Lets one thread at a time into a denoiser, and refuses others instead of waiting.

    As a context manager it waits: a step that is over must be counted, unless another generation began.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Turn:
        return Turn()

    def take(self, name: str) -> None:
        """Keep others out until `leave`.

        Raises:
            RuntimeError: if a thread is inside.
        """
        if not self._lock.acquire(blocking=False):
            raise broken_into(name)

    def leave(self) -> None:
        """Let others in."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def broken_into(name: str) -> RuntimeError:
    """What to raise where two generations meet in one denoiser."""
    return RuntimeError(
        f"another generation began with this {name} before the one that ran was over; with tofu a denoiser "
        "is in one generation at a time: run them one after the other (with a lock around the pipelines), or "
        "give each a denoiser of its own"
    )


class Generation:
    """Follows a scheduler, or a user's own loop, through the steps of one generation after another.

    Whoever calls the denoiser is served by his own scheduler and guidance: the pipeline that was given,
    another one around the same denoiser, or a loop of the user's.

    Attributes:
        runtime: Whose calls it sets up.
        turn: Of the denoiser.
        scheduler: That tells the steps; nothing where the user does, or nobody.
        caller: The pipeline that generates; nothing in a loop of the user's.
        index: Of the step.
        sampling: All its steps; empty: there is no generation.
        computed_steps: How many steps the denoiser has computed.
        forgotten_steps: How many of them were before a branch of guidance began anew.
        history: Of the steps that are over.
        compute_counts: By resolution, at how many steps each token was computed, [I, N].
        schedulers: Those that may tell the steps.
        broken_off: Those whose generation was not over when another one began.
        unplanned_steps: How many steps were computed that were to be skipped.
        removed: Whether tofu was taken off.
        silent: Whether it warns of nothing, as one that only counts.
    """

    def __init__(self, runtime: Runtime, turn: Turn) -> None:
        self.runtime = runtime
        self.turn = turn
        self.scheduler = Reference()
        self.caller = Reference()
        self.index = 0
        self.sampling = Sampling()
        self.computed_steps = self.forgotten_steps = self.unplanned_steps = 0
        self.history: list[StepRecord] = []
        self.compute_counts: dict[int, Tensor] = {}
        self.schedulers: list[Reference] = []
        self.broken_off: list[Reference] = []
        self.removed = self.silent = False
        self._timestep: Any = None
        self._first_timestep: Any = None
        self._trimmed = self._history_is_old = False
        self._apply_settings()

    # ---- told from outside ---------------------------------------------------------------------

    @property
    def pipeline(self) -> Any:
        """What `apply_tofu` was given; None if that was a bare denoiser, or it is gone."""
        return self.runtime.setup.pipeline()

    def start(self, scheduler: Any) -> None:
        """Start the generation that a scheduler has set its timesteps for.

        Raises:
            RuntimeError: if the pipeline has another denoiser by now, or cache-dit or a thread is in it.
        """
        caller = generating(scheduler)
        if caller is not None and not holds(caller, self.runtime.setup.denoiser):
            if caller is self.pipeline:
                raise exchanged(caller)
            return  # of another denoiser
        if cached_by_cache_dit(self.runtime.setup.denoiser) and self.runtime.setup.reduces:
            raise RuntimeError(
                f"cache-dit was put on {self._denoiser} after tofu, and runs it past tofu or skips twice; "
                "call cache_dit.disable_cache(pipe); where remove_tofu is refused then, load the pipeline "
                "again"
            )
        self.turn.take(self._denoiser)
        try:
            self._follow(scheduler, caller)
        finally:
            self.turn.leave()

    def begin(self, sampling: Sampling, cfg_branches: int) -> None:
        """Start a generation of these steps.

        Args:
            sampling: Empty: none, what is remembered is dropped.
            cfg_branches: Of guidance in a batch; 0: not known yet, see `GridReader.resolve_branches`.
        """
        call, caches = self.runtime.call, self.runtime.caches
        if call.step_known and self.scheduler() is not None:
            self.broken_off.append(self.scheduler)
        self.scheduler = self.caller = Reference()
        self._timestep, self._trimmed, call.told_by_hand = None, False, False
        call.cfg_branches = str(cfg_branches)
        call.conditional_first = self.runtime.setup.family.conditional_first
        self.sampling = sampling
        # Anew: a tensor made in inference mode cannot be written outside of it.
        call.step = None
        # One of a pipeline's denoisers may have no call in this generation, but in the one before.
        self._history_is_old = bool(sampling)
        if not sampling:
            self._clear_history()
        call.number = self.computed_steps = self.forgotten_steps = self.unplanned_steps = 0
        call.began_anew = False
        caches.peak_bytes = 0
        self.runtime.reader.start()
        self.runtime.text.start()
        self.forget()
        self.runtime.caches.begin(self.sampling)
        self._set_index(0)

    def advance(self, scheduler: Any, timestep: Any) -> None:
        """Go on by one step. One that this denoiser had no part in (its pipeline has two) counts as time.

        Raises:
            RuntimeError: if that timestep was stepped before, or the generation began before tofu was put on.
        """
        call = self.runtime.call
        with self.turn:
            self._check_not_amid(scheduler)
            if scheduler is not self.scheduler() or not call.step_known:
                return
            if self.index == 0:
                # Where the call was traced, nobody could look before it.
                self._trim_to_executed(timestep)
                self._warn_of_few()
            self._check_stepped_once(timestep)
            self._finish_step()
            self._set_index(self.index + 1)
            if not call.step_known:
                # The generation is over: what decodes the latents may need the memory.
                self.forget()
                self._warn_of_unplanned()

    def set_step(self, index: int, total: int, cfg_branches: int) -> None:
        """Take a bare model's step from its user."""
        call = self.runtime.call
        if index == self.index == 0 and call.step_known and call.number and total > 1:
            self._warn(
                f"step 0 of {total} was told twice in a row, which begins a new generation each time, so "
                "that no step is skipped or reduced by what was before; count on: handle.step(i, total)"
            )
        if index == 0 or not call.step_known or total != len(self.sampling):
            self.begin(Sampling.evenly(total), cfg_branches)
            call.told_by_hand = True
            self._warn_of_few()
        else:
            self._finish_step()
        self._set_index(index)

    def called_by(self, caller: Any, told_by: list[Any], named: dict[str, Any]) -> None:
        """Follow the one who calls the denoiser, and see which of his scheduler's steps are executed.

        Args:
            caller: The pipeline; None: a loop of the user's, or one call alone.
            told_by: Its schedulers.
            named: The denoiser's arguments.

        Raises:
            RuntimeError: if another generation began while his was not over, or his steps are told by nobody.
        """
        call = self.runtime.call
        if any(each() is scheduler for each in self.broken_off for scheduler in told_by):
            raise broken_into(self._denoiser)
        if caller is None:
            # One call alone, also after a pipeline's generation, whether that was over or not.
            if self.sampling and (self.caller() is not None or not call.step_known):
                self.begin(Sampling(), cfg_branches=1)
        elif told_by and not (call.step_known and call.told_by_hand):
            new = [each for each in told_by if not is_watched(each, self)]
            for scheduler in new:
                watch(scheduler, self)
            if len(new) == len(told_by):
                # Set after `apply_tofu`, or in another pipeline around this denoiser.
                self._follow(told_by[0], caller)
        call.told_by_pipeline = bool(told_by)
        call.conditions = getattr(getattr(caller, "guider", None), "num_conditions", 0)
        family = self.runtime.setup.family
        scale = family.timestep_scale
        if call.step_known and self.index == 0 and self.scheduler() and scale:
            timestep = named[family.timestep_name] / scale
            if call.number == 0:
                self._trim_to_executed(timestep)
                self._first_timestep = timestep
            else:
                self._check_first_step(timestep)

    def end(self) -> None:
        """End a generation that was broken off, if there is one."""
        self.begin(Sampling(), cfg_branches=1)
        self.broken_off.clear()

    def forget(self) -> None:
        """Drop everything that belongs to one generation."""
        self.runtime.caches.clear()
        self.runtime.call.shapes.clear()
        self.runtime.call.open_span = None

    # ---- asked from outside --------------------------------------------------------------------

    @property
    def has_past(self) -> bool:
        """Whether a call can build on earlier ones: its step is known, and steps are not few."""
        return self.runtime.call.step_known and self._steps_to_compute > FEW_STEPS

    def steps(self) -> list[StepRecord]:
        """The steps of the last generation, the running one included."""
        call = self.runtime.call
        # A call beside the steps is none; that of a bare denoiser with fewer tokens is all there is.
        setup = self.runtime.setup
        counts = call.step_known or setup.reduction is not None or setup.drop_text_padding
        current = [self._record()] if call.number and counts else []
        return current if current and self._history_is_old else self.history + current

    # ---- parts of the above --------------------------------------------------------------------

    @property
    def _steps_to_compute(self) -> int:
        """How many steps of the generation are not skipped."""
        return len(self.sampling) - len(self.runtime.setup.skipped_steps(self.sampling))

    def _warn(self, text: str) -> None:
        if not self.silent:
            warnings.warn(text, stacklevel=3)

    @property
    def _denoiser(self) -> str:
        return type(self.runtime.setup.denoiser).__name__

    def _follow(self, scheduler: Any, caller: Any) -> None:
        """Start the generation of this scheduler and pipeline."""
        branches = self._branches_of(caller)
        self.begin(Sampling.of(scheduler), branches)
        self.scheduler, self.caller = Reference(scheduler), Reference(caller)
        # Guidance by text and by picture (InstructPix2Pix): both, the picture alone, neither.
        self.runtime.call.conditional_first |= hasattr(caller, "image_guidance_scale")
        # What a pipeline set up before, by this scheduler or another of its own, it does not go on with.
        gone = (None, scheduler, *schedulers(caller))
        self.broken_off = [each for each in self.broken_off if each() not in gone]

    def _branches_of(self, pipeline: Any) -> int:
        """Branches of guidance in a batch, as the pipeline says; 0: it does not, and they are read."""
        setup = self.runtime.setup
        if setup.reduction is None or not setup.family.guidance_in_batch:
            return 1
        guided = getattr(pipeline, "do_classifier_free_guidance", None)
        if guided is None:
            return 0
        # Guidance by a text and by a picture apart from each other (InstructPix2Pix) has three branches.
        others = 2 if hasattr(pipeline, "image_guidance_scale") else 1
        perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)
        return 1 + others * bool(guided) + bool(perturbed)

    def _check_not_amid(self, scheduler: Any) -> None:
        """Refuse to go on with a generation whose beginning was not seen: which step this is, nobody told.

        It is one if the scheduler is stepped behind a call; calls beside the steps are followed by no step.
        """
        setup = self.runtime.setup
        if self.sampling or not self.runtime.call.number or not setup.reduces:
            return
        caller = generating(scheduler)
        if caller is not None and holds(caller, setup.denoiser):
            raise RuntimeError(
                f"apply_tofu or handle.reset was called while {type(caller).__name__} generates, and its "
                "steps are known only from their beginning; call it before the pipeline"
            )

    def _check_stepped_once(self, timestep: Any) -> None:
        """Refuse pipelines that denoise several views by turns: they seem to be in a later step."""
        # By its place in the list of timesteps. It is kept, so that no other one comes to lie there.
        last, self._timestep = self._timestep, timestep
        if not (isinstance(timestep, Tensor) and isinstance(last, Tensor)):
            return
        if timestep.data_ptr() == last.data_ptr() and self.runtime.setup.reduces:
            who = "the loop" if self.caller() is None else type(self.caller()).__name__
            raise RuntimeError(
                f"{who} stepped its scheduler twice at one timestep (several views or latents by turns), and "
                "tofu takes each for a step of the whole; call remove_tofu before it"
            )

    def _check_first_step(self, timestep: Any) -> None:
        """Refuse a loop that goes on to its second timestep and steps no scheduler.

        In the first step only: to look costs a host read a call.
        """
        before = self._first_timestep
        if before is None or not self.runtime.setup.reduces:
            return
        if self.sampling.nearest(timestep) == self.sampling.nearest(before) + 1:
            raise untold("at a second timestep")

    def _trim_to_executed(self, timestep: Any) -> None:
        """See which of the scheduler's steps are executed, from the first one's timestep.

        Image-to-image leaves out the first of them, a base model before a refiner the last. The timestep is
        read once, in a loop of the user's and where the pipeline announces fewer steps than were set.

        Raises:
            RuntimeError: if it announces more.
        """
        if self._trimmed:
            return
        self._trimmed, pipeline, count = True, self.caller(), len(self.sampling)
        planned = getattr(pipeline, "num_timesteps", None)
        if planned is not None and planned > count and self.runtime.setup.reduces:
            # Frames of a video that follow each other, each by a scheduler of its own.
            raise untold(f"for {planned} steps, more than the {count} of its scheduler,")
        # Where nothing is announced, by a loop of the user's or an old pipeline, it may begin anywhere and
        # goes on to the end.
        latest = count - 1 if planned is None else count - planned
        if latest <= 0:
            return
        begin = min(self.sampling.nearest(timestep), latest)
        self.sampling = self.sampling.part(begin, count - begin if planned is None else planned)
        self.runtime.caches.begin(self.sampling)
        self._apply_settings()

    def _warn_of_few(self) -> None:
        setup, steps, computed = self.runtime.setup, len(self.sampling), self._steps_to_compute
        if computed <= FEW_STEPS and setup.warmup_steps and not setup.has_stand_in:
            skipped = setup.skipped_steps(self.sampling)
            last = {*range(steps - setup.cooldown_steps, steps)} - skipped
            whole = min(computed, setup.warmup_steps + len(last))
            ran = f"{steps} steps" if computed == steps else f"{computed} computed steps of {steps}"
            self._warn(
                f"{ran}, of which {whole} compute all tokens: little is left to "
                "save; with so few steps choose a method and unmerge without memory (method='tofu')"
            )
        skipping = setup.skipping
        if skipping is None:
            return
        if skipping.fitted is not None and not setup.fitted(self.sampling):
            levels, kind = self.sampling.angles, self.sampling.kind or "a loop"
            self._warn(
                f"forecasts were fitted to {len(skipping.fitted.levels)} steps of {skipping.fitted.sampler} "
                f"from noise level {skipping.fitted.levels[0]:.3f} to {skipping.fitted.levels[-1]:.3f}, and "
                f"these are {steps} of {kind} from {levels[0]:.3f} to {levels[-1]:.3f}, which go by rule "
                f"{skipping.rule!r}; tune with these steps, this strength and this sampler"
            )
        computed = max(1, computed)
        if steps / computed < skipping.speedup - 1e-6:
            lower = [
                f"{name} ({value})"
                for name, value, least in (
                    ("warmup_steps", skipping.steps_needed, 1),
                    ("cooldown_steps", skipping.cooldown_steps, 0),
                )
                if value > least
            ]
            self._warn(
                f"speedup {skipping.speedup:g} is not reached: {computed} of {steps} steps must be computed, "
                f"the first one and at least one later one ({steps / computed:.2f}x); "
                + " or ".join(["ask for more steps", *(f"lower {each}" for each in lower)])
            )

    def _warn_of_unplanned(self) -> None:
        """Say so where steps had to be computed that were to be skipped, and the speed-up is missed."""
        skipping, steps = self.runtime.setup.skipping, len(self.sampling)
        if skipping is None or not self.unplanned_steps:
            return
        computed = self._steps_to_compute + self.unplanned_steps
        if steps / computed < skipping.speedup - 1e-6:
            self._warn(
                f"speedup {skipping.speedup:g} is not reached: {computed} of {steps} steps were computed "
                f"({steps / computed:.2f}x), {self.unplanned_steps} more than planned, because the past was "
                "lost: guidance or the sequence of tokens changed on the way, or another denoiser took over; "
                "ask for a higher speedup, or lower warmup_steps"
            )

    def warn_of_reach(self) -> None:
        """Say so where what stands in cannot remove as many tokens as were asked for."""
        short, config = self.runtime.short_of(), self.runtime.setup.reduction
        if short and config is not None:
            why = (
                f"{self._steps_to_compute} computed steps have too little past"
                if self.sampling
                else "there is no past"
            )
            self._warn(
                f"ratio {config.ratio:g} is not reached: {why} for the default profile, and method "
                f"{config.method!r}, which needs none, removes {', '.join(short)}; ask for more than "
                f"{FEW_STEPS} steps, or name a method"
            )

    def warn_of_padding(self) -> None:
        """Say so where text padding was to be dropped, and is not, or not all of it."""
        if self.runtime.text.why_not:
            self._warn(f"drop_text_padding leaves padding where it is: {self.runtime.text.why_not}")

    def _warn_of_nothing(self) -> None:
        """Say so where no step of this generation will reduce any token."""
        setup, call, steps = self.runtime.setup, self.runtime.call, len(self.sampling)
        config = setup.reduction
        if config is None or not call.grids:
            return
        sites = [i for i, site in enumerate(setup.sites) if call.in_use(site)]
        grids = [call.grids[setup.sites[i].resolution] for i in sites]
        # While guidance is not known, all tokens are computed: it is read behind the second step.
        unknown = 2 if call.cfg_branches == "0" else 0
        computed, largest = 0, 0.0
        for index in range(steps):
            settings = setup.settings_at(index, computed, self.sampling)
            computed += not settings.skip
            if settings.skip or index < unknown:
                continue
            ratios = [settings.ratios[i] for i in sites]
            if any(
                setup.tokens_asked(grid.tokens, ratio)
                for grid, ratio in zip(grids, ratios, strict=True)
            ):
                return
            largest = max(largest, *map(float, ratios))
        first = max(unknown, setup.warmup_steps)
        if not largest and first + setup.cooldown_steps >= computed:
            why = (
                f"all tokens are computed in {first} at the start and {setup.cooldown_steps} at the end, of "
                f"{computed} that are computed; ask for more steps, or lower warmup_steps or cooldown_steps"
            )
        elif not largest:
            why = "schedule and depth_schedule take the ratio to 0 at every step; raise them"
        elif all(grid.tokens < config.min_tokens for grid in grids):
            why = f"min_tokens {config.min_tokens} leaves out all grids; lower it"
        else:
            why = f"ratio {largest:g} is less than one token; raise it"
        sizes = ", ".join(sorted({f"{grid.size} ({grid.tokens} tokens)" for grid in grids}))
        self._warn(
            f"ratio {config.ratio:g} removes nothing in these {steps} steps, on {sizes}: {why}"
        )

    def _set_index(self, index: int) -> None:
        call, reduction = self.runtime.call, self.runtime.setup.reduction
        self.index = index
        call.step_known = index < len(self.sampling)
        call.number, call.forecast, call.beside_rested = 0, 0, False
        if reduction is None or index % reduction.reuse == 0:
            self.runtime.caches.clear_plans()
        if call.step is None:
            call.step = torch.full((), float(index))
        elif call.step.is_inference() and not torch.is_inference_mode_enabled():
            # Moved to the device in inference mode, it cannot be written outside of it.
            call.step = torch.full((), float(index), device=call.step.device)
        else:
            call.step.fill_(float(index))
        self._apply_settings()

    def _apply_settings(self) -> None:
        """Hand over to the call what its step is run with."""
        setup, call = self.runtime.setup, self.runtime.call
        # Behind the last step there is none: a call is alone again.
        sampling = self.sampling if call.step_known else Sampling()
        past = self.computed_steps - self.forgotten_steps
        settings = setup.settings_at(self.index, self.computed_steps, sampling, past)
        call.skip, call.caches_are_warm = settings.skip, settings.caches_are_warm
        for site, ratio in zip(setup.sites, settings.ratios, strict=True):
            site.ratio = ratio

    def _clear_history(self) -> None:
        self.history = []
        self.compute_counts = {}
        self._history_is_old = False

    def _record(self) -> StepRecord:
        call, sites = self.runtime.call, self.runtime.setup.sites
        ratios = tuple("0.0" if call.all_tokens else site.ratio for site in sites)
        batch = call.images * call.branches_in_batch
        return StepRecord(call.number, ratios, call.skip, call.forecast, batch)

    def _finish_step(self) -> None:
        call = self.runtime.call
        if not call.number:
            return
        if self._history_is_old:
            self._clear_history()
        if call.began_anew:
            self.forgotten_steps, call.began_anew = self.computed_steps, False
        if not self.history:
            self._warn_of_nothing()
            self.warn_of_reach()
        self.history.append(self._record())
        self._count_computed()
        self.computed_steps += not call.skip
        if not call.skip and self.index in self.runtime.setup.skipped_steps(self.sampling):
            self.unplanned_steps += 1
        if len(self.history) > 1 and self.history[-2].calls != call.number:
            # A call that was of one branch of guidance may be of another one now.
            self.forget()
        self.runtime.text.resolve()
        if len(self.history) == 1:
            # What a traced call was given is known only now.
            self.warn_of_padding()
        grid = self.runtime.reader.resolve_grid()
        if grid is not None and grid.tokens != call.grids[0].tokens:
            self._keep_tokens(grid.text_before, grid.tokens)
        branches = self.runtime.reader.resolve_branches(self.computed_steps)
        if branches is not None:
            call.cfg_branches = str(branches)
            # All that is remembered is of the whole batch, apart from the statistics of each image.
            statistics = self.runtime.caches.statistics
            if branches == 2 and statistics is not None:
                statistics.halve(call.conditional_first)

    def _keep_tokens(self, start: int, tokens: int) -> None:
        """Of all tokens of the first step only so many are the image's: the others are text or references."""
        self.runtime.call.know_tokens(tokens)
        self.runtime.caches.keep_tokens(start, tokens)
        self.compute_counts = {
            resolution: counts[:, start : start + tokens]
            for resolution, counts in self.compute_counts.items()
        }

    def _count_computed(self) -> None:
        """Add to every token's count of steps that computed it, by the first plan of its resolution."""
        setup, call = self.runtime.setup, self.runtime.call
        for resolution, grid in call.grids.items():
            cache = next((c for c in setup.plan_caches if c.resolution == resolution), None)
            if call.step is None or cache is None:
                continue
            counts = self.compute_counts.get(resolution)
            if counts is None:
                counts = torch.zeros(call.images, grid.tokens, device=call.step.device)
            # Rows that were taken for images until guidance was seen (`resolve_branches`) ran in full.
            counts = self.compute_counts[resolution] = counts[: call.images]
            if call.skip:
                continue
            kept = cache.kept()
            if kept:
                counts.scatter_add_(1, kept[0], torch.ones_like(kept[0], dtype=counts.dtype))
            else:
                counts += 1
