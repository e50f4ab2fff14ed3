"""A block on its kept tokens.

With tokens x, plan M, block f and unmerge U a block becomes

    x + U(f(M x) - M x)        (ToMe for SD, arXiv 2303.17604, unmerges the update, not the state)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..families.base import Kwargs
from ..runtime.runtime import Runtime
from ..runtime.sites import Site
from ..tokens.gather import gather_rows
from ..tokens.merge import merge_tokens
from ..tokens.plan import Plan
from ..tokens.sources import SOURCES, BlockReading
from ..tokens.unmerge import unmerge_onto, unmerge_tokens
from ..tokens.update_cache import UpdateCache
from .patch import bind
from .state import BlockHook


def block_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block on the kept tokens, alone or as part of a span."""
    hook: BlockHook = module.__dict__["_tofu"]
    runtime, family, call = hook.runtime, hook.runtime.setup.family, hook.runtime.call
    site = hook.own_site if call.per_block else hook.span
    # In this order: compiled, where stacks are split it must not matter where in one the block stands.
    first, last = call.per_block or hook.first, call.per_block or hook.last
    named = bind(hook.names, args, kwargs)
    x = family.hidden(named)  # [B, N, C], or [B, K, C] inside a span
    if first:
        # 4  Choose the plan.
        plan = runtime.plan(site, x, lambda images: importance_of(module, x, named, images))
        # 5  Merge or prune.  [B, N, C] -> [B, K, C]
        merged = x if plan is None else merge_tokens(x, plan, site.merge)
        call.open_span = (x, merged, plan)
    else:
        assert call.open_span is not None
        plan, merged = call.open_span[2], x
    # 6  Run the block on the kept tokens.
    if plan is None:
        out = hook.original(module, *args, **kwargs)
    else:
        out = on_kept(
            hook,
            lambda given: hook.original(module, **given),
            lambda tokens, given: family.attention_inputs(module, tokens, given),
            named,
            x,
            merged,
            plan,
            runtime.removed_by(site),
        )
    if not last:
        return out
    # 7  Unmerge the update of the span, and remember it.  [B, K, C] -> [B, N, C]
    assert call.open_span is not None
    entered, merged, _ = call.open_span
    call.open_span = None
    y = family.output(out)
    if plan is None:
        record_unreduced(runtime, site, y, entered)
        return out
    cache, update = cached_update(runtime, site, y - merged)
    full = unmerge_onto(
        entered,
        update,
        plan,
        site.unmerge,
        # Pruned, exactly what the model computed, not x + (y - x).
        computed=y.to(entered.dtype) if site.merge == "prune" else None,
        merged=merged,
        cache=cache,
        step=call.step,
        max_age=runtime.setup.max_age,
    )
    return family.with_output(out, full, named)


def observed_block_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block whose attentions shrink: its input, before the first norm, is their metric."""
    hook: BlockHook = module.__dict__["_tofu"]
    named = bind(hook.names, args, kwargs)
    x = hook.runtime.setup.family.hidden(named)
    hook.metric = x
    hook.importance = lambda images: importance_of(module, x, named, images)
    out = hook.original(module, *args, **kwargs)
    hook.metric = hook.importance = None
    return out


def on_kept(
    hook: BlockHook,
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
    runtime, family = hook.runtime, hook.runtime.setup.family
    batch = given.shape[0]

    def once(named: Kwargs, x: Tensor, given: Tensor, plan: Plan, removed: Tensor | None) -> Any:
        hook.plan, hook.unreduced = plan, x
        if runtime.setup.keys_values == "fresh":
            if removed is None:
                hook.inputs = inputs(x, named)
            else:
                hook.inputs = inputs(
                    gather_rows(x, removed), family.slice_per_token(named, removed)
                )
        following = family.slice_block_arguments(named, plan, runtime.setup.keys_values, removed)
        out = call(family.with_hidden(following, given))
        hook.plan, hook.unreduced, hook.inputs = None, None, {}
        return out

    if not runtime.call.per_image:
        return once(named, x, given, plan, removed)
    outs = []
    for row in range(batch):
        hook.row = row
        at = slice(row, row + 1)
        one = Plan(plan.kept[at], plan.assign[at])
        gone = None if removed is None else removed[at]
        outs.append(
            parts_of(
                once(family.arguments_of_image(named, row, batch), x[at], given[at], one, gone)
            )
        )
    hook.row = None
    joined = tuple(None if part[0] is None else torch.cat(part) for part in zip(*outs, strict=True))
    return joined if len(joined) > 1 else joined[0]


def parts_of(out: Any) -> tuple[Any, ...]:
    """What a module returned, as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def record_unreduced(runtime: Runtime, site: Site, y: Tensor, x: Tensor | None) -> None:
    """Remember the update of a step that computed all tokens."""
    cache = runtime.update_cache(site)
    if cache is not None and runtime.call.step is not None:
        with torch.no_grad():
            update = y if x is None else y - x
            cache.record(update.to(cache.value.dtype), runtime.call.step)


def cached_update(
    runtime: Runtime, site: Site, update: Tensor
) -> tuple[UpdateCache | None, Tensor]:
    """The site's cache, and the update in its dtype."""
    cache = runtime.update_cache(site)
    return cache, update if cache is None else update.to(cache.value.dtype)


def unmerged(
    runtime: Runtime, site: Site, plan: Plan, update: Tensor, x: Tensor, merged: Tensor
) -> Tensor:
    """The update of every token from that of the kept ones.  [B, K, C] -> [B, N, C]."""
    cache, update = cached_update(runtime, site, update)
    return unmerge_tokens(
        update,
        plan,
        site.unmerge,
        x=x,
        merged=merged,
        cache=cache,
        step=runtime.call.step,
        max_age=runtime.setup.max_age,
    )


def importance_of(module: Any, x: Tensor, named: Kwargs, images: int) -> dict[str, Tensor]:
    """What the method's sources read of a block, of the conditional rows.  -> source -> [I, N] float32."""
    hook: BlockHook = module.__dict__["_tofu"]
    runtime = hook.runtime
    method = runtime.setup.method
    wanted = () if method is None else method.sources
    sources = [SOURCES[name] for name in wanted if SOURCES[name].score is not None]
    if not sources:
        return {}
    if hook.probe is not None:
        hook.probe = hook.probe.to(x.device)

    def attention() -> tuple[Any, Tensor]:
        """The block's first self-attention and its inputs."""
        attentions: dict[str, Any] = dict(runtime.setup.family.attentions(module))
        if not attentions:
            raise ValueError(
                f"{hook.name} has no self-attention to read importance from; use source 'change'"
            )
        name, first = next(iter(attentions.items()))
        inputs = runtime.setup.family.attention_inputs(module, x, named)[name]
        return first, runtime.conditional(inputs)

    family = runtime.setup.family
    queries, keys, _ = family.projections

    def projected(key: str) -> Tensor:
        first, inputs = attention()
        if not hasattr(first, key):
            raise ValueError(
                f"no importance can be read from {hook.name}, whose attention has no {key} of its own; "
                "use source 'change'"
            )
        # The projections remember nothing of this.
        hook.probing = True
        rows: Tensor = getattr(first, key)(inputs)
        hook.probing = False
        return rows

    reading = BlockReading(
        runtime.conditional(x),
        lambda: projected(keys),
        lambda: projected(queries),
        lambda: family.heads(attention()[0]),
        hook.probe,
    )
    return {each.name: each.score(reading) for each in sources if each.score is not None}
