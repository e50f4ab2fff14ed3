"""Puts a forward of ours at the innermost position of a module, and takes it out again.

The only file that touches private state of diffusers or accelerate. Both wrap a module by keeping its
forward somewhere and putting their own on the instance. Ours goes where the class's forward is kept, so
that their hooks stay outside of it, whatever was added or removed before or after, and in which order.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

STATE = "_tofu"
ATTENTION_CACHES = ("faster_cache_block", "pyramid_attention_broadcast", "taylorseer_cache")
WRAPPERS = (STATE, "_hf_hook", "_diffusers_hook", "_old_forward")
"""Attributes of a module that change what its call does: ours, accelerate's and diffusers'."""
Forward = Callable[..., Any]


def attach(module: nn.Module, forward: Forward, state: object) -> None:
    """Make `forward(module, *args, **kwargs)` the module's innermost forward, with `state` on the instance.

    `forward` must be a module-level function: closures do not survive a deepcopy of the model.

    Raises:
        RuntimeError: if the module's own forward cannot be found because something replaced it.
    """
    original = type(module).forward
    ours = MethodType(forward, module)
    module.__dict__[STATE] = state
    if "forward" not in module.__dict__:
        module.__dict__["forward"] = ours
        return
    if not _swap(module, original, ours):
        del module.__dict__[STATE]
        raise RuntimeError(
            f"the forward of {type(module).__name__} was replaced by "
            f"{module.__dict__['forward']!r}; remove that change before apply_tofu"
        )


def check_within_reach(module: nn.Module) -> None:
    """Raise RuntimeError if `detach` would leave a wrapper around our forward, which needs the state."""
    ours = state_of(module).forward
    if not any(_is(holder.__dict__.get(name), ours) for holder, name in _slots(module)):
        raise RuntimeError(
            f"the forward of {type(module).__name__} was replaced after apply_tofu by "
            f"{module.__dict__.get('forward')!r}; take that change off first"
        )


def detach(module: nn.Module) -> None:
    """Undo `attach`: put the class's forward back wherever ours is, and drop the state."""
    current = module.__dict__.get("forward")
    state = module.__dict__.pop(STATE)
    ours = state.forward
    if _is(current, ours):
        del module.__dict__["forward"]
    _swap(module, ours, MethodType(type(module).forward, module))


@cache
def with_signature_of(own: Forward, forward: Forward) -> Forward:
    """A forward of ours that takes what a class's own does: pipelines ask it, and leave out the rest."""
    copied = FunctionType(forward.__code__, forward.__globals__, forward.__name__)
    copied.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return copied


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's own forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return dict(zip(names, args, strict=False)) | kwargs


def state_of(module: nn.Module) -> Any:
    """The state that `attach` put on the instance, or None."""
    return module.__dict__.get(STATE)


def changed_by_tomesd(model: nn.Module) -> bool:
    """Whether tomesd has patched this model: it swaps the classes of its blocks."""
    # Not by the attribute `_tome_info`, which remove_patch leaves on the model.
    return any(type(module).__name__ == "ToMeBlock" for module in model.modules())


def checkpoints_blocks(model: nn.Module) -> bool:
    """Whether gradient checkpointing will rerun blocks of this model one by one."""
    return torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


def hook_on(block: nn.Module) -> str | None:
    """Name of a diffusers hook on this very module (a cache, offloading), which acts around each call."""
    registry = getattr(block, "_diffusers_hook", None)
    return next(iter(registry.hooks), None) if registry is not None else None


def attention_cache_on(block: nn.Module) -> str | None:
    """Name of a diffusers cache inside a block that gives an attention's output again at later steps."""
    for module in block.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in registry.hooks if registry is not None else ():
            if name in ATTENTION_CACHES:
                return str(name)
    return None


def perturbed_by(attention: nn.Module) -> str | None:
    """Name of a guider's hook that leaves an attention's scores out, where queries are as many as keys."""
    registry = getattr(attention, "_diffusers_hook", None)
    for name, hook in registry.hooks.items() if registry is not None else ():
        if getattr(hook, "skip_attention_scores", False):
            return str(name)
    return None


def compiled_alone(block: nn.Module) -> bool:
    """Whether this module was compiled by itself (`compile_repeated_blocks`)."""
    return block._compiled_call_impl is not None


def weightless(model: nn.Module) -> nn.Module:
    """A copy of a denoiser as it is now, on the meta device: without weights, and without hooks of anybody.

    What changed its modules since it was loaded (LoRA, other layers) is in it, but for the format of its
    numbers: all are float32, as not every format can be had there, or computed with.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        # Tables of positions, which some models keep without registering them.
        tensors += [leaf for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            shape = torch.empty(tensor.shape, dtype=dtype, device="meta")
            of_weights = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(shape, requires_grad=False) if of_weights else shape
        for name in WRAPPERS:
            memo[id(module.__dict__.get(name))] = None
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            memo[id(hooks)] = OrderedDict()
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in (*WRAPPERS, "forward"):
            module.__dict__.pop(name, None)
    return twin


def _is(candidate: object, function: Forward) -> bool:
    return getattr(candidate, "__func__", None) is function


def _slots(module: nn.Module) -> Iterator[tuple[object, str]]:
    """Every place (holder, attribute) where a wrapper may keep the forward that it wraps."""
    registry = module.__dict__.get("_diffusers_hook")
    references = list(registry._fn_refs) if registry is not None else []
    for reference in references:
        yield reference, "forward"
        yield reference, "original_forward"
    yield module, "_old_forward"
    yield module, "forward"


def _swap(module: nn.Module, old: Forward, new: MethodType) -> bool:
    """Replace a method whose function is `old` by `new` in every slot; returns whether any was found."""
    found = False
    for holder, name in _slots(module):
        value = holder.__dict__.get(name)
        if _is(value, old):
            holder.__dict__[name] = new
            found = True
        elif value is not None and _is(getattr(value, "__wrapped__", None), old):
            # Wrappers remember what they wrap for inspect.signature; this is no call path.
            value.__wrapped__ = new
    return found
