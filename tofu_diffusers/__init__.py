"""Fewer latent tokens for any diffusers pipeline: one call to apply, one call to remove.

>>> from tofu_diffusers import apply_tofu, remove_tofu
>>> handle = apply_tofu(pipe, ratio=0.5)
>>> image = pipe("a red apple").images[0]
>>> remove_tofu(pipe)
"""

from .api import Handle, apply_tofu, remove_tofu
from .config import CONTEXTS, RESTORES, SCOPES, TofuConfig
from .families import FAMILIES
from .profiles import default_config, profile
from .report.summary import Summary
from .steps.schedule import Schedule
from .tokens.grid import TokenGrid
from .tokens.merge import FOLDS, reduce
from .tokens.methods import METHODS, Evidence, Method
from .tokens.plan import Plan
from .tokens.unmerge import UpdateCache, restore
from .tuning.calibrate import calibrate_gradient
from .tuning.schedule_search import Learned, learn_schedule

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
