"""What a denoiser returns, whatever its form: the tensors in it, and the same form with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tensors_in(out: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in the order in which they stand.

    An output is a tensor, or a tuple, list, dict or dataclass of outputs; what else stands in it is left out.
    """
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    found: list[Tensor] = []
    for part in _parts(out):
        found.extend(tensors_in(part))
    return found


def with_tensors(out: Any, tensors: Sequence[Tensor]) -> Any:
    """The same output with other tensors, as many as `tensors_in` has."""
    return _rebuilt(out, list(tensors))


def form_of(out: Any) -> Any:
    """The same output without its numbers: its tensors take the memory of one number each."""
    return with_tensors(
        out, [each.detach().new_empty(()).expand(each.shape) for each in tensors_in(out)]
    )


def _rebuilt(out: Any, rest: list[Tensor]) -> Any:
    """Build an output again, taking its tensors off the front of a list."""
    if isinstance(out, Tensor):
        return rest.pop(0) if out.is_floating_point() else out
    parts = _parts(out)
    if not parts:
        return out
    built = [_rebuilt(part, rest) for part in parts]
    if is_dataclass(out):
        names = [each.name for each in fields(out)]
        kind: Any = type(out)
        return kind(**dict(zip(names, built, strict=True)))
    if isinstance(out, dict):
        return type(out)(zip(out, built, strict=True))
    return type(out)(*built) if hasattr(out, "_fields") else type(out)(built)


def _parts(out: Any) -> list[Any]:
    # Before dicts: diffusers' outputs are both, and as dicts they leave out what is None.
    if is_dataclass(out):
        return [getattr(out, each.name) for each in fields(out)]
    if isinstance(out, dict):
        return list(out.values())
    return list(out) if isinstance(out, (tuple, list)) else []
