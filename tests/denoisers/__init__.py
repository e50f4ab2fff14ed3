"""A tiny model of every denoiser class of diffusers; each file adds its own to `DENOISERS`."""

from importlib import import_module
from pkgutil import iter_modules

from .base import DENOISERS, NO_DENOISERS, TinyDenoiser

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["DENOISERS", "NO_DENOISERS", "TinyDenoiser"]
