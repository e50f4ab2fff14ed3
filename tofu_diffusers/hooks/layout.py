"""Which modules of a denoiser get which forward, worked out before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import TokenReduction
from ..families import Family, Run
from ..runtime.session import Session
from ..runtime.units import Projection, Shelf, Unit
from ..tuning.probes import load_probes
from .patch import attach, detach, parameters_of, state_of
from .rotary import QuerySite, RotarySite, query_forward, rotary_forward
from .sites import (
    AttentionSite,
    NormSite,
    ProjectionSite,
    Root,
    Site,
    attention_forward,
    block_forward,
    check_unfused,
    norm_forward,
    observed_block_forward,
    projection_forward,
    root_forward,
)


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


def attach_root(model: nn.Module, layouts: list[tuple[Session, Layout]]) -> Root:
    """Put the forwards on a denoiser, of the first session and its layout."""
    session, layout = layouts[0]
    names = parameters_of(model)
    root = Root(session, type(model).forward, root_forward, names, layouts=list(layouts))
    attach(model, root_forward, root)
    try:
        layout.attach_blocks(session, root)
    except BaseException:
        for module in model.modules():
            if state_of(module) is not None:
                detach(module)
        raise
    return root


class Layout:
    """The units of one denoiser under one configuration; none where no tokens are reduced.

    A refusal to make it leaves no trace.

    Raises:
        ValueError: if no site is left, or a block's keys and values cannot be had (fused projections).
    """

    def __init__(self, model: nn.Module, family: Family, config: TokenReduction | None) -> None:
        self.family = family
        self._config = config
        self.units: list[Unit] = []
        self.projections: list[Projection] = []
        self._shelves: dict[str, Shelf] = {}
        self._blocks: list[Laid] = []
        if config is None:
            return
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
                f"{type(model).__name__} has no site for tofu: {count} blocks on resolutions "
                f"{sorted({run.level for run in runs})}, and resolutions={config.resolutions}, "
                f"first_blocks={config.first_blocks}, last_blocks={config.last_blocks}, "
                f"scope={config.scope!r} leave none; relax one of them"
            )
        probe = config.method_options.get("probe")
        widths = {laid.name: laid.alone.width for laid in self._blocks}
        self._probes = {} if probe is None else load_probes(probe, widths)

    def attach_blocks(self, session: Session, root: Root) -> None:
        """Put the forwards on the modules inside the denoiser, with this session."""
        session.blocks = [laid.block for laid in self._blocks]
        on_attention = self._on_attention
        forward = observed_block_forward if on_attention else block_forward
        for laid in self._blocks:
            site = Site(
                laid.name,
                session,
                type(laid.block).forward,
                forward,
                parameters_of(laid.block),
                laid.span,
                laid.first,
                laid.last,
                laid.alone,
                self._probes.get(laid.name),
            )
            attach(laid.block, forward, site)
            for norm in self.family.norms(laid.block):
                attach(norm, norm_forward, NormSite(site, type(norm).forward, norm_forward))
            for attribute, attention in self.family.attentions(laid.block).items():
                rotary = self._attach_context(root, site, laid, attribute, attention)
                if on_attention:
                    unit = laid.attentions[attribute]
                    state = AttentionSite(
                        unit.name,
                        attribute,
                        site,
                        unit,
                        type(attention).forward,
                        attention_forward,
                        parameters_of(attention),
                        rotary,
                    )
                    attach(attention, attention_forward, state)
                elif rotary is not None:
                    attach(attention, rotary_forward, rotary)

    def _attach_context(
        self, root: Root, site: Site, laid: Laid, attribute: str, attention: nn.Module
    ) -> RotarySite | None:
        """Put forwards on an attention's projections; in rotary families, the state for its own."""
        projections = laid.projections.get(attribute, {})
        if not projections:
            return None
        name = f"{laid.name}.{attribute}"
        if not self.family.rotary:
            for key, projection in projections.items():
                module = getattr(attention, key)
                original = type(module).forward
                rows = ProjectionSite(
                    name, attribute, site, projection, module, original, projection_forward
                )
                attach(module, projection_forward, rows)
                root.projections.append((attention, key, rows))
            return None
        rotary = RotarySite(
            name,
            attribute,
            site,
            projections["to_k"],
            projections["to_v"],
            type(attention).forward,
            rotary_forward,
            parameters_of(attention),
        )
        if self.config.keys_values == "fresh":
            linear: Any = attention.to_q
            queries = QuerySite(name, rotary, linear, type(linear).forward, query_forward)
            attach(linear, query_forward, queries)
            root.projections.append((attention, "to_q", queries))
        return rotary

    @property
    def config(self) -> TokenReduction:
        """The configuration of what has units."""
        assert self._config is not None
        return self._config

    @property
    def _on_attention(self) -> bool:
        return (
            self._config is not None
            and self.config.scope == "attention"
            and not self.family.blocks_are_attentions
        )

    def _is_whole(self, name: str, level: int) -> bool:
        config, index = self.config, self._order[name]
        inside = config.first_blocks <= index < self._count - config.last_blocks
        return not inside or (config.resolutions is not None and level not in config.resolutions)

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

        True for prune with any unmerge and for mean with copy, under one plan and one ratio, unless
        removed tokens need a current state between blocks (keys_values "fresh").
        """
        config = self.config
        if config.scope != "block" or config.keys_values == "fresh" or config.share == "block":
            return False
        if not config.depth_schedule.is_constant:
            return False
        merges = {config.merge_at(depth) for depth in (0.0, 1.0)}
        unmerges = {config.unmerge_at(depth) for depth in (0.0, 1.0)}
        return merges == {"prune"} or (merges == {"mean"} and unmerges == {"copy"})

    def _unit(
        self, name: str, run: Run, block_name: str, depth: float, width: int, split: bool | None
    ) -> Unit:
        config = self.config
        key = {"block": block_name, "stack": run.name, "resolution": str(run.level)}[
            str(config.share)
        ]
        shelf = self._shelves.setdefault(key, Shelf(run.level))
        unmerge = config.unmerge_at(depth)
        unit = Unit(
            name,
            run.level,
            shelf,
            depth,
            config.merge_at(depth),
            unmerge,
            width,
            split=split,
        )
        self.units.append(unit)
        return unit

    def _lay(self, stretch: Stretch) -> bool:
        """Plan the forwards of one stretch; returns whether any token can shrink there."""
        run = stretch.run
        blocks = stretch.blocks
        acted = False
        joint = None
        if len(blocks) > 1 and not self._on_attention:
            depth = sum(stretch.depths) / len(stretch.depths)
            name = f"{blocks[0][0]}-{blocks[-1][0].rsplit('.', 1)[-1]}"
            joint = self._unit(name, run, blocks[0][0], depth, self._width(blocks[0][1]), False)
        for i, ((name, block), depth) in enumerate(zip(blocks, stretch.depths, strict=True)):
            attentions = self.family.attentions(block)
            if self._on_attention:
                units = {
                    attribute: self._unit(
                        f"{name}.{attribute}",
                        run,
                        name,
                        depth,
                        width_of(attention, "to_q", "in_features"),
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
        keys_values = str(self.config.keys_values)
        found: dict[str, dict[str, Projection]] = {}
        for attribute, attention in attentions.items() if keys_values != "dropped" else ():
            # Where only the product is looked at (rotary, cached), it does not matter who projects.
            if not self.family.rotary or keys_values == "fresh":
                check_unfused(attention, f"{name}.{attribute}", keys_values)
            width = width_of(attention, "to_k", "out_features")
            found[attribute] = {
                key: Projection(f"{name}.{attribute}.{key}", run.level, width)
                for key in ("to_k", "to_v")
            }
            if keys_values == "cached":
                self.projections += found[attribute].values()
        return found

    def _width(self, block: nn.Module) -> int:
        attentions = self.family.attentions(block)
        attention: Any = next(iter(attentions.values())) if attentions else block.attn1
        return width_of(attention, "to_q", "in_features")


def width_of(attention: nn.Module, projection: str, side: str) -> int:
    """Channels that a projection takes ("in_features") or gives ("out_features")."""
    width: Any = getattr(getattr(attention, projection), side)
    return int(width)
