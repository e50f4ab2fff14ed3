"""What happens inside one call of the denoiser: it begins, blocks ask for plans and caches, it ends.

All of it may be traced. It reads the step as a tensor, never its number, so that a compiled model is not
compiled again from step to step; nothing here waits for the device. The numbers are those of
docs/how_it_works.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..families.base import Family, gather_rows
from ..kernels.reference import normalise
from ..steps.corrector import Corrector, CorrectorState
from ..steps.outputs import tensors_in, with_tensors
from ..tokens.grid import TokenGrid
from ..tokens.methods import Evidence
from ..tokens.plan import Plan
from ..tokens.statistics import TokenStatistics, flags_of, on_maps
from ..tokens.unmerges import UNMERGES
from ..tokens.update_cache import UpdateCache
from .caches import Caches
from .call import CALLS_LIMIT, CHECKPOINTING, Call
from .grid_reader import GridReader
from .setup import Setup
from .sites import Projection, Site
from .text_padding import TextPadding


def shapes_only(arguments: dict[str, Any], family: Family) -> dict[str, Any]:
    """The same arguments with tensors on the meta device, in float32: their shapes and nothing else.

    But for what the denoiser reads itself, which is on the CPU.
    """

    def shape_only(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = torch.float32 if leaf.is_floating_point() else leaf.dtype
        return torch.empty(leaf.shape, dtype=dtype, device="meta")

    def copied(cache: Any) -> Any:
        """A cache's own copy, to which nobody else writes."""
        if isinstance(cache, Tensor) or not hasattr(cache, "__dict__"):
            return shape_only(cache)
        twin = copy.copy(cache)
        vars(twin).update(tree_map(copied, vars(cache)))
        return twin

    shapes: dict[str, Any] = tree_map(shape_only, arguments)
    for name in family.cache_names:
        shapes[name] = copied(arguments.get(name))
    for name in family.read_names:
        if arguments.get(name) is not None:
            shapes[name] = arguments[name].cpu()
    return shapes


def first_of(out: Any) -> Any:
    """The prediction in what a denoiser returned: a tensor, or a list of one a row."""
    return out if isinstance(out, Tensor) else out[0]


