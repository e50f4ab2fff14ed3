"""What the method `importance` can score tokens by. Every file here that registers a source is found."""

from importlib import import_module
from pkgutil import iter_modules

from .base import SOURCES, BlockReading, Source, register_source

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["SOURCES", "BlockReading", "Source", "register_source"]
