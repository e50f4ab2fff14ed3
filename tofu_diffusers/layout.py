"""Which modules of a denoiser get which forward, worked out before anything is touched."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attach import attach
from .config import TofuConfig
from .families import Family, Run
from .session import Session
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
from .units import Projection, Shelf, Unit


@dataclass
class Stretch:
    """Consecutive blocks of one run that shrink as one unit."""

    run: Run
    blocks: list[tuple[str, nn.Module]]
    depths: list[float]


@dataclass
class Laid:
    """One block and the units it takes part in; fields as of Site."""

    name: str
    block: nn.Module
    span: Unit
    first: bool
    last: bool
    alone: Unit
    attentions: dict[str, Unit]
    projections: dict[str, dict[str, Projection]]


class Layout:
    """The units of one denoiser under one configuration. A refusal to make it leaves no trace.

    Raises:
        ValueError: if no site is left, or a block's keys and values cannot be had (fused projections).
    """

    def __init__(self, model: nn.Module, family: Family, config: TofuConfig) -> None:
        self.family = family
        self.config = config
        self.units: list[Unit] = []
        self.projections: list[Projection] = []
        self._shelves: dict[str, Shelf] = {}
        self._blocks: list[Laid] = []
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
        """Put the forwards on the denoiser's modules, with this session."""
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

    def _stretches(self, run: Run) -> list[Stretch]:
        """The run cut where blocks stay whole, and into single blocks unless a span is one unit."""
        stretches: list[Stretch] = []
        together = self.config.scope == "span" or self._block_equals_span()
        previous_whole = True
        for name, block in run.blocks:
            whole = self._is_whole(name, run.level)
            if stretches and together and not whole and not previous_whole:
                stretches[-1].blocks.append((name, block))
                stretches[-1].depths.append(self._depth[name])
            elif not whole:
                stretches.append(Stretch(run, [(name, block)], [self._depth[name]]))
            previous_whole = whole
        return stretches

    def _block_equals_span(self) -> bool:
        """Whether blocks one by one and a span of them give the same, up to rounding.

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

    def _lay(self, stretch: Stretch) -> bool:
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
                Laid(
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