class Runtime:
    """One denoiser's setup, running call and caches, for the forwards on its modules."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.call = Call()
        self.caches = Caches(setup)
        self.reader = GridReader(setup.family)
        self.text = TextPadding(setup.family, setup.drop_text_padding)
        # Nobody named what stands in, so that it does what it can where it cannot do what was asked.
        self.takes_what_it_can = setup.stands_in

    # ---- the denoiser --------------------------------------------------------------------------

    def begin(
        self, model: Any, given: dict[str, Any], between: str | None, alone: bool
    ) -> dict[str, Any]:
        """Begin a call, before any module of the denoiser runs.

        Args:
            given: The denoiser's arguments.
            between: What acts between the blocks of a stack in this call, if anything does.
            alone: Whether blocks are compiled one by one.

        Returns:
            The arguments to run it with: those given, or without the padding of texts.

        Raises:
            RuntimeError: if the configuration needs the step and nobody told it.
            ValueError: if the ratio cannot be reached on this grid, or the call does not fit the scope.
            MemoryError: if the caches would exceed `memory_limit`.
        """
        setup, call = self.setup, self.call
        if setup.reduction is not None:
            # 2, of what needs no grid: refuse what cannot run.
            refusal = setup.family.refusal(setup.scope, given)
            if refusal is not None:
                raise ValueError(refusal)
            self._split_stacks(between, alone)
        whole = setup.family.computes_all(given)
        if not call.step_known:
            self._run_without_step(whole)
        call.count(setup)
        reads = self.text.reads
        named = self.text.cut(model, given, call)
        latents = setup.family.latents(named)
        sample = latents[0]
        # 1  Read images, branches of guidance and the grid.
        call.all_tokens = whole
        self._read_batch(sample)
        call.grids, call.starts = {}, {}
        if setup.reduction is not None:
            ids = None if setup.family.ids_name is None else given[setup.family.ids_name]
            call.grids = self.reader.grids(model, named, call, ids)
            call.starts = setup.family.image_starts(named)
        # One plan fits all rows if it is one image's, if images share it, or if only the seed decides.
        alike = call.images == 1 or setup.reduction is None or setup.reduction.share_plan
        alike = alike or (setup.method is not None and setup.method.same_for_all)
        call.per_image = setup.family.shared_positions and not alike
        # 2  Refuse a ratio that this grid cannot reach.
        if not call.all_tokens:
            self._check_ratios()
        # 3  Make room, where this branch is new or its latents have another shape.
        call.open_span = None
        sizes = tuple((grid.tokens, grid.total) for grid in call.grids.values())
        shape = (*[each.shape for each in latents], str(sample.device), call.conditions, sizes)
        if call.shapes.get(call.cfg_branch) != shape:
            self.caches.allocate(call, sample)
            # Caches made now (guidance began or ended on the way) are empty, where others hold a past.
            call.all_tokens = call.all_tokens or (call.caches_are_warm and self.caches.nbytes > 0)
            call.shapes[call.cfg_branch] = shape
            call.began_anew = True
            self._note_inputs(given, named)
        elif self.text.reads > reads:
            self._note_inputs(given, named)
        if call.step is not None and call.step.device != sample.device:
            call.step = call.step.to(sample.device)
        self.caches.to(sample.device)
        forecaster = self.caches.forecaster
        if forecaster is not None and call.cfg_branch not in forecaster.past:
            call.skip = False
        return named

    def forecast(self, return_dict: bool | None) -> Any:
        """What the denoiser would return at a step that skips it."""
        call, caches = self.call, self.caches
        assert caches.forecaster is not None and call.step is not None
        call.forecast += 1
        out = caches.forecaster.forecast(call.cfg_branch, call.step, return_dict)
        if caches.corrects_tokens and caches.corrector is not None:
            # No token is computed; what the latents get is noted for when it is.
            maps = self._maps(first_of(out))
            none = torch.zeros_like(maps[:, :1], dtype=torch.bool)
            caches.corrector.apply(call.cfg_branch, maps, none, call.step)
        return out

    def end(self, out: Any) -> Any:
        """End a call, behind the denoiser.

        Returns:
            What the pipeline is given.
        """
        call, caches = self.call, self.caches
        if call.step is None:
            return out
        # 8  Remember the output for forecasts. Before it is corrected for tokens: what is forecast is what
        # the denoiser computed.
        if caches.forecaster is not None and call.step_known:
            if call.cfg_branch not in caches.forecaster.past:
                caches.check_limit(caches.nbytes + caches.forecaster.nbytes_for(out))
            if self.setup.family.returns_sequence:
                caches.forecaster.keep_last(call.cfg_branch, out)
            out = caches.forecaster.record(call.cfg_branch, out, call.step)
            caches.peak_bytes = max(caches.peak_bytes, caches.nbytes)
        # 9  Note which tokens were computed and how their predictions changed.
        if caches.statistics is not None:
            self._note_statistics(out, caches.statistics, call.step)
        # 10  Correct the output by what was predicted wrongly for its tokens.
        if caches.corrects_tokens and caches.corrector is not None:
            with torch.no_grad():
                return self._corrected(out, caches.corrector, call.step)
        return out

    # ---- its blocks ----------------------------------------------------------------------------

    def plan(
        self, site: Site, metric: Tensor, importance: Callable[[int], dict[str, Tensor]]
    ) -> Plan | None:
        """Choose the site's plan for this call's rows (4), or take the one it shares.

        Rows of one image share the plan of its conditional row.

        Args:
            metric: [B, N, C], what tokens are compared by.
            importance: Called with the number of images; gives what the method reads from the block itself.

        Returns:
            The plan; None where all tokens are computed.

        Raises:
            RuntimeError: if the metric's tokens are not the grid's.
        """
        setup, call = self.setup, self.call
        grid = call.grids[site.resolution]
        if metric.shape[1] != grid.total:
            raise RuntimeError(
                f"{site.name} got {metric.shape[1]} tokens where its grid {grid} has {grid.total}; "
                "this denoiser does not belong to its family"
            )
        remove = self.tokens_removed(grid, site.ratio)
        if remove == 0 or call.all_tokens:
            return None
        branches = call.branches_in_batch
        cache, of_images = site.plan_cache, str(remove)
        of_batch = self._of_batch(site.resolution, remove)
        if of_batch not in cache.plans:
            if of_images not in cache.plans:
                cache.plans[of_images] = self._make_plan(site, metric, remove, importance)
            plan, starts = cache.plans[of_images], call.starts.get(site.resolution)
            if starts is None:
                plan = plan.padded(grid.text_before, grid.text_after)
            plan = plan.repeat(branches) if branches > 1 else plan
            cache.plans[of_batch] = plan if starts is None else plan.placed(starts, grid.total)
            if setup.family.rotary and setup.keys_values == "fresh":
                cache.removed[of_batch] = cache.plans[of_batch].removed()
        return cache.plans[of_batch]

    def tokens_removed(self, grid: TokenGrid, ratio: str) -> int:
        """How many of a grid's tokens go at a ratio."""
        asked, method = self.setup.tokens_asked(grid.tokens, ratio), self.setup.method
        if not asked or method is None or not self.takes_what_it_can:
            return asked
        return min(asked, method.max_remove(grid))

    def short_of(self) -> list[str]:
        """On which grids of this call what stands in removes fewer tokens than were asked for, in words."""
        setup, words = self.setup, list[str]()
        if setup.reduction is None or not setup.stands_in:
            return words
        ratio = str(setup.reduction.ratio)
        for resolution in sorted({each.resolution for each in setup.plan_caches}):
            grid = self.call.grids.get(resolution)
            if grid is None:
                continue
            can, asked = self.tokens_removed(grid, ratio), setup.tokens_asked(grid.tokens, ratio)
            if can < asked:
                words.append(
                    f"{can} of {grid.tokens} tokens instead of {asked} on the {grid.size} grid"
                )
        return words

    def removed_by(self, site: Site) -> Tensor | None:
        """Positions [B, N - K] that the site's plan removes, where the attentions are given those too."""
        grid = self.call.grids[site.resolution]
        remove = self.tokens_removed(grid, site.ratio)
        return site.plan_cache.removed.get(self._of_batch(site.resolution, remove))

    def _of_batch(self, resolution: int, remove: int) -> str:
        """The key of a plan for all rows of this call, with as many tokens around the grid as it has."""
        key = f"{remove}/{self.call.branches_in_batch}"
        # The branches of guidance may have texts of different lengths in calls of their own.
        grid = self.call.grids[resolution]
        around = grid.text_before or grid.text_after
        if resolution in self.call.starts:
            key = f"{key}/{self.call.cfg_branch}"
        return f"{key}/{grid.text_before}/{grid.text_after}" if around else key

    def update_cache(self, site: Site) -> UpdateCache | None:
        """The site's cached updates of this branch, if its unmerge has any."""
        # Nothing else depends on the branch: compiled, it must not be looked at without need.
        return site.updates.get(self.call.cfg_branch) if UNMERGES[site.unmerge].cached else None

    def rows_of(self, projection: Projection) -> Tensor | None:
        """The projection's remembered keys or values [B, N, C] of this branch."""
        return projection.rows.get(self.call.cfg_branch)

    def conditional(self, x: Tensor) -> Tensor:
        """The conditional rows of a batch.  [B, ...] -> [I, ...]."""
        return self.call.conditional(x)

    # ---- parts of the above --------------------------------------------------------------------

    def _note_inputs(self, given: dict[str, Any], named: dict[str, Any]) -> None:
        """Note the shapes of a call's arguments, for counted FLOPs; traced, nobody can."""
        if torch.compiler.is_compiling():
            return
        # Other branches of guidance count as the first, unless texts of other lengths are left of them.
        if self.call.cfg_branch == "0":
            self.call.inputs.clear()
        if self.call.cfg_branch == "0" or self.text.drops:
            shapes = shapes_only(named, self.setup.family)
            whole = shapes if named is given else shapes_only(given, self.setup.family)
            self.call.inputs[self.call.cfg_branch] = (shapes, whole)

    def _run_without_step(self, whole: bool) -> None:
        setup, call = self.setup, self.call
        # Some pipelines call their denoiser before or behind the steps, to fill a cache of their own.
        beside = setup.reduction is None or whole
        beside = beside and call.told_by_pipeline and call.number < CALLS_LIMIT
        if setup.needs and not beside:
            other = "remove_tofu"
            if setup.skipping is None:
                other = f"TokenReduction(method='tofu') or {other}"
            raise RuntimeError(
                f"{', '.join(setup.needs)} must know the denoising step, and nobody told it: call "
                "handle.step(i, n) before each step of a bare model; for a pipeline that steps no "
                f"scheduler of its own, use {other}"
            )
        self.caches.clear_plans()
        if not beside:
            call.number = 0
            if self.text.drops:
                # One call alone is a generation.
                self.text.start()
        call.cfg_branches = "1"

    def _split_stacks(self, between: str | None, alone: bool) -> None:
        if between == CHECKPOINTING:
            self._check_checkpointing()
        if between is not None and self.setup.scope == "span":
            raise ValueError(
                f"scope 'span' cannot run with {between}, which acts between the blocks of a "
                "span; use scope='block'"
            )
        # Compiled one by one, blocks share a graph only if none of them is the first or last of something.
        self.call.per_block = between is not None or (alone and self.setup.scope == "block")

    def _check_checkpointing(self) -> None:
        """Refuse what remembers, where blocks run twice."""
        sites = self.setup.sites
        cached = [site.unmerge for site in sites if UNMERGES[site.unmerge].cached]
        if cached or self.setup.projections:
            what = f"unmerge {cached[0]!r}" if cached else "keys_values 'cached'"
            raise ValueError(
                f"{what} cannot be trained through with gradient checkpointing: blocks run again in the "
                "backward pass, when its caches already hold this step; use method='tofu', whose unmerge "
                "remembers nothing, or disable_gradient_checkpointing()"
            )

    def _read_batch(self, sample: Tensor) -> None:
        """Find how many images the batch holds, and how often each."""
        call, batch = self.call, sample.shape[0]
        if call.cfg_branch == "0":
            before = call.shapes.get("0")
            changed = call.step_known and before is not None and before[0][0] != batch
            if changed and not batch % call.images:
                # Guidance began or ended on the way; the images are the same.
                call.cfg_branches = str(batch // call.images)
            branches = int(call.cfg_branches)
            if branches == 0:
                unknown = batch % 2 == 0
                call.all_tokens = call.all_tokens or unknown
                self.reader.deferred_latents = sample if unknown else None
            branches = max(1, branches)
            if batch % branches and call.told_by_hand:
                raise ValueError(
                    f"a batch of {batch} does not fall into the {branches} branches of guidance that "
                    "handle.step was told; give cfg_branches=1 where each call has one branch"
                )
            call.images = batch // branches if batch % branches == 0 else batch
        call.branches_in_batch = batch // call.images if batch % call.images == 0 else 1

    def _check_ratios(self) -> None:
        setup = self.setup
        for resolution, ratio in sorted({(site.resolution, site.ratio) for site in setup.sites}):
            grid = self.call.grids[resolution]
            remove = self.tokens_removed(grid, ratio)
            most = setup.method.max_remove(grid) if remove and setup.method is not None else 0
            if remove > most:
                raise ValueError(
                    f"ratio {float(ratio):g} would remove {remove} of {grid.tokens} tokens on the "
                    f"{grid.size} grid of resolution {resolution}, but method "
                    f"{setup.reduction and setup.reduction.method!r} can remove at most {most} there "
                    f"(ratio {most / grid.tokens:.3f}); lower the ratio, change the "
                    "method's options, or leave small grids out with min_tokens"
                )

    @property
    def _finest(self) -> int:
        """The finest resolution with sites: a denoiser may have no attention on finer ones (SDXL)."""
        return min(each.resolution for each in self.setup.plan_caches)

    def _maps(self, prediction: Any) -> Tensor:
        """A prediction as maps, by the finest grid."""
        return self.setup.family.prediction(prediction, self.call.grids[self._finest])

    def _corrected(self, out: Any, corrector: Corrector, step: Tensor) -> Any:
        """What the denoiser returned, with what the tokens lack that this step computed."""
        call, family, resolution = self.call, self.setup.family, self._finest
        grid, maps = call.grids[resolution], self._maps(first_of(out))
        if call.cfg_branch not in corrector.states:
            self.caches.require(self.caches.nbytes + CorrectorState.nbytes_for(maps))
        finest = [each for each in self.setup.plan_caches if each.resolution == resolution]
        kept = [rows for each in finest for rows in each.kept()]
        computed = None
        if kept:
            flags = flags_of(kept, maps.new_empty(call.images, grid.tokens))
            places = on_maps(flags, grid.row if family.latents_are_tokens else grid, maps)
            computed = places.repeat(call.branches_in_batch, 1, 1, 1, 1)
        maps = corrector.apply(call.cfg_branch, maps, computed, step)
        corrected = tensors_in(family.with_prediction(first_of(out), grid, maps))
        return with_tensors(out, [*corrected, *tensors_in(out)[len(corrected) :]])

    def _note_statistics(self, out: Any, statistics: TokenStatistics, step: Tensor) -> None:
        call = self.call
        with torch.no_grad():
            maps = self._maps(first_of(out))
            first = self.conditional(maps)
            if call.cfg_branch == "0":
                kept: dict[int, list[Tensor]] = {resolution: [] for resolution in statistics.grids}
                for each in self.setup.plan_caches:
                    kept[each.resolution] += each.kept()
                images = call.images
                back = maps[-images:] if call.conditional_first else maps[:images]
                statistics.note(first, back if call.branches_in_batch > 1 else None, kept, step)
            elif call.cfg_branch == "1":
                statistics.note_second(first)

    def _of_image(self, x: Tensor, resolution: int) -> Tensor:
        """The image's tokens of the conditional rows.  [I, S, ...] -> [I, N, ...]."""
        grid, starts = self.call.grids[resolution], self.call.starts.get(resolution)
        if starts is None:
            return x[:, grid.text_before : grid.text_before + grid.tokens]
        place = torch.arange(grid.tokens, device=x.device)
        return gather_rows(x, self.conditional(starts)[:, None] + place)

    def _make_plan(
        self,
        site: Site,
        metric: Tensor,
        remove: int,
        importance: Callable[[int], dict[str, Tensor]],
    ) -> Plan:
        setup, call, caches = self.setup, self.call, self.caches
        method, reduction = setup.method, setup.reduction
        assert method is not None and reduction is not None
        with torch.no_grad():
            grid = call.grids[site.resolution]
            rows = self._of_image(self.conditional(metric), site.resolution)
            age, scores = None, {}
            if caches.statistics is not None and call.step is not None:
                age = caches.statistics.age(site.resolution, call.step)
                scores = caches.statistics.importance(site.resolution)
                if "cfg" in scores and not caches.statistics.guided:
                    raise ValueError(
                        "importance source 'cfg' needs classifier-free guidance, and this generation "
                        "has none; raise guidance_scale above 1 or use source 'change'"
                    )
            for source, score in importance(call.images).items():
                scores[source] = self._of_image(score, site.resolution)
            if reduction.share_plan and call.images > 1:
                # Side by side, the cosine of two tokens is the mean of their cosines in every image.
                rows = normalise(rows).transpose(0, 1).flatten(1)[None]
                age = age[:1] if age is not None else None
                scores = {source: score.mean(0, keepdim=True) for source, score in scores.items()}
            evidence = Evidence(
                metric=rows,
                grid=grid,
                remove=remove,
                depth=site.depth if method.reads_depth else 0.0,
                step=call.step if call.step_known else None,
                age=age,
                importance=scores,
                seed=reduction.seed,
                matched=setup.needs_assignment,
                constants=caches.memo,
            )
            plan = method.plan(evidence)
            return plan if plan.kept.shape[0] == call.images else plan.repeat(call.images)
