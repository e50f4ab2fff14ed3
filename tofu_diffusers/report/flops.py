"""Counts the denoiser's FLOPs with and without tofu, on a copy without weights.

torch's FlopCounterMode runs over the real forward of a copy on the meta device, with the same forwards
attached: what it counts is what runs. Nothing is computed and no weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..hooks.patch import weightless
from ..runtime.generation import FEW_STEPS, Generation
from ..runtime.runtime import Runtime, shapes_only
from ..tokens.grid import TokenGrid
from .numberless import without_numbers

TOTAL = FEW_STEPS + 1  # no warning of few steps


class UncountedError(RuntimeError):
    """FLOPs of a denoiser cannot be counted; the message says why."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one computed forward of a denoiser.

    Attributes:
        whole: Without tofu.
        at: For each setting of its sites' ratios.
    """

    whole: int
    at: dict[tuple[str, ...], int]


def count(
    model: nn.Module,
    runtime: Runtime,
    settings: Iterable[tuple[str, ...]],
    attached: Callable[[nn.Module], Generation],
) -> Flops:
    """Count the FLOPs of one computed forward of the denoiser for each setting of its sites' ratios.

    Where padding was dropped of texts that differ by branch of guidance, the mean of the branches.

    Args:
        model: The denoiser; its modules are used, not its weights.
        runtime: Whose configuration and last call's shapes to count with.
        settings: Ratios of all sites, in their order.
        attached: Puts the same tofu on a copy of the denoiser and returns its generation.

    Raises:
        UncountedError: if the denoiser cannot run without numbers, or was not called and has no example.
    """
    setup, calls, grids = runtime.setup, list(runtime.call.inputs.values()), runtime.call.grids
    if not calls:
        example = setup.family.example(model)
        if example is None:
            raise UncountedError("it was not called yet")
        inputs = shapes_only(example, setup.family)
        # Of a compiled denoiser's calls the grids are known, and no arguments.
        calls, grids = [(inputs, inputs)], setup.family.grids(model, example) if grids else {}
    try:
        with without_numbers():
            twin = weightless(model).eval()
            found = [_counted(twin, runtime, grids, *each, settings, attached) for each in calls]
    except Exception as error:
        # Whatever a model does with numbers of tensors that have none.
        raise UncountedError(f"{type(error).__name__}: {error}") from error
    ratios = found[0].at
    return Flops(
        round(sum(each.whole for each in found) / len(found)),
        {ratio: round(sum(each.at[ratio] for each in found) / len(found)) for ratio in ratios},
    )


def flops_of(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Count the FLOPs of one forward."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops())


def _counted(
    twin: nn.Module,
    runtime: Runtime,
    grids: dict[int, TokenGrid],
    inputs: dict[str, Any],
    given: dict[str, Any],
    settings: Iterable[tuple[str, ...]],
    attached: Callable[[nn.Module], Generation],
) -> Flops:
    """Those of one call.

    Args:
        twin: The denoiser without weights.
        grids: That these arguments have.
        inputs: Arguments that it ran with.
        given: Those of the pipeline, with the padding of texts.
    """
    call, reduction = runtime.call, runtime.setup.reduction
    copy = attached(twin)
    copy.runtime.reader.fixed = grids
    copy.runtime.takes_what_it_can = runtime.takes_what_it_can
    # One if they are not known yet: then all tokens were computed, however many there are.
    branches = call.branches_in_batch

    def at(step: int, setting: tuple[str, ...]) -> dict[str, Any]:
        copy.set_step(step, TOTAL, branches)
        _set(copy.runtime, setting)
        return inputs

    unreduced = ("0.0",) * len(runtime.setup.sites)
    reduced = {*settings} - {unreduced}
    with torch.no_grad():
        whole = 0
        if given is not inputs:
            at(0, unreduced)
            whole = flops_of(twin, given)
        counts = {unreduced: flops_of(twin, at(0, unreduced))}
        past = 1
        # Computed steps make the evidence and fill the caches that reduced steps read, if they read any.
        if reduced and reduction is not None and reduction.needs_steps:
            past = max(past, reduction.past_needed)
            for step in range(1, past):
                twin(**at(step, unreduced))
        for setting in reduced:
            counts[setting] = flops_of(twin, at(past, setting))
    return Flops(whole or counts[unreduced], counts)


def _set(runtime: Runtime, setting: tuple[str, ...]) -> None:
    """Give the copy's sites the ratios of a setting."""
    runtime.call.skip = False
    for site, ratio in zip(runtime.setup.sites, setting, strict=True):
        site.ratio = ratio
