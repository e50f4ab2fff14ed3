"""The forwards that tofu puts on a denoiser's root, blocks, attentions and key and value projections.

All are module-level functions with their state on the module, so that a deepcopy of a model carries its
own. A block with tokens x, plan M and update f:

    x + U(f(M x) - M x)        (U restores; ToMe for SD, arXiv 2303.17604, restores the update, not the state)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attach, detach, state_of
from .families.base import Family
from .fold import reduce
from .plan import Plan
from .restore import restore
from .rows import put, put_
from .session import Session
from .tracker import key_norm, received_attention
from .units import Projection, Unit


@dataclass(eq=False)
class Root:
    """State on the denoiser itself.

    Args:
        names: Its forward's parameters, in order.
        projections: (attention, attribute, state) of every key and value projection.
    """

    session: Session
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    projections: list[tuple[nn.Module, str, ProjectionSite]] = field(default_factory=list)


@dataclass(eq=False)
class Site:
    """State on a block.

    Args:
        span: The unit it belongs to; `first` and `last` say where in it the block stands.
        alone: The unit it is when its run must be split.
    """

    name: str
    session: Session
    original: Callable[..., Any]
    forward: Callable[..., Any]
    span: Unit
    first: bool
    last: bool
    alone: Unit
    plan: Plan | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    metric: Tensor | None = None
    importance: Callable[[int], Tensor] | None = None
    probing: bool = False


@dataclass(eq=False)
class AttentionSite:
    """State on a block's attention (scope "attention")."""

    name: str
    attribute: str
    site: Site
    unit: Unit
    original: Callable[..., Any]
    forward: Callable[..., Any]


@dataclass(eq=False)
class ProjectionSite:
    """State on the key or value projection of an attention (contexts "fresh" and "cached")."""

    attribute: str
    site: Site
    projection: Projection
    module: nn.Module
    original: Callable[..., Any]
    forward: Callable[..., Any]


def root_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The denoiser's forward, with the session told where it begins and ends."""
    root: Root = module.__dict__["_tofu"]
    session = root.session
    if not torch.compiler.is_compiling():
        follow_projections(root)
    session.enter(module, dict(zip(root.names, args, strict=False)) | kwargs)
    out = root.original(module, *args, **kwargs)
    session.leave(out[0])
    return out


def block_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward on the kept tokens, alone or as part of a span."""
    site: Site = module.__dict__["_tofu"]
    session, family = site.session, site.session.family
    unit = site.alone if session.split else site.span
    first, last = site.first or session.split, site.last or session.split
    x = family.hidden(args, kwargs)
    if first:
        plan = session.plan(unit, x, lambda images: importance_of(module, x, args, kwargs, images))
        folded = x if plan is None else reduce(x, plan, unit.fold)
        session.opened = (x, folded, plan)
    else:
        assert session.opened is not None
        plan, folded = session.opened[2], x
    site.plan = plan
    context = session.config.context
    if plan is None:
        out = site.original(module, *args, **kwargs)
    else:
        if context == "fresh":
            site.inputs = family.attention_inputs(module, x, args, kwargs)
        inner_args, inner_kwargs = family.with_hidden(args, kwargs, folded)
        inner_args, inner_kwargs = family.follow(inner_args, inner_kwargs, plan, context)
        out = site.original(module, *inner_args, **inner_kwargs)
        site.inputs = {}
        site.plan = None
    if not last:
        return out
    assert session.opened is not None
    entered, folded, _ = session.opened
    session.opened = None
    y = family.output(out)
    if plan is None:
        record_whole(session, unit, y, entered)
        return out
    full = entered + restored(session, unit, plan, y - folded, entered, folded).to(entered.dtype)
    if unit.fold == "prune":
        # Exactly what the model computed, not x + (y - x).
        full = put(full, plan.kept, y.to(full.dtype))
    return family.with_output(out, full)


def observed_block_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A whole block whose attentions shrink: its input, before the first norm, is their metric."""
    site: Site = module.__dict__["_tofu"]
    x = site.session.family.hidden(args, kwargs)
    site.metric = x
    site.importance = lambda images: importance_of(module, x, args, kwargs, images)
    out = site.original(module, *args, **kwargs)
    site.metric = site.importance = None
    return out


