"""What a removed token gets back. Every file here that registers an unmerge is found.

What is unmerged is the update d = f(Mx) - Mx, never the state: every token keeps its own residual
stream. In the formulas i is a removed token, m its kept match, t the step and t' the one at which i was
last computed. Those with a cache are a copy for tokens that it knows nothing of.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import UNMERGES, Given, Unmerge, register_unmerge

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["UNMERGES", "Given", "Unmerge", "register_unmerge"]
