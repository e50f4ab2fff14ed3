"""The mutable state of one generation: step, condition, plans, caches. Nothing else mutates.

Two kinds of code touch it. `begin`, `advance` and `tell` run between denoiser calls, in plain Python, and
hold every number that changes with the step. `enter`, `plan`, `record` and `leave` run inside the
denoiser's forward and may be traced: they read the step only as a tensor, never its Python number, so a
compiled model is not recompiled from step to step.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..config import Config, StepSkipping, TokenReduction
from ..families.base import Family
from ..hooks.patch import checkpoints_blocks, compiled_alone, hook_on
from ..kernels.reference import normalise
from ..steps.clock import is_watched, moves, noise_level, noise_levels, watch
from ..steps.corrector import Corrections, Debt
from ..steps.forecast import Predictions, with_prediction
from ..steps.rules import skipped_steps
from ..tokens.grid import TokenGrid
from ..tokens.methods import Evidence, Method
from ..tokens.methods.base import Source
from ..tokens.plan import Plan
from ..tokens.statistics import Tracker, flags_of, on_maps
from ..tokens.unmerge import CACHED, UpdateCache
from .units import Projection, Shelf, Unit

GIB = 2**30
CALLS_LIMIT = 8
FEW_STEPS = 8


class PipelineReference:
    """The pipeline that a session serves, without keeping it alive or copying it along with a model."""

    def __init__(self, pipeline: Any = None) -> None:
        self.given = pipeline is not None
        self.get = weakref.ref(pipeline) if self.given else _nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineReference:
        # Inside a deepcopy of the pipeline the copy is already known; a copied model alone belongs to none.
        return PipelineReference(memo.get(id(self.get())))

    def __reduce__(self) -> tuple[type[PipelineReference], tuple[()]]:
        return PipelineReference, ()


def shapes_only(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with tensors on the meta device, in float32: their shapes and nothing else."""

    def shape_only(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = torch.float32 if leaf.is_floating_point() else leaf.dtype
        return torch.empty(leaf.shape, dtype=dtype, device="meta")

    shapes: dict[str, Any] = tree_map(shape_only, arguments)
    return shapes


def _nothing() -> None:
    return None


@dataclass
class StepRecord:
    """What one denoising step ran with: calls of the denoiser and every unit's ratio."""

    calls: int
    ratios: tuple[str, ...]
    skipped: bool = False


@dataclass(eq=False)
class Session:
    """State of the generation that a denoiser is in.

    Args:
        reduction, skipping: What to do; one of them may be None.
        family: Of the denoiser.
        units: All units, in the order of execution; the forwards refer to the same objects.
        projections: Key and value projections to remember (keys_values "cached" only).
        held: Most bytes that cached updates, keys and values took in this generation.
        pipeline: Whose scheduler and guidance tell the step and the conditions.
        blocks: The modules that shrink.
    """

    reduction: TokenReduction | None
    skipping: StepSkipping | None
    family: Family
    units: list[Unit]
    projections: list[Projection]
    pipeline: PipelineReference
    method: Method | None = field(init=False)
    needs: list[str] = field(init=False)
    max_age: int | None = field(init=False)
    matched: bool = field(init=False)
    blocks: list[nn.Module] = field(default_factory=list)
    removed: bool = False
    stands_in: bool = False
    """Whether this is what runs without memory, for one that was asked for."""
    has_stand_in: bool = False
    """Whether another one runs without memory where there is no past."""

    # Between calls.
    index: int = 0
    done: int = 0
    noise: list[float] = field(default_factory=list)
    told: bool = False
    conditions: str = "1"
    remembers: bool = False
    skip: bool = False
    history: list[StepRecord] = field(default_factory=list)
    held: int = 0
    computed: dict[int, Tensor] = field(default_factory=dict)
    schedulers: list[Any] = field(default_factory=list)
    constants: dict[Any, Any] = field(default_factory=dict)

    # Within calls.
    calls: int = 0
    condition: str = "0"
    images: int = 1
    groups: int = 1
    split: bool = False
    one_by_one: bool = False
    blind: bool = False
    known: dict[int, TokenGrid] | None = None
    ids: Tensor | None = None
    fixed_grids: dict[int, TokenGrid] | None = None
    unread: Tensor | None = None
    step: Tensor | None = None
    grids: dict[int, TokenGrid] = field(default_factory=dict)
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    shelves: list[Shelf] = field(init=False)
    tracker: Tracker | None = None
    opened: tuple[Tensor, Tensor, Plan | None] | None = None
    last_call: dict[str, Any] | None = None
    predictions: Predictions | None = None
    corrections: Corrections | None = None

    def __post_init__(self) -> None:
        reduction, skipping = self.reduction, self.skipping
        self.method = None if reduction is None else reduction.make_method()
        self.needs = [] if reduction is None else reduction.needs_steps
        if skipping is not None:
            self.predictions = Predictions(skipping.order)
            self.needs = (
                [*self.needs, f"speedup {skipping.speedup:g}"]
                if skipping.speedup > 1
                else self.needs
            )
        self.max_age, self.matched = None, False
        if reduction is not None and self.method is not None:
            # Where the choice of tokens keeps the bound, unmerges need not look for tokens beyond it.
            bounded = self.method.bounds_age and reduction.schedule.is_constant
            self.max_age = None if bounded and reduction.reuse == 1 else reduction.max_age or None
            # Where steps are skipped, this brings back what both left out.
            if reduction.corrector:
                self.corrections = Corrections()
            # With a past of its own to build on, no removed token gets another's update.
            own = all(unit.unmerge in ("temporal", "taylor") for unit in self.units)
            inside = reduction.scope in ("block", "span")
            self.matched = not (own and inside and self.max_age is None and self.warmup_steps() > 0)
        self.shelves = list(dict.fromkeys(unit.shelf for unit in self.units))
        self._set_ratios()

    @property
    def configs(self) -> tuple[Config, ...]:
        """What is in force, one of each workflow at most."""
        return tuple(each for each in (self.reduction, self.skipping) if each is not None)

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

    # ---- between calls -------------------------------------------------------------------------

    def follow(self, scheduler: Any) -> None:
        """Start the generation that a scheduler has set its timesteps for."""
        self.begin(noise_levels(scheduler))
        if self.looks_back is not None:
            self.looks_back.begin(moves(scheduler))

    @property
    def looks_back(self) -> Predictions | Corrections | None:
        """What changes a prediction by how far earlier steps went, if anything does."""
        if self.corrections is not None:
            return self.corrections
        corrects = self.skipping is not None and self.skipping.corrector and self.skipping.order > 0
        return self.predictions if corrects else None

    def begin(self, noise: list[float], conditions: int | None = None) -> None:
        """Start a generation whose steps have these noise levels (1 = pure noise)."""
        self.conditions = str(self._announced() if conditions is None else conditions)
        self.noise = noise
        # Anew: a tensor made in inference mode cannot be written outside of it.
        self.step = None
        self.history = []
        self.computed = {}
        self.calls = self.done = 0
        self.held = 0
        self.known = self.unread = None
        self.forget()
        if self.looks_back is not None:
            self.looks_back.begin(None)
        self._go_to(0)

    def advance(self, scheduler: Any, timestep: Any) -> None:
        """One step is done. One that this denoiser had no part in (its pipeline has two) counts as time."""
        if self.told:
            if self.index == 0:
                # Where the call was traced, nobody could look before it.
                self._cut(scheduler, timestep)
                self._warn_of_few()
            self._note_step()
            self._go_to(self.index + 1)
            if not self.told:
                # The generation is over: what decodes the latents may need the memory.
                self.forget()

    def tell(self, index: int, total: int, conditions: int) -> None:
        """A bare model's step, from its user."""
        if index == 0 or not self.told or total != len(self.noise):
            self.begin([1.0 - i / total for i in range(total)], conditions)
            self._warn_of_few()
        else:
            self._note_step()
        self._go_to(index)

    @property
    def has_past(self) -> bool:
        """Whether a call can build on earlier ones: its step is known, and steps are not few."""
        if self.told:
            return len(self.noise) > FEW_STEPS
        return self.pipeline.given

    def _warn_of_few(self) -> None:
        steps, whole = len(self.noise), self.warmup_steps()
        reduces = self.reduction is not None and self.reduction.ratio > 0 and not self.has_stand_in
        if steps <= FEW_STEPS and whole and reduces:
            warnings.warn(
                f"{steps} steps, of which {min(steps, whole)} compute all tokens: little is left to save; "
                "with so few steps choose a method and unmerge without memory (method='tofu')",
                stacklevel=2,
            )
        if self.skipping is not None and self.skipping.speedup > 1:
            computed = steps - len(self.skipped_steps())
            if steps / max(1, computed) < self.skipping.speedup - 1e-6:
                warnings.warn(
                    f"speedup {self.skipping.speedup:g} is not reached: {computed} of {steps} steps must be "
                    f"computed ({steps / max(1, computed):.2f}x); lower warmup_steps or cooldown_steps, or "
                    "ask for more steps",
                    stacklevel=2,
                )

    def warmup_steps(self) -> int:
        """How many steps at the start compute all tokens: as asked, and until there is evidence."""
        if self.reduction is None or self.method is None:
            return 0
        cached = int(self.keys_values == "cached")
        return max(self.reduction.warmup_steps or 0, self.method.warmup, cached)

    def skipped_steps(self) -> set[int]:
        """Which steps of this generation the denoiser is not run at."""
        config, total = self.skipping, len(self.noise)
        if config is None or config.speedup == 1:
            return set()
        first, last = config.steps_needed, total - config.cooldown_steps
        return skipped_steps(str(config.rule), total, config.speedup, first, last)

    def steps(self) -> list[StepRecord]:
        """The steps of the last generation, the running one included."""
        return self.history + ([self._record()] if self.calls else [])

    def forget(self) -> None:
        """Drop everything that belongs to one generation."""
        self._forget_plans()
        for unit in self.units:
            unit.updates.clear()
        for projection in self.projections:
            projection.rows.clear()
        self.shapes.clear()
        self.constants.clear()
        if self.predictions is not None:
            self.predictions.past.clear()
        if self.corrections is not None:
            self.corrections.debts.clear()
        self.tracker = None
        self.opened = None

    def _announced(self) -> int:
        """Conditions in a batch, as the pipeline says; 0: it does not say, see `_look_back`."""
        pipeline = self.pipeline.get()
        if pipeline is None and self.pipeline.given:
            raise RuntimeError(
                "the pipeline that apply_tofu was given is gone, and with it what tells guidance; call "
                "apply_tofu on the pipeline that generates"
            )
        if pipeline is None or not self.family.guidance_in_batch:
            return 1
        guided = getattr(pipeline, "do_classifier_free_guidance", None)
        if guided is None:
            return 0
        # Guidance by a text and by a picture apart from each other (InstructPix2Pix) has three conditions.
        others = 2 if hasattr(pipeline, "image_guidance_scale") else 1
        perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)
        return 1 + others * bool(guided) + bool(perturbed)

    def _look_back(self) -> None:
        """Read, once a generation, what shapes do not tell; until then steps run whole (`blind`).

        A grid from the positions, where the call was traced. Whether a batch holds two conditions, where
        the pipeline does not say: then its halves have the same latents, also after the first step, which
        moves those of different prompts apart.
        """
        seen, self.unread = self.unread, None
        if seen is None:
            return
        if self.family.ids_name is not None:
            self.known = self.family.grids(None, {self.family.ids_name: seen})
        elif self.done > 1:
            first, second = seen.chunk(2)
            self.conditions = str(1 + torch.equal(first, second))
            # All that is remembered is of the whole batch, apart from what the tracker has of each image.
            if self.conditions == "2" and self.tracker is not None:
                self.tracker.halve(self.family.conditional_first)

    def _forget_plans(self) -> None:
        for shelf in self.shelves:
            shelf.clear()

    def _go_to(self, index: int) -> None:
        self.index = index
        self.told = index < len(self.noise)
        self.calls = 0
        if self.reduction is None or index % self.reduction.reuse == 0:
            self._forget_plans()
        if self.step is None:
            self.step = torch.full((), float(index))
        else:
            self.step.fill_(float(index))
        self._set_ratios()

    def _set_ratios(self) -> None:
        total = len(self.noise)
        noise = self.noise[min(self.index, total - 1)] if total else 1.0
        self.skip = self.remembers = False
        if self.skipping is not None:
            ready = self.done >= self.skipping.steps_needed
            self.skip = self.told and ready and self.index in self.skipped_steps()
        reduction = self.reduction
        if reduction is None:
            return
        first, last = self.warmup_steps(), total - reduction.cooldown_steps
        whole = bool(total) and (self.done < first or self.index >= last)
        self.remembers = not whole and first > 0
        for unit in self.units:
            unit.ratio = str(0.0 if whole else reduction.ratio_at(1.0 - noise, unit.depth))

    def _record(self) -> StepRecord:
        ratios = tuple("0.0" if self.blind else unit.ratio for unit in self.units)
        return StepRecord(self.calls, ratios, self.leaves_out())

    def _note_step(self) -> None:
        if self.calls:
            self.history.append(self._record())
            self._count_computed()
            self.done += not self.leaves_out()
            self._look_back()

    def _count_computed(self) -> None:
        """Add to every token's count of steps at which it was computed, by the first plan of its level."""
        levels = {shelf.level: shelf for shelf in reversed(self.shelves)} or dict.fromkeys([0])
        for level, grid in self.grids.items():
            if level not in levels or self.step is None:
                continue
            shelf = levels[level]
            counts = self.computed.get(level)
            if counts is None:
                counts = torch.zeros(self.images, grid.tokens, device=self.step.device)
            # Rows that were taken for images until guidance was seen (`_look_back`) ran whole.
            counts = self.computed[level] = counts[: self.images]
            if self.leaves_out():
                continue
            kept = shelf.kept() if shelf is not None else []
            if kept:
                counts.scatter_add_(1, kept[0], torch.ones_like(kept[0], dtype=counts.dtype))
            else:
                counts += 1

    # ---- within a call -------------------------------------------------------------------------

    def enter(self, model: Any, named: dict[str, Any]) -> None:
        """Before any module of the denoiser runs: read the grid, check limits, make room.

        Raises:
            RuntimeError: if the configuration needs the step and nobody told it.
            ValueError: if the ratio cannot be reached on this grid, or the call does not fit the scope.
            MemoryError: if the caches would exceed `memory_limit`.
        """
        if not torch.compiler.is_compiling():
            self.find_scheduler(named)
        sample: Tensor = named[self.family.sample_name]
        refusal = self.family.refusal(self.scope, named)
        if refusal is not None:
            raise ValueError(refusal)
        self._look_for_splits(model, named)
        if not self.told:
            self._stand_alone()
        elif self.calls >= CALLS_LIMIT:
            raise RuntimeError(
                f"the denoiser was called {self.calls} times without a scheduler step; "
                "in a loop of your own, call handle.step(i, n) before each step"
            )
        self.condition = str(self.calls)
        self.calls += 1
        self.blind = False
        batch = sample.shape[0]
        if self.condition == "0":
            before = self.shapes.get("0")
            if self.told and before is not None and before[0] != batch and not batch % self.images:
                # Guidance began or ended on the way; the images are the same.
                self.conditions = str(batch // self.images)
            conditions = int(self.conditions)
            if conditions == 0:
                self.blind = batch % 2 == 0
                self.unread = sample if self.blind else None
            conditions = max(1, conditions)
            self.images = batch // conditions if batch % conditions == 0 else batch
        self.groups = batch // self.images if batch % self.images == 0 else 1
        self.grids = self._grids(model, named)
        # One plan fits all rows if it is one image's, if images share it, or if only the seed decides.
        alike = self.images == 1 or self.reduction is None or self.reduction.share_plan
        alike = alike or (self.method is not None and self.method.same_for_all)
        self.one_by_one = self.family.shared_positions and not alike
        if not self.blind:
            self._check_reach()
        self.opened = None
        shape = (*sample.shape, str(sample.device))
        if self.shapes.get(self.condition) != shape:
            self._make_room(sample)
            # Caches made now (guidance began or ended on the way) are empty, where others hold a past.
            self.blind = self.blind or (self.remembers and self._bytes() > 0)
            self.shapes[self.condition] = shape
            if self.condition == "0" and not torch.compiler.is_compiling():
                self.last_call = shapes_only(named)
        if self.step is not None and self.step.device != sample.device:
            self.step = self.step.to(sample.device)
        if self.looks_back is not None:
            self.looks_back.to(sample.device)
        if self.predictions is not None and self.condition not in self.predictions.past:
            self.skip = False

    def leaves_out(self) -> bool:
        """Whether the denoiser does not run at this step."""
        return self.skip

    def predicted(self, return_dict: bool) -> Any:
        """What the denoiser would return at a step that leaves it out."""
        assert self.predictions is not None and self.step is not None
        out = self.predictions.forecast(self.condition, self.step, return_dict)
        if self._settles and self.corrections is not None:
            # No token is computed; what the latents get is noted for when it is.
            maps = self._maps(out[0])
            none = torch.zeros_like(maps[:, :1], dtype=torch.bool)
            self.corrections.settled(self.condition, maps, none, self.step)
        return out

    def conditional(self, x: Tensor, images: int) -> Tensor:
        """The conditional rows of a batch.  [B, ...] -> [I, ...]"""
        return x[:images] if self.family.conditional_first else x[-images:]

    def _grids(self, model: Any, named: dict[str, Any]) -> dict[int, TokenGrid]:
        """The grid of every level; where its numbers cannot be read now, a row of as many tokens."""
        family = self.family
        if self.fixed_grids is not None:
            return self.fixed_grids
        if family.ids_name is None:
            return family.grids(model, named)
        ids: Tensor = named[family.ids_name]
        if not torch.compiler.is_compiling():
            if self.known is None or ids is not self.ids:
                self.known, self.ids = family.grids(model, named), ids
            return self.known
        if not self.told:
            raise RuntimeError(
                f"a compiled {type(model).__name__} must be told its steps, or it cannot be known which "
                "tokens are neighbours: call handle.step(i, n) before each step of a bare model, or "
                "apply tofu to the whole pipeline"
            )
        if self.known is not None:
            return self.known
        self.blind, self.unread = True, ids
        return {0: TokenGrid(1, ids.shape[-2])}

    def removal(self, tokens: int, ratio: str) -> int:
        """How many of a grid's tokens go at a ratio; none of a grid smaller than `min_tokens`."""
        least = 0 if self.reduction is None else self.reduction.min_tokens
        return 0 if tokens < least else int(tokens * float(ratio))

    def in_use(self, unit: Unit) -> bool:
        """Whether the unit shrinks in this call: some only where runs are split, some only where not."""
        return unit.split is None or unit.split == self.split

    def plan(
        self, unit: Unit, metric: Tensor, importance: Callable[[int], dict[Source, Tensor]]
    ) -> Plan | None:
        """The unit's plan for this call's rows, made from `metric` [B, N, C] or shared; None: whole.

        Rows of one image share the plan of its conditional row. `importance` is called with the number of
        images, and gives what the method reads from the block itself.

        Raises:
            RuntimeError: if the metric's tokens are not the grid's.
        """
        grid = self.grids[unit.level]
        if metric.shape[1] != grid.total:
            raise RuntimeError(
                f"{unit.name} got {metric.shape[1]} tokens where its grid {grid} has {grid.total}; "
                "this denoiser does not belong to its family"
            )
        remove = self.removal(grid.tokens, unit.ratio)
        if remove == 0 or self.blind:
            return None
        shelf, key, whole = unit.shelf, str(remove), f"{remove}/{self.groups}"
        if whole not in shelf.plans:
            if key not in shelf.plans:
                shelf.plans[key] = self._make_plan(unit, metric, remove, importance)
            plan = shelf.plans[key].surrounded(grid.text_before, grid.text_after)
            shelf.plans[whole] = plan.repeat(self.groups) if self.groups > 1 else plan
            if self.family.rotary and self.keys_values == "fresh":
                shelf.removed[whole] = shelf.plans[whole].removed()
        return shelf.plans[whole]

    def removed_by(self, unit: Unit) -> Tensor | None:
        """Positions [B, N - K] that the unit's plan removes, where the attentions are given those too."""
        remove = self.removal(self.grids[unit.level].tokens, unit.ratio)
        return unit.shelf.removed.get(f"{remove}/{self.groups}")

    def update_cache(self, unit: Unit) -> UpdateCache | None:
        """The unit's cached updates under this condition, if its unmerge has any."""
        # Nothing else depends on the condition: compiled, it must not be looked at without need.
        return unit.updates.get(self.condition) if unit.unmerge in CACHED else None

    def context_cache(self, projection: Projection) -> Tensor | None:
        """The projection's remembered rows [B, N, C] under this condition."""
        return projection.rows.get(self.condition)

    def leave(self, out: Any) -> Any:
        """After the denoiser: note which tokens were computed and how their predictions changed.

        Returns:
            What the pipeline is given.
        """
        if self.predictions is not None and self.step is not None:
            if self.condition not in self.predictions.past:
                self._check_limit(self._bytes() + self.predictions.nbytes_for(out[0]))
            corrects = self.looks_back is self.predictions
            out = self.predictions.record(self.condition, out, self.step, corrects)
            self.held = max(self.held, self._bytes())
        if self.tracker is not None and self.step is not None:
            self._track(out, self.tracker, self.step)
        if self._settles and self.corrections is not None and self.step is not None:
            with torch.no_grad():
                return self._corrected(out, self.corrections, self.step)
        return out

    @property
    def finest(self) -> int:
        """The finest level with units: a denoiser may have no attention on finer ones (SDXL)."""
        return min(shelf.level for shelf in self.shelves)

    @property
    def _settles(self) -> bool:
        """Whether predictions of this generation are corrected by tokens."""
        return self.corrections is not None and self.corrections.moves is not None

    def _maps(self, prediction: Tensor) -> Tensor:
        """A prediction as maps, by the finest grid."""
        return self.family.prediction(prediction, self.grids[self.finest])

    def _corrected(self, out: Any, corrections: Corrections, step: Tensor) -> Any:
        """What the denoiser returned, with what the tokens lack that this step computed."""
        level = self.finest
        grid, maps = self.grids[level], self._maps(out[0])
        if self.condition not in corrections.debts:
            needed = self._bytes() + Debt.nbytes_for(maps)
            self._check_limit(needed)
            self.held = max(self.held, needed)
        kept = [rows for shelf in self.shelves if shelf.level == level for rows in shelf.kept()]
        computed = None
        if kept:
            flags = flags_of(kept, maps.new_empty(self.images, grid.tokens))
            places = on_maps(flags, grid.row if self.family.packed else grid, maps)
            computed = places.repeat(self.groups, 1, 1, 1, 1)
        maps = corrections.settled(self.condition, maps, computed, step)
        prediction = self.family.with_prediction(out[0], grid, maps)
        return with_prediction(out, prediction)

    def _track(self, out: Any, tracker: Tracker, step: Tensor) -> None:
        """Note which tokens were computed and how their predictions changed."""
        with torch.no_grad():
            maps = self._maps(out[0])
            images, groups = self.images, self.groups
            first = self.conditional(maps, images)
            if self.condition == "0":
                kept: dict[int, list[Tensor]] = {level: [] for level in tracker.grids}
                for shelf in self.shelves:
                    kept[shelf.level] += shelf.kept()
                back = maps[-images:] if self.family.conditional_first else maps[:images]
                tracker.note(first, back if groups > 1 else None, kept, step)
            elif self.condition == "1":
                tracker.note_second(first)

    def _make_plan(
        self,
        unit: Unit,
        metric: Tensor,
        remove: int,
        importance: Callable[[int], dict[Source, Tensor]],
    ) -> Plan:
        method = self.method
        assert method is not None
        with torch.no_grad():
            grid = self.grids[unit.level]
            start = grid.text_before
            rows = self.conditional(metric, self.images)[:, start : start + grid.tokens]
            age, scores = None, {}
            if self.tracker is not None and self.step is not None:
                age = self.tracker.age(unit.level, self.step)
                scores = self.tracker.importance(unit.level)
                if "cfg" in scores and not self.tracker.guided:
                    raise ValueError(
                        "importance source 'cfg' needs classifier-free guidance, and this generation "
                        "has none; raise guidance_scale above 1 or use source 'change'"
                    )
            for source, score in importance(self.images).items():
                scores[source] = score[:, start : start + grid.tokens]
            if self.reduction is not None and self.reduction.share_plan and self.images > 1:
                # Side by side, the cosine of two tokens is the mean of their cosines in every image.
                rows = normalise(rows).transpose(0, 1).flatten(1)[None]
                age = age[:1] if age is not None else None
                scores = {source: score.mean(0, keepdim=True) for source, score in scores.items()}
            evidence = Evidence(
                metric=rows,
                grid=grid,
                remove=remove,
                depth=unit.depth if method.reads_depth else 0.0,
                step=self.step if self.told else None,
                age=age,
                importance=scores,
                seed=0 if self.reduction is None else self.reduction.seed,
                matched=self.matched,
                constants=self.constants,
            )
            plan = method.plan(evidence)
            return plan if plan.kept.shape[0] == self.images else plan.repeat(self.images)

    def _stand_alone(self) -> None:
        if self.needs:
            raise RuntimeError(
                f"{', '.join(self.needs)} must know the denoising step, and nobody told it: call "
                "handle.step(i, n) before each step of a bare model, or apply tofu to the whole pipeline"
            )
        self._forget_plans()
        self.calls = 0
        self.conditions = "1"

    def _look_for_splits(self, model: Any, named: dict[str, Any]) -> None:
        reason = self.family.splits_runs(named)
        if reason is None and checkpoints_blocks(model):
            reason = "gradient checkpointing"
        for block in self.blocks:
            hook = hook_on(block)
            reason = reason or (None if hook is None else f"the diffusers hook {hook!r}")
        if reason is not None and self.scope == "span":
            raise ValueError(
                f"scope 'span' cannot run with {reason}, which acts between the blocks of a "
                "span; use scope='block'"
            )
        # Compiled one by one, blocks share a graph only if none of them is the first or last of something.
        alone = self.scope == "block" and any(map(compiled_alone, self.blocks))
        self.split = reason is not None or alone

    def find_scheduler(self, named: dict[str, Any]) -> None:
        """Follow a scheduler swapped after apply_tofu, and see which of its steps are really run."""
        pipeline = self.pipeline.get()
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None:
            return
        if not is_watched(scheduler, self):
            watch(scheduler, self)
            self.follow(scheduler)
        if self.told and self.index == 0 and self.calls == 0:
            self._cut(scheduler, named["timestep"] / self.family.timestep_scale)

    def _cut(self, scheduler: Any, timestep: Any) -> None:
        """See which of the scheduler's steps are really run, from the first one's timestep.

        Image-to-image skips the first of them, a base model before a refiner the last. The timestep is
        read where the pipeline announces fewer steps than were set, once.
        """
        planned = getattr(self.pipeline.get(), "num_timesteps", None)
        if planned and planned < len(self.noise):
            level = noise_level(scheduler, timestep)
            distances = [abs(noise - level) for noise in self.noise]
            begin = min(distances.index(min(distances)), len(self.noise) - planned)
            self.noise = self.noise[begin : begin + planned]
            back = self.looks_back
            if back is not None and back.moves is not None:
                back.begin(back.moves[begin : begin + planned])
            self._set_ratios()

    def _check_reach(self) -> None:
        for level, ratio in sorted({(unit.level, unit.ratio) for unit in self.units}):
            grid = self.grids[level]
            remove = self.removal(grid.tokens, ratio)
            most = self.method.max_remove(grid) if remove and self.method is not None else 0
            if remove > most:
                raise ValueError(
                    f"ratio {float(ratio):g} would remove {remove} of {grid.tokens} tokens on the "
                    f"{grid.height}x{grid.width} grid of level {level}, but method "
                    f"{self.reduction and self.reduction.method!r} can remove at most {most} there "
                    f"(ratio {most / grid.tokens:.3f}); lower the ratio, change the "
                    "method's options, or leave small grids whole with min_tokens"
                )

    def _make_room(self, sample: Tensor) -> None:
        """Allocate what this condition needs, unless that passes the limit."""
        batch = sample.shape[0]
        units = [unit for unit in self.units if unit.unmerge in CACHED and self.in_use(unit)]
        for unit in units:
            unit.updates.pop(self.condition, None)
        for projection in self.projections:
            projection.rows.pop(self.condition, None)
        if self.corrections is not None:
            self.corrections.debts.pop(self.condition, None)
        if self.predictions is not None:
            # How much room a prediction takes shows when there is one.
            self.predictions.past.pop(self.condition, None)
        needed = self._bytes()
        for unit in units:
            tokens = self.grids[unit.level].total
            needed += UpdateCache.nbytes_for(unit.unmerge, batch, tokens, unit.width, sample.dtype)
        for projection in self.projections:
            tokens = self.grids[projection.level].total
            needed += batch * tokens * projection.width * sample.element_size()
        # A prediction is as large as the latents, or its own check comes behind the first call.
        later = Debt.nbytes_for(self._maps(sample)) if self._settles else 0
        self._check_limit(needed + later)
        for unit in units:
            tokens = self.grids[unit.level].total
            unit.updates[self.condition] = UpdateCache.empty(
                unit.unmerge, batch, tokens, unit.width, sample.dtype, sample.device
            )
        for projection in self.projections:
            tokens = self.grids[projection.level].total
            projection.rows[self.condition] = sample.new_zeros(batch, tokens, projection.width)
        self.held = max(self.held, needed)
        if self.tracker is None and self.told and self.method is not None and self.method.sources:
            levels = {shelf.level for shelf in self.shelves}
            grids = {level: grid for level, grid in self.grids.items() if level in levels}
            if self.family.packed:
                grids = {level: grid.row for level, grid in grids.items()}
            self.tracker = Tracker(self.method.sources, self.images, grids, sample.device)

    def _check_limit(self, needed: int) -> None:
        limit = self.memory_limit
        if limit is not None and needed > limit * GIB:
            raise MemoryError(
                f"caches need {needed / GIB:.3g} GiB, above memory_limit {limit:g} GiB; "
                "raise it, use keys_values 'fresh' or 'dropped', unmerge 'copy', or a smaller batch"
            )

    def _bytes(self) -> int:
        """Held now in cached updates and cached keys and values."""
        updates = [cache.nbytes for unit in self.units for cache in unit.updates.values()]
        rows = [rows for projection in self.projections for rows in projection.rows.values()]
        kept = sum(each.nbytes for each in (self.predictions, self.corrections) if each is not None)
        return kept + sum(updates) + sum(each.numel() * each.element_size() for each in rows)
