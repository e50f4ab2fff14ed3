"""Counts the denoiser's FLOPs with and without tofu, on a copy without weights.

torch's FlopCounterMode runs over the real forward of a copy on the meta device, with the same forwards
attached: what it counts is what runs. Nothing is computed and no weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..runtime.generation import FEW_STEPS, Generation
from ..runtime.runtime import Runtime, shapes_only

WHOLE = 3  # steps before the counted one: enough evidence for any method
TOTAL = FEW_STEPS + 1  # no warning of few steps


def count(
    model: nn.Module,
    runtime: Runtime,
    settings: Iterable[tuple[str, ...]],
    attached: Callable[[nn.Module], Generation],
) -> dict[tuple[str, ...], int]:
    """Count the FLOPs of one computed forward of the denoiser for each setting of its sites' ratios.

    Args:
        model: The denoiser; its class and config are used, not its weights.
        runtime: Whose configuration and last call's shapes to count with.
        settings: Ratios of all sites, in their order.
        attached: Puts the same tofu on a copy of the denoiser and returns its generation.
    """
    setup, call = runtime.setup, runtime.call
    inputs = call.inputs or shapes_only(setup.family.example(model))
    with torch.device("meta"):
        twin = type(model).from_config(dict(cast(Any, model).config))  # type: ignore[attr-defined]
    twin.eval().requires_grad_(False)
    counts = {}
    copy = attached(twin)
    copy.runtime.reader.fixed = call.grids
    branches = int(call.cfg_branches)
    with torch.no_grad():
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