def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """An attention's forward on the kept tokens; its output is the update, the residual is outside."""
    here: AttentionSite = module.__dict__["_tofu"]
    site, session, unit = here.site, here.site.session, here.unit
    family = session.family
    x = family.hidden(args, kwargs)
    assert site.metric is not None and site.importance is not None
    plan = session.plan(unit, site.metric, site.importance)
    if plan is None:
        out = here.original(module, *args, **kwargs)
        tokens = out[0] if isinstance(out, tuple) else out
        record_whole(session, unit, tokens, None)
        return out
    folded = reduce(x, plan, unit.fold)
    site.plan = plan
    context = session.config.context
    if context == "fresh":
        site.inputs = {here.attribute: x}
    inner_args, inner_kwargs = family.with_hidden(args, kwargs, folded)
    inner_args, inner_kwargs = family.follow(inner_args, inner_kwargs, plan, context)
    out = here.original(module, *inner_args, **inner_kwargs)
    site.inputs = {}
    site.plan = None
    tokens = out[0] if isinstance(out, tuple) else out
    full = restored(session, unit, plan, tokens, x, folded).to(tokens.dtype)
    return (full, *out[1:]) if isinstance(out, tuple) else full


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


def follow_projections(root: Root) -> None:
    """Move to projections that were wrapped or unwrapped since (LoRA puts its own module there).

    Raises:
        ValueError: if keys and values are no longer projected by modules of their own (fused QKV).
    """
    for attention, attribute, state in root.projections:
        if getattr(attention, "fused_projections", False):
            raise ValueError(
                f"{state.projection.name} is now part of a fused QKV projection, which hides the keys and "
                f"values that context {state.site.session.config.context!r} needs; call "
                "unfuse_qkv_projections() or use context='none'"
            )
        current = getattr(attention, attribute)
        if state_of(current) is state:
            continue
        for module in (state.module, current):
            if state_of(module) is state:
                detach(module)
        state.module = current
        state.original = type(current).forward
        attach(current, projection_forward, state)


def record_whole(session: Session, unit: Unit, y: Tensor, x: Tensor | None) -> None:
    """Remember the update of a step that ran whole."""
    cache = session.update_cache(unit)
    if cache is not None and session.step is not None:
        with torch.no_grad():
            update = y if x is None else y - x
            cache.record(update.to(cache.value.dtype), session.step)


def restored(
    session: Session, unit: Unit, plan: Plan, update: Tensor, x: Tensor, folded: Tensor
) -> Tensor:
    """The update of every token from that of the kept ones.  [B, K, C] -> [B, N, C]"""
    cache = session.update_cache(unit)
    if cache is not None:
        update = update.to(cache.value.dtype)
    return restore(
        update,
        plan,
        unit.restore,
        x=x,
        folded=folded,
        cache=cache,
        step=session.step,
        max_age=session.max_age,
    )


def importance_of(module: Any, x: Tensor, args: Any, kwargs: Any, images: int) -> Tensor:
    """Importance read from the block's own first attention, of the conditional rows.  -> [I, N] float32"""
    site: Site = module.__dict__["_tofu"]
    session = site.session
    family: Family = session.family
    attentions: dict[str, Any] = dict(family.attentions(module))
    if not attentions:
        raise ValueError(
            f"{site.name} has no self-attention to read importance from; use source 'change'"
        )
    name, attention = next(iter(attentions.items()))
    inputs = family.attention_inputs(module, x, args, kwargs)[name][-images:]
    site.probing = True
    keys = attention.to_k(inputs)
    if session.method.source == "key_norm":
        importance = key_norm(keys)
    else:
        importance = received_attention(attention.to_q(inputs), keys, attention.heads)
    site.probing = False
    return importance
