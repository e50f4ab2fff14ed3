"""The denoiser's own forward: a call begins, is skipped or runs, and ends."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..families.base import Kwargs
from ..runtime.call import CHECKPOINTING
from ..runtime.generation import Generation
from ..runtime.runtime import Runtime
from ..steps.pipelines import generating, schedulers
from .keys_values import check_unfused
from .patch import (
    attach,
    attention_cache_on,
    bind,
    checkpoints_blocks,
    compiled_alone,
    detach,
    hook_on,
    perturbed_by,
    state_of,
)
from .state import AttentionHook, BlockHook, ProjectionHook, QueryHook, RotaryAttentionHook


@dataclass(eq=False)
class DenoiserHook:
    """State on the denoiser itself.

    Args:
        generation: Whose forwards are on the blocks now.
        names: Its forward's parameters, in order.
        layouts: Generations with what puts their forwards on the blocks: the one that was asked for, and
            where that needs a past, one without.
        projections: (attention, attribute, state) of every projection that has one.
        beside: Networks that rest where it is skipped.
    """

    generation: Generation
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    layouts: list[tuple[Generation, Any]] = field(default_factory=list)
    projections: list[tuple[nn.Module, str, ProjectionHook | QueryHook]] = field(
        default_factory=list
    )
    beside: list[nn.Module] = field(default_factory=list)

    @property
    def runtime(self) -> Runtime:
        """What its calls are run with now."""
        return self.generation.runtime

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoiserHook:
        hook = DenoiserHook.__new__(DenoiserHook)
        memo[id(self)] = hook
        hook.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return hook

    def __reduce__(self) -> Any:
        # Its forwards would be looked for on the classes, and only when it is read back.
        raise pickle.PicklingError(
            "a denoiser with tofu cannot be pickled; call remove_tofu first, or write its weights by "
            "save_pretrained"
        )


def denoiser_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run one call of the denoiser, or forecast what it would return if the step is skipped."""
    hook: DenoiserHook = module.__dict__["_tofu"]
    named = bind(hook.names, args, kwargs)
    if torch.compiler.is_compiling():
        return run(hook, module, named, args, kwargs)
    take_turn(hook, module, named)
    call = hook.runtime.call
    before = call.number, call.forecast
    try:
        return run(hook, module, named, args, kwargs)
    except BaseException:
        # A call that failed is none: the step may be tried again.
        call.number, call.forecast = before
        raise
    finally:
        leave_turn(hook)


# Stacks and locks are not for tracing. Where a graph breaks in this forward, what is behind it would be.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def take_turn(hook: DenoiserHook, module: nn.Module, named: Kwargs) -> None:
    """Keep other threads out, follow the one who calls, and put on what his generation needs."""
    hook.generation.turn.take(type(module).__name__)
    try:
        caller = generating(module, hook.generation.caller())
        told_by = [] if caller is None else schedulers(caller)
        for generation, _ in hook.layouts:
            generation.called_by(caller, told_by, named)
        choose_layout(hook, module)
        follow_projections(hook)
        if hook.generation.index == 0:
            check_caches(hook)
            check_parallel(hook, module)
        check_guiders(hook)
    except BaseException:
        hook.generation.turn.leave()
        raise


def check_caches(hook: DenoiserHook) -> None:
    """Refuse caches that give again what an attention returned for the tokens of another step.

    Raises:
        ValueError: if there is one in a block that is reduced.
    """
    for block in hook.runtime.setup.blocks:
        found = attention_cache_on(block)
        if found is not None:
            raise ValueError(
                f"diffusers' cache {found!r} gives again what an attention returned for the tokens of an "
                "earlier step, and tofu keeps other tokens at every step; disable_cache(), or take step "
                "skipping (speedup=2.0), or FirstBlockCache, with which token reduction runs"
            )


def check_parallel(hook: DenoiserHook, module: nn.Module) -> None:
    """Refuse to reduce tokens of which no process has all (diffusers' context parallelism).

    Raises:
        ValueError: if the denoiser runs so.
    """
    if hook.runtime.setup.blocks and getattr(module, "_parallel_config", None) is not None:
        raise ValueError(
            f"tokens are split between processes (enable_parallelism on this {type(module).__name__}), and "
            "none has all of them to choose from; skip steps instead (speedup=2.0)"
        )


