"""A block's attention on its kept tokens (scope "attention")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..families.base import Kwargs
from ..tokens.merge import merge_tokens
from .block import on_kept, parts_of, record_unreduced, unmerged
from .keys_values import with_keys_values
from .patch import bind
from .state import AttentionHook


def attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """An attention's forward on the kept tokens; its output is the update, the residual is outside."""
    here: AttentionHook = module.__dict__["_tofu"]
    hook, runtime, site = here.hook, here.hook.runtime, here.site
    named = bind(here.names, args, kwargs)
    joint = runtime.setup.family.hidden(named)
    assert hook.metric is not None and hook.importance is not None
    # Where text and image share a sequence, text comes first.
    text = joint.shape[1] - hook.metric.shape[1]
    before, x = joint[:, :text], joint[:, text:]
    plan = runtime.plan(site, hook.metric, hook.importance)

    def call(given: Kwargs) -> Any:
        if here.rotary is not None:
            return with_keys_values(here.rotary, module, given)
        return here.original(module, **given)

    if plan is None:
        out = call(named)
        record_unreduced(runtime, site, parts_of(out)[0][:, text:], None)
        return out
    merged = merge_tokens(x, plan, site.merge)
    reduced = torch.cat([before, merged], dim=1) if text else merged
    out = on_kept(
        hook,
        call,
        lambda tokens, given: {here.attribute: tokens},
        named,
        x,
        reduced,
        plan,
        runtime.removed_by(site),
    )
    tokens, *others = parts_of(out)
    full = unmerged(runtime, site, plan, tokens[:, text:], x, merged).to(tokens.dtype)
    if text:
        full = torch.cat([tokens[:, :text], full], dim=1)
    if not isinstance(out, tuple):
        return full
    # (image, text), and with an IP-Adapter what its pictures add to the image.
    return (full, *others[:1], *(plan.broadcast(extra) for extra in others[1:]))
