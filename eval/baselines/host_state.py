"""What other packages leave on a model: found, and afterwards cleaned up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has the forward and the notes of other packages that it had before.

    Undoing what they did, these leave their notes, and on a module the forward that was its class's.
    """
    names = ("forward", "_diffusers_hook", "_tome_info")
    before = [
        (module, name, module.__dict__.get(name)) for module in model.modules() for name in names
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            if value is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


def hook_registries(model: nn.Module) -> list[Any]:
    """Of diffusers, those that modules of a model have."""
    found = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return [each for each in found if each]
