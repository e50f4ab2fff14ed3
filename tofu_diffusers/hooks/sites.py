"""The forwards that tofu puts on a denoiser's root, blocks, attentions and key and value projections.

All are module-level functions with their state on the module, so that a deepcopy of a model carries its
own. A block with tokens x, plan M and update f:

    x + U(f(M x) - M x)        (U unmerges; ToMe for SD, arXiv 2303.17604, unmerges the update, not the state)
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..families.base import Kwargs
from ..runtime.session import Session
from ..runtime.units import Projection, Unit
from ..tokens.gather import put_, take
from ..tokens.merge import merge_tokens
from ..tokens.methods.base import Source
from ..tokens.plan import Plan
from ..tokens.statistics import key_norm, received_attention
from ..tokens.unmerge import UpdateCache, unmerge_onto, unmerge_tokens
from ..tuning.probes import sensitivity
from .patch import attach, bind, detach, state_of
from .rotary import QuerySite, RotarySite, with_context


@dataclass(eq=False)
class Root:
    """State on the denoiser itself.

    Args:
        session: Whose forwards are on the blocks now.
        names: Its forward's parameters, in order.
        layouts: Sessions with what puts their forwards on the blocks: the one that was asked for, and where
            that needs a past, one without.
        projections: (attention, attribute, state) of every projection that has one.
    """

    session: Session
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    layouts: list[tuple[Session, Any]] = field(default_factory=list)
    projections: list[tuple[nn.Module, str, ProjectionSite | QuerySite]] = field(
        default_factory=list
    )

    def __deepcopy__(self, memo: dict[int, Any]) -> Root:
        root = Root.__new__(Root)
        memo[id(self)] = root
        root.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return root

    def __reduce__(self) -> Any:
        # Its forwards would be looked for on the classes, and only when it is read back.
        raise pickle.PicklingError(
            "a denoiser with tofu cannot be pickled; call remove_tofu first, or write its weights by "
            "save_pretrained"
        )


@dataclass(eq=False)
class Site:
    """State on a block.

    Args:
        names: Its forward's parameters, in order.
        span: The unit it belongs to; `first` and `last` say where in it the block stands.
        alone: The unit it is when its run must be split.
        probe: Of the block, where importance is read with one; see `sensitivity`.

    While the block runs on kept tokens, `plan` says which, `whole` is what it would have been given, `inputs`
    what its attentions would read of tokens that they are not given (keys_values "fresh"), and `row` which
    row of the batch it is, if only one.
    """

    name: str
    session: Session
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    span: Unit
    first: bool
    last: bool
    alone: Unit
    probe: Tensor | None = None
    plan: Plan | None = None
    whole: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    row: int | None = None
    metric: Tensor | None = None
    importance: Callable[[int], dict[Source, Tensor]] | None = None
    probing: bool = False

    def forget(self) -> None:
        """Drop what belongs to one call."""
        self.plan = self.whole = self.row = self.metric = self.importance = None
        self.inputs, self.probing = {}, False


@dataclass(eq=False)
class AttentionSite:
    """State on a block's attention (scope "attention")."""

    name: str
    attribute: str
    site: Site
    unit: Unit
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    rotary: RotarySite | None = None


@dataclass(eq=False)
class ProjectionSite:
    """State on the key or value projection of an attention (keys_values "fresh" and "cached")."""

    name: str
    attribute: str
    site: Site
    projection: Projection
    module: nn.Module
    original: Callable[..., Any]
    forward: Callable[..., Any]


@dataclass(eq=False)
class NormSite:
    """State on a group norm inside a block, whose statistics run over the tokens."""

    site: Site
    original: Callable[..., Any]
    forward: Callable[..., Any]


def root_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The denoiser's forward, with the session told where it begins and ends."""
    root: Root = module.__dict__["_tofu"]
    named = bind(root.names, args, kwargs)
    if not torch.compiler.is_compiling():
        choose_layout(root, module, named)
        follow_projections(root)
    session = root.session
    session.enter(module, named)
    if session.leaves_out():
        return session.predicted(named.get("return_dict", True))
    if torch.compiler.is_compiling():
        # Traced, what sites hold during a call is never written to them.
        out = root.original(module, *args, **kwargs)
    else:
        out = unbroken(root, module, args, kwargs)
    return session.leave(out)


