"""Which steps are skipped: the rules by name. Every file here that registers one is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from .base import SKIP_RULES, SkipRule, Steps, computed_steps, register_rule, skipped_steps

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "SKIP_RULES",
    "SkipRule",
    "Steps",
    "computed_steps",
    "register_rule",
    "skipped_steps",
]
