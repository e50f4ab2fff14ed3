"""A network beside the denoiser, as a ControlNet: nobody reads its output where the denoiser is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..runtime.generation import Generation
from ..steps.outputs import form_of, tensors_in, with_tensors
from ..steps.pipelines import generating
from ..steps.reference import Reference
from .patch import attach, with_signature_of


@dataclass(eq=False)
class BesideHook:
    """State on a network beside the denoiser.

    Args:
        denoiser: The denoiser's hook; weak, so that a copy of this network takes no denoiser along.
        forward: What is put on the network.

    Attributes:
        number: How many calls of this step came before.
        index: The step that they are counted in.
        returned: What each call of a step returned when it last ran, without numbers, and the shapes that it
            was given.
    """

    denoiser: Reference
    forward: Callable[..., Any]
    number: int = 0
    index: int = -1
    returned: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def generation(self, module: nn.Module) -> Generation | None:
        """The generation that calls this network now; None if tofu knows of none."""
        hook = self.denoiser()
        found: Generation | None = None if hook is None else hook.generation
        if found is None or found.removed or not found.runtime.call.step_known:
            return None
        # The pipeline of a generation that was broken off may not be the one that calls.
        caller = found.caller()
        return found if caller is not None and generating(module, caller) is caller else None


def attach_beside(module: nn.Module, denoiser: Any) -> None:
    """Let a network rest at the steps that skip the denoiser."""
    forward = with_signature_of(type(module).forward, beside_forward)
    attach(module, forward, BesideHook(Reference(denoiser), forward))


# Asks who calls, which is not for tracing. What the network itself is compiled to stays so.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def rest(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Any]:
    """See which call of the step this is, and whether it can rest.

    Returns:
        Its number, -1 where nothing is to be remembered; zeros in the form of its output, None if it runs.
    """
    hook: BesideHook = module.__dict__["_tofu"]
    generation = hook.generation(module)
    if generation is None:
        return -1, None
    if generation.index != hook.index:
        hook.index, hook.number = generation.index, 0
    number, hook.number = hook.number, hook.number + 1
    call = generation.runtime.call
    form, shapes = hook.returned.get(number, (None, None))
    # With other shapes the denoiser will have none to forecast from, and run.
    if not call.skip or shapes != shapes_in(args, kwargs):
        return number, None
    call.beside_rested = True
    return number, with_tensors(form, [torch.zeros_like(each) for each in tensors_in(form)])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def remember(
    module: nn.Module, number: int, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Note the form of an output."""
    module.__dict__["_tofu"].returned[number] = form_of(out), shapes_in(args, kwargs)


def shapes_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The shapes of all tensors that a call is given."""
    return [each.shape for each in tensors_in([args, kwargs])]


def beside_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the network, or give zeros where the denoiser is skipped."""
    number, zeros = rest(module, args, kwargs)
    if zeros is not None:
        return zeros
    out = type(module).forward(module, *args, **kwargs)
    if number >= 0:
        remember(module, number, out, args, kwargs)
    return out
