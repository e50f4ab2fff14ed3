"""The families by name. Every file here that registers a family is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from .base import FAMILIES, BlockStack, Family, find_family, known_classes, register_family

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "BlockStack", "Family", "find_family", "known_classes", "register_family"]
