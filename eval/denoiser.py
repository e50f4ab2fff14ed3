"""Where a pipeline keeps its denoiser."""

from __future__ import annotations

from typing import Any

DENOISERS = ("unet", "transformer")


def denoiser_name(pipe: Any) -> str:
    """Where a pipeline keeps what it calls at every step.

    Raises:
        ValueError: if it has none by a usual name.
    """
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}")


def denoiser_of(pipe: Any) -> Any:
    """What a pipeline calls at every step; raises as `denoiser_name`."""
    return getattr(pipe, denoiser_name(pipe))
