"""apply_tofu and remove_tofu: one call puts token reduction on a pipeline or model, one takes it off."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from .attach import attach, changed_by_tomesd, components, detach, state_of, unwrap
from .clock import unwatch, watch
from .config import TofuConfig, check_field_names
from .families import Family, Run, find_family, known_classes
from .profiles import default_config
from .session import PipelineReference, Projection, Session, Shelf, Unit
from .sites import (
    AttentionSite,
    ProjectionSite,
    Root,
    Site,
    attention_forward,
    block_forward,
    observed_block_forward,
    projection_forward,
    root_forward,
)
from .summary import Summary, site_stats, summarise


def apply_tofu(target: Any, config: TofuConfig | float | None = None, **options: Any) -> Handle:
    """Make a pipeline or denoiser run with fewer tokens, until `remove_tofu` or `handle.remove()`.

    Example:
        >>> handle = apply_tofu(pipe, ratio=0.5)
        >>> image = pipe("a red apple").images[0]
        >>> remove_tofu(pipe)

    Args:
        target: A pipeline (all its denoisers), a modular pipeline, or a denoiser, compiled or not.
        config: A TofuConfig, or a ratio. Without one, options build it: on the denoiser family's default
            profile, or, where they name a method, on that method's own fold and restore.
        options: Fields of TofuConfig; with a config they replace its fields.

    Returns:
        A handle: a context manager with `summary()`, `stats()`, `step()` and `remove()`.

    Raises:
        TypeError: if the target is no pipeline or model, or a number is not a number.
        ValueError: if the target has no denoiser of a known family or no site, was changed by tomesd, or
            the configuration does not hold. The target is then as it was.
    """
    check_field_names(options)
    pipeline, models = _denoisers(target, options.get("family"))
    if isinstance(config, TofuConfig):
        family = options.get("family", config.family)
    else:
        family = options.get("family")
        if config is not None:
            if "ratio" in options:
                raise ValueError(f"ratio given twice: {config!r} and {options['ratio']!r}")
            options["ratio"] = config
            config = None
    plans = []
    for model in models:
        if changed_by_tomesd(model):
            raise ValueError(
                f"{type(model).__name__} was changed by tomesd; call tomesd.remove_patch(pipe) first"
            )
        kind = find_family(model, family)
        resolved = (
            config.replace(**options) if config is not None else default_config(kind.name, options)
        )
        plans.append((model, kind, resolved, _Layout(model, kind, resolved)))
    remove_tofu(target)
    sessions = []
    try:
        for model, kind, resolved, layout in plans:
            session = Session(
                resolved, kind, layout.units, layout.projections, PipelineReference(pipeline)
            )
            sessions.append((model, session))
            layout.attach(model, session)
            scheduler = getattr(pipeline, "scheduler", None)
            if scheduler is not None:
                watch(scheduler, session)
    except BaseException:
        for model, session in sessions:
            _remove(model, session)
        raise
    return Handle(sessions)


def remove_tofu(target: Any) -> None:
    """Give back the exact original. Does nothing to a target without tofu.

    Args:
        target: What `apply_tofu` was given, or a (deep) copy of it.
    """
    parts = components(target)
    for model in [
        unwrap(part)
        for part in (parts.values() if parts else [target])
        if isinstance(part, nn.Module)
    ]:
        root = state_of(model)
        if isinstance(root, Root):
            _remove(model, root.session)


class Handle:
    """What `apply_tofu` returns. As a context manager it removes tofu at the end."""

    def __init__(self, sessions: list[tuple[nn.Module, Session]]) -> None:
        self._sessions = sessions

    @property
    def config(self) -> TofuConfig:
        """The configuration in force (of the first denoiser)."""
        return self._sessions[0][1].config

    @property
    def removed(self) -> bool:
        """Whether tofu was removed, or replaced by another apply_tofu."""
        return all(session.removed for _, session in self._sessions)

    def summary(self) -> Summary:
        """Sites, tokens in and kept, share of the denoiser's FLOPs saved, bytes of caches.

        Of the last generation, or of a nominal one if there was none. FLOPs are counted by torch's
        FlopCounterMode on a weightless copy of the denoiser.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        return summarise(self._sessions, _attached)

    def stats(self) -> list[dict[str, Any]]:
        """For every site of the last generation: `name, scope, calls, tokens_in, tokens_kept`.

        Tokens are those of one image in one condition, summed over the calls.

        Raises:
            RuntimeError: if the handle was removed.
        """
        self._check()
        return [row for _, session in self._sessions for row in site_stats(session)]

    def step(self, index: int, total: int, *, conditions: int = 1) -> None:
        """Tell a bare model its denoising step; call it before the step's forward(s).

        Args:
            index: Of the step, from 0.
            total: Steps in this generation.
            conditions: Into how many equal parts the batch falls by guidance (2: unconditional rows,
                then conditional ones). Guidance in two calls is `conditions=1`, conditional call first.

        Raises:
            RuntimeError: if the handle was removed.
            ValueError: if the step is not one of the total.
        """
        self._check()
        if not 0 <= index < total:
            raise ValueError(f"step {index} is not one of {total} steps; count from 0")
        if conditions < 1:
            raise ValueError(f"conditions {conditions} is below 1")
        for _, session in self._sessions:
            session.tell(index, total, conditions)

    def remove(self) -> None:
        """Give back the exact original.

        Raises:
            RuntimeError: if the handle was already removed.
        """
        self._check()
        for model, session in self._sessions:
            _remove(model, session)

    def _check(self) -> None:
        if self.removed:
            raise RuntimeError(
                "this handle was removed (by remove, remove_tofu or another apply_tofu); "
                "call apply_tofu again"
            )

    def __enter__(self) -> Handle:
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.removed:
            self.remove()