def choose_layout(root: Root, module: nn.Module, named: Kwargs) -> None:
    """Put on the forwards without memory where there is no past to use, and those asked for elsewhere.

    There is none in a generation of few steps, and in one call of a bare denoiser whose steps nobody tells.
    """
    if len(root.layouts) == 1:
        return
    (asked, _), (memoryless, _) = root.layouts
    asked.find_scheduler(named)
    wanted = asked if asked.has_past else memoryless
    if wanted is root.session:
        return
    for part in module.modules():
        if part is not module and state_of(part) is not None:
            detach(part)
    root.session.forget()
    root.projections.clear()
    root.session = wanted
    for session, layout in root.layouts:
        if session is wanted:
            layout.attach_blocks(session, root)


def unbroken(root: Root, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    """The denoiser's own forward; one that fails on the way leaves nothing behind for the next."""
    try:
        return root.original(module, *args, **kwargs)
    except BaseException:
        for part in module.modules():
            state = state_of(part)
            if isinstance(state, AttentionSite):
                state = state.rotary
            if isinstance(state, Site | RotarySite):
                state.forget()
        root.session.opened = None
        raise


def block_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward on the kept tokens, alone or as part of a span."""
    site: Site = module.__dict__["_tofu"]
    session, family = site.session, site.session.family
    unit = site.alone if session.split else site.span
    # In this order: compiled, where runs are split it must not matter where in one the block stands.
    first, last = session.split or site.first, session.split or site.last
    named = bind(site.names, args, kwargs)
    x = family.hidden(named)
    if first:
        plan = session.plan(unit, x, lambda images: importance_of(module, x, named, images))
        merged = x if plan is None else merge_tokens(x, plan, unit.merge)
        session.opened = (x, merged, plan)
    else:
        assert session.opened is not None
        plan, merged = session.opened[2], x
    if plan is None:
        out = site.original(module, *args, **kwargs)
    else:
        out = on_kept(
            site,
            lambda given: site.original(module, **given),
            lambda tokens, given: family.attention_inputs(module, tokens, given),
            named,
            x,
            merged,
            plan,
            session.removed_by(unit),
        )
    if not last:
        return out
    assert session.opened is not None
    entered, merged, _ = session.opened
    session.opened = None
    y = family.output(out)
    if plan is None:
        record_whole(session, unit, y, entered)
        return out
    cache, update = cached_update(session, unit, y - merged)
    full = unmerge_onto(
        entered,
        update,
        plan,
        unit.unmerge,
        # Pruned, exactly what the model computed, not x + (y - x).
        computed=y.to(entered.dtype) if unit.merge == "prune" else None,
        merged=merged,
        cache=cache,
        step=session.step,
        max_age=session.max_age,
    )
    return family.with_output(out, full, named)


def observed_block_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A whole block whose attentions shrink: its input, before the first norm, is their metric."""
    site: Site = module.__dict__["_tofu"]
    named = bind(site.names, args, kwargs)
    x = site.session.family.hidden(named)
    site.metric = x
    site.importance = lambda images: importance_of(module, x, named, images)
    out = site.original(module, *args, **kwargs)
    site.metric = site.importance = None
    return out


def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """An attention's forward on the kept tokens; its output is the update, the residual is outside."""
    here: AttentionSite = module.__dict__["_tofu"]
    site, session, unit = here.site, here.site.session, here.unit
    named = bind(here.names, args, kwargs)
    joint = session.family.hidden(named)
    assert site.metric is not None and site.importance is not None
    # Where text and image share a sequence, text comes first.
    text = joint.shape[1] - site.metric.shape[1]
    before, x = joint[:, :text], joint[:, text:]
    plan = session.plan(unit, site.metric, site.importance)

    def call(given: Kwargs) -> Any:
        if here.rotary is not None:
            return with_context(here.rotary, module, given)
        return here.original(module, **given)

    if plan is None:
        out = call(named)
        record_whole(session, unit, parts_of(out)[0][:, text:], None)
        return out
    merged = merge_tokens(x, plan, unit.merge)
    reduced = torch.cat([before, merged], dim=1) if text else merged
    out = on_kept(
        site,
        call,
        lambda tokens, given: {here.attribute: tokens},
        named,
        x,
        reduced,
        plan,
        session.removed_by(unit),
    )
    tokens, *others = parts_of(out)
    full = unmerged(session, unit, plan, tokens[:, text:], x, merged).to(tokens.dtype)
    if text:
        full = torch.cat([tokens[:, :text], full], dim=1)
    if not isinstance(out, tuple):
        return full
    # (image, text), and with an IP-Adapter what its pictures add to the image.
    return (full, *others[:1], *(plan.spread(extra) for extra in others[1:]))


def parts_of(out: Any) -> tuple[Any, ...]:
    """What a module returned, as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def on_kept(
    site: Site,
    call: Callable[[Kwargs], Any],
    inputs: Callable[[Tensor, Kwargs], dict[str, Tensor]],
    named: Kwargs,
    x: Tensor,
    given: Tensor,
    plan: Plan,
    removed: Tensor | None,
) -> Any:
    """Call a block or attention with the kept tokens instead of all.

    Args:
        call: The module's own forward, on arguments by name.
        inputs: (tokens, arguments) -> what the attentions read of these tokens (keys_values "fresh").
        x: All tokens [B, N, C].
        given: The kept ones [B, K, C], where the module takes it so behind the text.
        removed: Positions of the others, in rotary families.
    """
    session, family = site.session, site.session.family
    batch = given.shape[0]

    def once(named: Kwargs, x: Tensor, given: Tensor, plan: Plan, removed: Tensor | None) -> Any:
        site.plan, site.whole = plan, x
        if session.keys_values == "fresh":
            if removed is None:
                site.inputs = inputs(x, named)
            else:
                site.inputs = inputs(take(x, removed), family.select(named, removed))
        following = family.follow(named, plan, session.keys_values, removed)
        out = call(family.with_hidden(following, given))
        site.plan, site.whole, site.inputs = None, None, {}
        return out

    if not session.one_by_one:
        return once(named, x, given, plan, removed)
    outs = []
    for row in range(batch):
        site.row = row
        at = slice(row, row + 1)
        one = Plan(plan.kept[at], plan.assign[at])
        gone = None if removed is None else removed[at]
        outs.append(parts_of(once(family.row(named, row, batch), x[at], given[at], one, gone)))
    site.row = None
    whole = tuple(None if part[0] is None else torch.cat(part) for part in zip(*outs, strict=True))
    return whole if len(whole) > 1 else whole[0]


def projection_forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Keys or values of all tokens, though the attention was given the kept ones."""
    here: ProjectionSite = module.__dict__["_tofu"]
    site = here.site
    whole = site.inputs.get(here.attribute)
    if whole is not None:
        rows: Tensor = here.original(module, whole, *args, **kwargs)
        return rows
    rows = here.original(module, x, *args, **kwargs)
    cache = None if site.probing else site.session.context_cache(here.projection)
    if cache is None:
        return rows
    if site.plan is None:
        cache.copy_(rows.detach())
        return rows
    put_(cache, site.plan.kept, rows.detach().to(cache.dtype))
    return cache.to(rows.dtype)


def norm_forward(module: Any, x: Tensor) -> Tensor:
    """A group norm of the kept tokens by the statistics of all.  [B, C, K] -> [B, C, K]"""
    here: NormSite = module.__dict__["_tofu"]
    whole = here.site.whole
    if whole is None:
        normed: Tensor = here.original(module, x)
        return normed
    batch, groups = x.shape[0], module.num_groups
    every = whole.mT.reshape(batch, groups, -1).float()
    variance, mean = torch.var_mean(every, dim=2, keepdim=True, correction=0)
    y = (x.reshape(batch, groups, -1).float() - mean) * (variance + module.eps).rsqrt()
    y = y.view(x.shape)
    if module.affine:
        y = y * module.weight[:, None].float() + module.bias[:, None].float()
    result: Tensor = y.to(x.dtype)
    return result


def follow_projections(root: Root) -> None:
    """Move to projections that were wrapped or unwrapped since (LoRA puts its own module there).

    Raises:
        ValueError: if keys and values are no longer projected by modules of their own (fused QKV).
    """
    for attention, attribute, state in root.projections:
        check_unfused(attention, state.name, root.session.keys_values)
        current = getattr(attention, attribute)
        if state_of(current) is state:
            continue
        for module in (state.module, current):
            if state_of(module) is state:
                detach(module)
        state.module = current
        state.original = type(current).forward
        attach(current, state.forward, state)


def check_unfused(attention: nn.Module, name: str, keys_values: str) -> None:
    """Raise ValueError if queries, keys and values of all rows are not each projected by one module."""
    processor = type(getattr(attention, "processor", None)).__name__
    if processor.startswith("PAG"):
        raise ValueError(
            f"{name} projects the rows of perturbed-attention guidance apart from the others ({processor}), "
            f"which keys_values {keys_values!r} cannot follow; use keys_values='dropped', or StepSkipping"
        )
    # Attentions that cannot be unfused keep the flag when their processors are put back.
    flag = getattr(attention, "fused_projections", False)
    if "Fused" in processor or (flag and hasattr(attention, "unfuse_projections")):
        raise ValueError(
            f"{name} has fused QKV projections, which hide what keys_values {keys_values!r} needs; call "
            "unfuse_qkv_projections() or use keys_values='dropped'"
        )


def record_whole(session: Session, unit: Unit, y: Tensor, x: Tensor | None) -> None:
    """Remember the update of a step that ran whole."""
    cache = session.update_cache(unit)
    if cache is not None and session.step is not None:
        with torch.no_grad():
            update = y if x is None else y - x
            cache.record(update.to(cache.value.dtype), session.step)


def cached_update(
    session: Session, unit: Unit, update: Tensor
) -> tuple[UpdateCache | None, Tensor]:
    """The unit's cache, and the update in its dtype."""
    cache = session.update_cache(unit)
    return cache, update if cache is None else update.to(cache.value.dtype)


def unmerged(
    session: Session, unit: Unit, plan: Plan, update: Tensor, x: Tensor, merged: Tensor
) -> Tensor:
    """The update of every token from that of the kept ones.  [B, K, C] -> [B, N, C]"""
    cache, update = cached_update(session, unit, update)
    return unmerge_tokens(
        update,
        plan,
        unit.unmerge,
        x=x,
        merged=merged,
        cache=cache,
        step=session.step,
        max_age=session.max_age,
    )


def importance_of(module: Any, x: Tensor, named: Kwargs, images: int) -> dict[Source, Tensor]:
    """What the method's sources in the block say of the conditional rows.  -> source -> [I, N] float32"""
    site: Site = module.__dict__["_tofu"]
    session = site.session
    found: dict[Source, Tensor] = {}
    for source in session.method.sources if session.method is not None else ():
        if source == "gradient":
            assert site.probe is not None
            site.probe = site.probe.to(x.device)
            found[source] = sensitivity(session.conditional(x, images), site.probe)
        elif source in ("attention", "key_norm"):
            found[source] = attention_importance(module, x, named, images, source)
    return found


def attention_importance(
    module: Any, x: Tensor, named: Kwargs, images: int, source: Source
) -> Tensor:
    """Importance read from the block's own first attention, of the conditional rows.  -> [I, N] float32"""
    site: Site = module.__dict__["_tofu"]
    session = site.session
    family = session.family
    attentions: dict[str, Any] = dict(family.attentions(module))
    if not attentions:
        raise ValueError(
            f"{site.name} has no self-attention to read importance from; use source 'change'"
        )
    name, attention = next(iter(attentions.items()))
    inputs = session.conditional(family.attention_inputs(module, x, named)[name], images)
    site.probing = True
    keys = attention.to_k(inputs)
    if source == "key_norm":
        importance = key_norm(keys)
    else:
        importance = received_attention(attention.to_q(inputs), keys, attention.heads)
    site.probing = False
    return importance
