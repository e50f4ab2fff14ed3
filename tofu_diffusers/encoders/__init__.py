"""Encoders of transformers by family. Every file here that registers a family is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from .base import ENCODERS, EncoderFamily, encoder_classes, encoders_in, register_encoder

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["ENCODERS", "EncoderFamily", "encoder_classes", "encoders_in", "register_encoder"]
