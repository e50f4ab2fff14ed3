"""Counts the denoiser's FLOPs with and without tofu, on a copy without weights.

torch's FlopCounterMode runs over the real forward of a copy on the meta device, with the same forwards
attached: what it counts is what runs. Nothing is computed and no weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as tracing
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..hooks.patch import weightless
from ..runtime.generation import FEW_STEPS, Generation
from ..runtime.runtime import Runtime, shapes_only

WHOLE = 3  # steps before the counted one: enough evidence for any method
TOTAL = FEW_STEPS + 1  # no warning of few steps


class UncountedError(RuntimeError):
    """FLOPs of a denoiser cannot be counted; the message says why."""


TAKES_REAL = (Tensor.__getitem__, Tensor.__setitem__, Tensor.repeat_interleave)
"""What gives a tensor without numbers another shape by numbers of another one."""


class Numberless(TorchFunctionMode):
    """Lets a forward run on the meta device that reads numbers, of which those it must have are real."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            # Made of numbers, as the size of an image, it keeps them.
            return func(*args, **{**kwargs, "device": "cpu"})
        if func is Tensor.bincount and args[0].is_meta:
            # Of experts, who are alike: one has all tokens.
            return torch.tensor([args[0].numel()])
        # One real number is as good as any.
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mixed = len({each.is_meta for each in tensors if each.is_meta or each.ndim}) > 1
        if mixed and not (func in TAKES_REAL and tensors[0].is_meta):
            # Asked of both, kernels of the CPU read numbers where there are none.
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


class _Autocast(torch.autocast):
    """Autocast, which knows nothing of the meta device."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Let a denoiser run on the meta device, whatever it asks of its numbers that does not change FLOPs."""
    autocast = torch.autocast
    torch.autocast = _Autocast  # type: ignore[misc]
    try:
        # A tensor indexed by flags is as long as with all of them.
        with tracing.patch(meta_nonzero_assume_all_nonzero=True), Numberless():  # type: ignore[attr-defined]
            yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def count(
    model: nn.Module,
    runtime: Runtime,
    settings: Iterable[tuple[str, ...]],
    attached: Callable[[nn.Module], Generation],
) -> dict[tuple[str, ...], int]:
    """Count the FLOPs of one computed forward of the denoiser for each setting of its sites' ratios.

    Args:
        model: The denoiser; its modules are used, not its weights.
        runtime: Whose configuration and last call's shapes to count with.
        settings: Ratios of all sites, in their order.
        attached: Puts the same tofu on a copy of the denoiser and returns its generation.

    Raises:
        UncountedError: if the denoiser cannot run without numbers, or was not called and has no example.
    """
    setup, call = runtime.setup, runtime.call
    inputs = call.inputs
    if inputs is None:
        example = setup.family.example(model)
        if example is None:
            raise UncountedError("it was not called yet")
        inputs = shapes_only(example, setup.family)
    try:
        return _counted(weightless(model).eval(), runtime, inputs, settings, attached)
    except Exception as error:
        # Whatever a model does with numbers of tensors that have none.
        raise UncountedError(f"{type(error).__name__}: {error}") from error


def _counted(
    twin: nn.Module,
    runtime: Runtime,
    inputs: dict[str, Any],
    settings: Iterable[tuple[str, ...]],
    attached: Callable[[nn.Module], Generation],
) -> dict[tuple[str, ...], int]:
    call = runtime.call
    counts = {}
    copy = attached(twin)
    copy.runtime.reader.fixed = call.grids
    copy.runtime.takes_what_it_can = runtime.takes_what_it_can
    # Not known yet: then all tokens were computed, however many there are.
    branches = max(1, int(call.cfg_branches))
    with torch.no_grad(), without_numbers():
        # Computed steps make the evidence and fill the caches that reduced steps read.
        for step in range(WHOLE):
            copy.set_step(step, TOTAL, branches)
            _set(copy.runtime, None)
            twin(**inputs)
        for setting in settings:
            copy.set_step(WHOLE, TOTAL, branches)
            _set(copy.runtime, setting)
            with FlopCounterMode(display=False) as counter:
                twin(**inputs)
            counts[setting] = int(counter.get_total_flops())
    return counts


def _set(runtime: Runtime, setting: tuple[str, ...] | None) -> None:
    """Give the copy's sites the ratios of a setting; None: all tokens are computed."""
    runtime.call.skip = False
    sites = runtime.setup.sites
    for site, ratio in zip(sites, setting or ["0.0"] * len(sites), strict=True):
        site.ratio = ratio
