"""The methods by name. Every file here that registers a method is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from .base import METHODS, Evidence, Method, make_method, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Evidence", "Method", "make_method", "register"]
