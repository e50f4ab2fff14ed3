"""Which modules of a denoiser get which forward, worked out before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import KEYS_VALUES, SCOPES, TokenReduction
from ..families import BlockStack, Family, depths_of
from ..runtime.generation import Generation
from ..runtime.runtime import Runtime
from ..runtime.sites import PlanCache, Projection, Site
from ..tuning.probes import load_probes
from .attention import attention_forward
from .block import block_forward, observed_block_forward
from .denoiser import DenoiserHook, denoiser_forward
from .keys_values import (
    check_unfused,
    gate_forward,
    projection_forward,
    query_forward,
    rotary_forward,
)
from .norm import norm_forward
from .patch import attach, detach, parameters_of, state_of, with_signature_of
from .state import (
    AttentionHook,
    BlockHook,
    NormHook,
    ProjectionHook,
    QueryHook,
    RotaryAttentionHook,
)


@dataclass
class Span:
    """Consecutive blocks of one stack that shrink as one site."""

    stack: BlockStack
    blocks: list[tuple[str, nn.Module]]
    depths: list[float]


@dataclass
class BlockLayout:
    """One block and the sites it takes part in; fields as of Site."""

    name: str
    block: nn.Module
    span: Site
    first: bool
    last: bool
    own_site: Site
    attentions: dict[str, Site]
    projections: dict[str, dict[str, Projection]]


def attach_root(model: nn.Module, layouts: list[tuple[Generation, Layout]]) -> DenoiserHook:
    """Put the forwards on a denoiser, of the first generation and its layout."""
    generation, layout = layouts[0]
    names = parameters_of(model)
    own = type(model).forward
    forward = with_signature_of(own, denoiser_forward)
    hook = DenoiserHook(generation, own, forward, names, layouts=list(layouts))
    attach(model, forward, hook)
    try:
        layout.attach_blocks(generation.runtime, hook)
    except BaseException:
        for module in model.modules():
            if state_of(module) is not None:
                detach(module)
        raise
    return hook


def check_choices(model: nn.Module, family: Family, config: TokenReduction) -> None:
    """Raise ValueError if the family refuses what was chosen."""
    choices = {
        "scope": (config.scope, SCOPES, family.scopes_refused),
        "keys_values": (config.keys_values, KEYS_VALUES, family.keys_values_refused),
    }
    for name, (chosen, valid, refused) in choices.items():
        if chosen in refused:
            others = " or ".join(repr(each) for each in valid if each not in refused)
            raise ValueError(
                f"{name} {chosen!r} cannot be had in {type(model).__name__}: "
                f"{family.refused_because}; use {name}={others}"
            )


class Layout:
    """The sites of one denoiser under one configuration; none where no tokens are reduced.

    A refusal to make it leaves no trace.

    Raises:
        ValueError: if no site is left, or a block's keys and values cannot be had (fused projections).
    """

    def __init__(self, model: nn.Module, family: Family, config: TokenReduction | None) -> None:
        self.family = family
        self._config = config
        self.sites: list[Site] = []
        self.projections: list[Projection] = []
        self._plan_caches: dict[str, PlanCache] = {}
        self._blocks: list[BlockLayout] = []
        if config is None:
            return
        check_choices(model, family, config)
        stacks = family.block_stacks(model)
        ordered = [block for stack in stacks for block in stack.blocks]
        count = len(ordered)
        self._order = {name: i for i, (name, _) in enumerate(ordered)}
        self._depth = depths_of(stacks)
        self._count = count
        if not count:
            raise ValueError(
                f"{type(model).__name__} has no site for tofu: it has no block that family "
                f"{family.name!r} knows (its attention may work on maps); skip steps instead (speedup=2.0)"
            )
        acted = False
        for stack in stacks:
            for span in self._spans(stack):
                acted |= self._lay_out(span)
        if not acted:
            raise ValueError(
                f"{type(model).__name__} has no site for tofu: {count} blocks on resolutions "
                f"{sorted({stack.resolution for stack in stacks})}, and resolutions={config.resolutions}, "
                f"first_blocks={config.first_blocks}, last_blocks={config.last_blocks}, "
                f"scope={config.scope!r} leave none; relax one of them"
            )
        probe = config.method_options.get("probe")
        widths = {laid.name: laid.own_site.width for laid in self._blocks}
        self._probes = {} if probe is None else load_probes(probe, widths)

    def attach_blocks(self, runtime: Runtime, root: DenoiserHook) -> None:
        """Put the forwards on the modules inside the denoiser, with this runtime."""
        on_attention = self._on_attention
        forward = observed_block_forward if on_attention else block_forward
        for laid in self._blocks:
            hook = BlockHook(
                laid.name,
                runtime,
                type(laid.block).forward,
                forward,
                parameters_of(laid.block),
                laid.span,
                laid.first,
                laid.last,
                laid.own_site,
                self._probes.get(laid.name),
            )
            attach(laid.block, forward, hook)
            for norm in self.family.norms(laid.block):
                attach(norm, norm_forward, NormHook(hook, type(norm).forward, norm_forward))
            for attribute, attention in self.family.attentions(laid.block).items():
                rotary = self._attach_keys_values(root, hook, laid, attribute, attention)
                if on_attention:
                    site = laid.attentions[attribute]
                    state = AttentionHook(
                        site.name,
                        attribute,
                        hook,
                        site,
                        type(attention).forward,
                        attention_forward,
                        parameters_of(attention),
                        rotary,
                    )
                    attach(attention, attention_forward, state)
                elif rotary is not None:
                    attach(attention, rotary_forward, rotary)
            for attribute, attention in self._listeners(laid.block).items():
                rotary = self._attach_keys_values(root, hook, laid, attribute, attention)
                if rotary is not None:
                    attach(attention, rotary_forward, rotary)

    def _attach_keys_values(
        self,
        root: DenoiserHook,
        hook: BlockHook,
        laid: BlockLayout,
        attribute: str,
        attention: nn.Module,
    ) -> RotaryAttentionHook | None:
        """Put forwards on an attention's projections; in rotary families, the state for its own."""
        projections = laid.projections.get(attribute, {})
        if not projections:
            return None
        name = f"{laid.name}.{attribute}"
        if not self.family.rotary:
            for key, projection in projections.items():
                module = getattr(attention, key)
                original = type(module).forward
                rows = ProjectionHook(
                    name, attribute, hook, projection, module, original, projection_forward
                )
                attach(module, projection_forward, rows)
                root.projections.append((attention, key, rows))
            return None
        keys, values = projections.values()
        rotary = RotaryAttentionHook(
            name,
            attribute,
            hook,
            keys,
            values,
            type(attention).forward,
            rotary_forward,
            parameters_of(attention),
        )
        if self.config.keys_values == "fresh":
            forwards = {self.family.projections[0]: query_forward}
            for key, forward in (
                forwards | dict.fromkeys(self.family.gate_names, gate_forward)
            ).items():
                linear: Any = getattr(attention, key)
                queries = QueryHook(name, rotary, linear, type(linear).forward, forward)
                attach(linear, forward, queries)
                root.projections.append((attention, key, queries))
        return rotary

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The modules that shrink."""
        return tuple(laid.block for laid in self._blocks)

    @property
    def config(self) -> TokenReduction:
        """The configuration of what has sites."""
        assert self._config is not None
        return self._config

    @property
    def _on_attention(self) -> bool:
        return (
            self._config is not None
            and self.config.scope == "attention"
            and not self.family.blocks_are_attentions
        )

    def _stays_unreduced(self, name: str, resolution: int) -> bool:
        config, index = self.config, self._order[name]
        inside = config.first_blocks <= index < self._count - config.last_blocks
        return not inside or (
            config.resolutions is not None and resolution not in config.resolutions
        )

    def _spans(self, stack: BlockStack) -> list[Span]:
        """The stack cut where blocks are not reduced, and into single blocks unless a span is one site."""
        spans: list[Span] = []
        together = self.config.scope == "span" or self._block_equals_span()
        previous_unreduced = True
        for name, block in stack.blocks:
            unreduced = self._stays_unreduced(name, stack.resolution)
            if spans and together and not unreduced and not previous_unreduced:
                spans[-1].blocks.append((name, block))
                spans[-1].depths.append(self._depth[name])
            elif not unreduced:
                spans.append(Span(stack, [(name, block)], [self._depth[name]]))
            previous_unreduced = unreduced
        return spans

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
        merges = config.merges
        return merges == {"prune"} or (merges == {"mean"} and config.unmerges == {"copy"})

    def _site(
        self,
        name: str,
        stack: BlockStack,
        block_name: str,
        depth: float,
        width: int,
        split: bool | None,
    ) -> Site:
        config = self.config
        key = {"block": block_name, "stack": stack.name, "resolution": str(stack.resolution)}[
            str(config.share)
        ]
        plan_cache = self._plan_caches.setdefault(key, PlanCache(stack.resolution))
        unmerge = config.unmerge_at(depth)
        site = Site(
            name,
            stack.resolution,
            plan_cache,
            depth,
            config.merge_at(depth),
            unmerge,
            width,
            split=split,
        )
        self.sites.append(site)
        return site

    def _lay_out(self, span: Span) -> bool:
        """Plan the forwards of one span; returns whether any token can shrink there."""
        stack = span.stack
        blocks = span.blocks
        acted = False
        joint = None
        if len(blocks) > 1 and not self._on_attention:
            depth = sum(span.depths) / len(span.depths)
            name = f"{blocks[0][0]}-{blocks[-1][0].rsplit('.', 1)[-1]}"
            joint = self._site(name, stack, blocks[0][0], depth, self._width(blocks[0][1]), False)
        for i, ((name, block), depth) in enumerate(zip(blocks, span.depths, strict=True)):
            attentions = self.family.attentions(block)
            if self._on_attention:
                sites = {
                    attribute: self._site(
                        f"{name}.{attribute}",
                        stack,
                        name,
                        depth,
                        self.family.widths(attention)[0],
                        None,
                    )
                    for attribute, attention in attentions.items()
                }
                if not sites:
                    continue
                alone = next(iter(sites.values()))
            else:
                sites = {}
                alone = self._site(
                    name, stack, name, depth, self._width(block), None if joint is None else True
                )
            acted = True
            self._blocks.append(
                BlockLayout(
                    name,
                    block,
                    joint or alone,
                    joint is None or i == 0,
                    joint is None or i == len(blocks) - 1,
                    alone,
                    sites,
                    self._projections(name, stack, attentions | self._listeners(block)),
                )
            )
        return acted

    def _projections(
        self, name: str, stack: BlockStack, attentions: dict[str, nn.Module]
    ) -> dict[str, dict[str, Projection]]:
        keys_values = str(self.config.keys_values)
        found: dict[str, dict[str, Projection]] = {}
        for attribute, attention in attentions.items() if keys_values != "dropped" else ():
            # Where only the product is looked at (rotary, cached), it does not matter who projects.
            if not self.family.rotary or keys_values == "fresh":
                check_unfused(attention, f"{name}.{attribute}", keys_values)
            width = self.family.widths(attention)[1]
            found[attribute] = {
                key: Projection(f"{name}.{attribute}.{key}", stack.resolution, width)
                for key in self.family.projections[1:]
            }
            if keys_values == "cached":
                self.projections += found[attribute].values()
        return found

    def _listeners(self, block: nn.Module) -> dict[str, nn.Module]:
        """The block's attentions of other streams to which removed tokens' keys and values are given."""
        remembers = self.config.keys_values == "cached" and not self._on_attention
        return self.family.listeners(block) if remembers else {}

    def _width(self, block: nn.Module) -> int:
        attentions = self.family.attentions(block)
        attention: Any = next(iter(attentions.values())) if attentions else block.attn1
        return self.family.widths(attention)[0]
