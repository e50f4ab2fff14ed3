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

from ..runtime.session import FEW_STEPS, Session, shapes_only

WHOLE = 3  # steps before the counted one: enough evidence for any method
TOTAL = FEW_STEPS + 1  # no warning of few steps


def count(
    model: nn.Module,
    session: Session,
    settings: Iterable[tuple[str, ...]],
    attached: Callable[[nn.Module], Session],
) -> dict[tuple[str, ...], int]:
    """Count the FLOPs of one computed forward of the denoiser for each setting of its units' ratios.

    Args:
        model: The denoiser; its class and config are used, not its weights.
        session: Whose configuration and last call's shapes to count with.
        settings: Ratios of all units, in the session's order.
        attached: Puts the same tofu on a copy of the denoiser and returns its session.
    """
    inputs = session.last_call or shapes_only(session.family.example(model))
    with torch.device("meta"):
        twin = type(model).from_config(dict(cast(Any, model).config))  # type: ignore[attr-defined]
    twin.eval().requires_grad_(False)
    counts = {}
    copy = attached(twin)
    copy.fixed_grids = session.grids
    conditions = int(session.conditions)
    with torch.no_grad():
        # Whole steps make the evidence and fill the caches that reduced steps read.
        for step in range(WHOLE):
            copy.tell(step, TOTAL, conditions)
            _set(copy, None)
            twin(**inputs)
        for setting in settings:
            copy.tell(WHOLE, TOTAL, conditions)
            _set(copy, setting)
            with FlopCounterMode(display=False) as counter:
                twin(**inputs)
            counts[setting] = int(counter.get_total_flops())
    return counts


def _set(session: Session, setting: tuple[str, ...] | None) -> None:
    """Give the copy's units the ratios of a setting; None: whole."""
    session.skip = False
    units = session.units
    for unit, ratio in zip(units, setting or ["0.0"] * len(units), strict=True):
        unit.ratio = ratio
