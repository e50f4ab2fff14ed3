"""The families by name. Every file here that registers a family is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from .any import ANY, find_family, takes_timestep
from .base import (
    FAMILIES,
    BlockStack,
    Family,
    depths_of,
    known_classes,
    known_family,
    register_family,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ANY",
    "FAMILIES",
    "BlockStack",
    "Family",
    "depths_of",
    "find_family",
    "known_classes",
    "known_family",
    "register_family",
    "takes_timestep",
]
