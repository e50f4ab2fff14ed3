"""Fewer latent tokens for any diffusers pipeline: one call to apply, one call to remove.

>>> from tofu_diffusers import apply_tofu, remove_tofu
>>> handle = apply_tofu(pipe, ratio=0.5)
>>> image = pipe("a red apple").images[0]
>>> remove_tofu(pipe)
"""

from .apply import Handle, apply_tofu, remove_tofu
from .calibrate import calibrate_gradient
from .config import CONTEXTS, RESTORES, SCOPES, TofuConfig
from .families import FAMILIES
from .fold import FOLDS, reduce
from .grid import TokenGrid
from .methods import METHODS, Evidence, Method
from .plan import Plan
from .policy import Learned, learn_schedule
from .profiles import default_config, profile
from .restore import UpdateCache, restore
from .schedule import Schedule
from .summary import Summary

__version__ = "0.1.0"

__all__ = [
    "CONTEXTS",
    "FAMILIES",
    "FOLDS",
    "METHODS",
    "RESTORES",
    "SCOPES",
    "Evidence",
    "Handle",
    "Learned",
    "Method",
    "Plan",
    "Schedule",
    "Summary",
    "TofuConfig",
    "TokenGrid",
    "UpdateCache",
    "__version__",
    "apply_tofu",
    "calibrate_gradient",
    "default_config",
    "learn_schedule",
    "profile",
    "reduce",
    "remove_tofu",
    "restore",
]