def _denoisers(target: Any, family: str | None) -> tuple[Any, list[nn.Module]]:
    """The pipeline (None for a bare model) and its denoisers, unwrapped."""
    parts = components(target)
    if not parts:
        if not isinstance(target, nn.Module):
            raise TypeError(
                f"apply_tofu takes a diffusers pipeline or a denoiser, not {type(target).__name__}"
            )
        return None, [unwrap(target)]
    models = {name: unwrap(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    known = known_classes()
    found = [
        model
        for model in models.values()
        if any(parent.__name__ in known for parent in type(model).__mro__)
    ]
    if not found:
        raise ValueError(
            f"{type(target).__name__} has no denoiser of a known class; it has "
            f"{', '.join(f'{n}: {type(m).__name__}' for n, m in models.items()) or 'no models'}, "
            f"and known are {', '.join(sorted(known))}"
        )
    return target, found


def _attached(model: nn.Module, like: Session) -> Session:
    """Put the tofu of another session on a bare model; returns its session."""
    handle = apply_tofu(model, like.config.replace(memory_limit=None))
    return handle._sessions[0][1]


def _remove(model: nn.Module, session: Session) -> None:
    for module in model.modules():
        if state_of(module) is not None:
            detach(module)
    unwatch(session)
    session.forget()
    session.removed = True


@dataclass
class _Stretch:
    """Consecutive blocks of one run that shrink as one unit."""

    run: Run
    blocks: list[tuple[str, nn.Module]]
    depths: list[float]


@dataclass
class _Laid:
    """One block and the units it takes part in; fields as of Site."""

    name: str
    block: nn.Module
    span: Unit
    first: bool
    last: bool
    alone: Unit
    attentions: dict[str, Unit]
    projections: dict[str, dict[str, Projection]]


class _Layout:
    """Which modules get which forward. Made before anything is touched, so that a refusal leaves no trace."""

    def __init__(self, model: nn.Module, family: Family, config: TofuConfig) -> None:
        self.family = family
        self.config = config
        self.units: list[Unit] = []
        self.projections: list[Projection] = []
        self._shelves: dict[str, Shelf] = {}
        self._blocks: list[_Laid] = []
        runs = family.runs(model)
        ordered = [block for run in runs for block in run.blocks]
        count = len(ordered)
        self._order = {name: i for i, (name, _) in enumerate(ordered)}
        self._depth = {name: i / max(1, count - 1) for name, i in self._order.items()}
        self._count = count
        acted = False
        for run in runs:
            for stretch in self._stretches(run):
                acted |= self._lay(stretch)
        if not acted:
            raise ValueError(
                f"{type(model).__name__} has no site for tofu: {count} blocks on levels "
                f"{sorted({run.level for run in runs})}, and levels={config.levels}, "
                f"first_blocks={config.first_blocks}, last_blocks={config.last_blocks}, "
                f"scope={config.scope!r} leave none; relax one of them"
            )

    def attach(self, model: nn.Module, session: Session) -> None:
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        root = Root(session, type(model).forward, root_forward, names)
        attach(model, root_forward, root)
        on_attention = self.config.scope == "attention"
        forward = observed_block_forward if on_attention else block_forward
        for laid in self._blocks:
            site = Site(
                laid.name,
                session,
                type(laid.block).forward,
                forward,
                laid.span,
                laid.first,
                laid.last,
                laid.alone,
            )
            attach(laid.block, forward, site)
            for attribute, attention in self.family.attentions(laid.block).items():
                if on_attention:
                    unit = laid.attentions[attribute]
                    original = type(attention).forward
                    state = AttentionSite(
                        unit.name, attribute, site, unit, original, attention_forward
                    )
                    attach(attention, attention_forward, state)
                for key, projection in laid.projections.get(attribute, {}).items():
                    module = getattr(attention, key)
                    rows = ProjectionSite(
                        attribute,
                        site,
                        projection,
                        module,
                        type(module).forward,
                        projection_forward,
                    )
                    attach(module, projection_forward, rows)
                    root.projections.append((attention, key, rows))

    def _is_whole(self, name: str, level: int) -> bool:
        config, index = self.config, self._order[name]
        inside = config.first_blocks <= index < self._count - config.last_blocks
        return not inside or (config.levels is not None and level not in config.levels)

    def _stretches(self, run: Run) -> list[_Stretch]:
        """The run cut where blocks stay whole, and into single blocks unless a span is one unit."""
        stretches: list[_Stretch] = []
        together = self.config.scope == "span" or self._block_equals_span()
        previous_whole = True
        for name, block in run.blocks:
            whole = self._is_whole(name, run.level)
            if stretches and together and not whole and not previous_whole:
                stretches[-1].blocks.append((name, block))
                stretches[-1].depths.append(self._depth[name])
            elif not whole:
                stretches.append(_Stretch(run, [(name, block)], [self._depth[name]]))
            previous_whole = whole
        return stretches

    def _block_equals_span(self) -> bool:
        """Whether blocks one by one and a span of them give the same, up to rounding (DESIGN: Scope).

        True for prune with any restore and for mean with copy, under one plan and one ratio, unless
        removed tokens need a current state between blocks (context "fresh").
        """
        config = self.config
        if config.scope != "block" or config.context == "fresh" or config.share == "block":
            return False
        if not config.depth_schedule.is_constant:
            return False
        folds = {config.fold_at(depth) for depth in (0.0, 1.0)}
        restores = {config.restore_at(depth) for depth in (0.0, 1.0)}
        return folds == {"prune"} or (folds == {"mean"} and restores == {"copy"})

    def _unit(
        self, name: str, run: Run, block_name: str, depth: float, width: int, split: bool | None
    ) -> Unit:
        config = self.config
        key = {"block": block_name, "run": run.name, "level": str(run.level)}[config.share]
        shelf = self._shelves.setdefault(key, Shelf(run.level))
        unit = Unit(
            name,
            run.level,
            shelf,
            depth,
            config.fold_at(depth),
            config.restore_at(depth),
            width,
            split=split,
        )
        self.units.append(unit)
        return unit

    def _lay(self, stretch: _Stretch) -> bool:
        """Plan the forwards of one stretch; returns whether any token can shrink there."""
        config, run = self.config, stretch.run
        blocks = stretch.blocks
        acted = False
        joint = None
        if len(blocks) > 1 and config.scope != "attention":
            depth = sum(stretch.depths) / len(stretch.depths)
            name = f"{blocks[0][0]}-{blocks[-1][0].rsplit('.', 1)[-1]}"
            joint = self._unit(name, run, blocks[0][0], depth, self._width(blocks[0][1]), False)
        for i, ((name, block), depth) in enumerate(zip(blocks, stretch.depths, strict=True)):
            attentions = self.family.attentions(block)
            if config.scope == "attention":
                units = {
                    attribute: self._unit(
                        f"{name}.{attribute}",
                        run,
                        name,
                        depth,
                        _whole_number(attention, "query_dim"),
                        None,
                    )
                    for attribute, attention in attentions.items()
                }
                if not units:
                    continue
                alone = next(iter(units.values()))
            else:
                units = {}
                alone = self._unit(
                    name, run, name, depth, self._width(block), None if joint is None else True
                )
            acted = True
            self._blocks.append(
                _Laid(
                    name,
                    block,
                    joint or alone,
                    joint is None or i == 0,
                    joint is None or i == len(blocks) - 1,
                    alone,
                    units,
                    self._projections(name, run, attentions),
                )
            )
        return acted

    def _projections(
        self, name: str, run: Run, attentions: dict[str, nn.Module]
    ) -> dict[str, dict[str, Projection]]:
        context = self.config.context
        found: dict[str, dict[str, Projection]] = {}
        for attribute, attention in attentions.items() if context != "none" else ():
            if getattr(attention, "fused_projections", False):
                raise ValueError(
                    f"{name}.{attribute} has fused QKV projections, which hide the keys and values "
                    f"that context {context!r} needs; call unfuse_qkv_projections() or use "
                    "context='none'"
                )
            width = _whole_number(attention, "inner_kv_dim")
            found[attribute] = {
                key: Projection(f"{name}.{attribute}.{key}", run.level, width)
                for key in ("to_k", "to_v")
            }
            if context == "cached":
                self.projections += found[attribute].values()
        return found

    def _width(self, block: nn.Module) -> int:
        attentions = self.family.attentions(block)
        attention: Any = next(iter(attentions.values())) if attentions else block.attn1
        return _whole_number(attention, "query_dim")


def _whole_number(module: nn.Module, name: str) -> int:
    value: Any = getattr(module, name)
    return int(value)