def check_guiders(hook: DenoiserHook) -> None:
    """Refuse guiders that perturb attentions in this call, and would not where keys outnumber queries.

    Raises:
        ValueError: if there is one in a block that is reduced.
    """
    setup = hook.runtime.setup
    if setup.keys_values == "dropped" or all(site.ratio == "0.0" for site in setup.sites):
        return
    for block in setup.blocks:
        for attention in setup.family.attentions(block).values():
            found = perturbed_by(attention)
            if found is not None:
                raise ValueError(
                    f"a guider perturbs attentions ({found!r}), and leaves alone those with more keys than "
                    f"queries, as keys_values {setup.keys_values!r} makes them; use keys_values='dropped', "
                    "let it stop before tokens are reduced, or skip steps instead (speedup=2.0)"
                )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def leave_turn(hook: DenoiserHook) -> None:
    """Let the next one in."""
    hook.generation.turn.leave()
    if not hook.runtime.call.step_known:
        # A generation warns behind its first step; this call is alone.
        hook.generation.warn_of_reach()
        hook.generation.warn_of_padding()


def run(
    hook: DenoiserHook, module: nn.Module, named: Kwargs, args: tuple[Any, ...], kwargs: Kwargs
) -> Any:
    """One call, of the generation that is known by now."""
    runtime = hook.runtime
    blocks = runtime.setup.blocks
    # 1 to 3
    between = acts_between(hook, module, named)
    shorter = runtime.begin(module, named, between, any(map(compiled_alone, blocks)))
    if shorter is not named:
        args, kwargs = (), shorter
    if runtime.call.skip:
        check_gradients(module, named)
        # Some classes know no such argument, and have one form.
        asked = named.get("return_dict", True) if "return_dict" in hook.names else None
        return runtime.forecast(asked)
    if runtime.call.beside_rested:
        raise RuntimeError(
            f"this step of {type(module).__name__} was to be skipped, so that the ControlNet did not run, "
            "and now cannot be, because its inputs changed on the way; call remove_tofu before this pipeline"
        )
    # 4 to 7, in the blocks
    if torch.compiler.is_compiling():
        # Traced, what hooks hold during a call is never written to them.
        out = hook.original(module, *args, **kwargs)
    else:
        out = call_or_clean_up(hook, module, args, kwargs)
    # 8 to 10
    return runtime.end(out)


def check_gradients(module: nn.Module, named: Kwargs) -> None:
    """Refuse to forecast where a gradient is wanted: none would pass.

    Raises:
        RuntimeError: if an argument requires one.
    """
    wants = (isinstance(each, torch.Tensor) and each.requires_grad for each in named.values())
    if torch.is_grad_enabled() and any(wants):
        raise RuntimeError(
            f"gradients are wanted through a step at which {type(module).__name__} is skipped, and a "
            "forecast passes none; generate under torch.no_grad(), or call remove_tofu (reduced tokens pass "
            "gradients: ratio=0.5, method='tofu')"
        )


def choose_layout(hook: DenoiserHook, module: nn.Module) -> None:
    """Put on the forwards without memory where there is no past to use, and those asked for elsewhere.

    There is none in a generation of few steps, and in one call of a bare denoiser whose steps nobody tells.
    """
    if len(hook.layouts) == 1:
        return
    (asked, _), (memoryless, _) = hook.layouts
    wanted = asked if asked.has_past else memoryless
    if wanted is hook.generation:
        return
    for part in module.modules():
        if part is not module and state_of(part) is not None:
            detach(part)
    hook.generation.forget()
    hook.projections.clear()
    hook.generation = wanted
    for generation, layout in hook.layouts:
        if generation is wanted:
            layout.attach_blocks(generation.runtime, hook)


def acts_between(hook: DenoiserHook, module: nn.Module, named: Kwargs) -> str | None:
    """What acts between the blocks of a stack in this call, so that they must shrink one by one."""
    setup = hook.runtime.setup
    reason = setup.family.splits_stacks(named)
    if reason is None and checkpoints_blocks(module):
        reason = CHECKPOINTING
    for block in setup.blocks:
        other = hook_on(block)
        reason = reason or (None if other is None else f"the diffusers hook {other!r}")
    return reason


def call_or_clean_up(
    hook: DenoiserHook, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
) -> Any:
    """Run the denoiser's own forward; one that fails on the way leaves nothing behind for the next."""
    try:
        return hook.original(module, *args, **kwargs)
    except BaseException:
        for part in module.modules():
            state = state_of(part)
            if isinstance(state, AttentionHook):
                state = state.rotary
            if isinstance(state, BlockHook | RotaryAttentionHook):
                state.forget()
        hook.runtime.call.open_span = None
        raise


def follow_projections(hook: DenoiserHook) -> None:
    """Move to projections that were wrapped or unwrapped since (LoRA puts its own module there).

    Raises:
        ValueError: if keys and values are no longer projected by modules of their own (fused QKV).
    """
    for attention, attribute, state in hook.projections:
        check_unfused(attention, state.name, hook.runtime.setup.keys_values)
        current = getattr(attention, attribute)
        if state_of(current) is state:
            continue
        for module in (state.module, current):
            if state_of(module) is state:
                detach(module)
        state.module = current
        state.original = type(current).forward
        attach(current, state.forward, state)
