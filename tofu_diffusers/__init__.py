"""Skip denoising steps, or reduce the tokens inside them: one call to apply, one call to remove.

>>> from tofu_diffusers import apply_tofu, remove_tofu
>>> handle = apply_tofu(pipe, ratio=0.5)
>>> image = pipe("a red apple").images[0]
>>> remove_tofu(pipe)
"""

from .api import EncoderHandle, Handle, apply_tofu, remove_tofu
from .config import KEYS_VALUES, SCOPES, Config, EncoderReduction, StepSkipping, TokenReduction
from .encoders import ENCODERS
from .families import FAMILIES
from .profiles import profile, resolve
from .report.inspection import Inspection
from .report.summary import Summary
from .steps.rules import SKIP_RULES
from .steps.schedule import Schedule
from .steps.trajectory import Trajectory
from .tokens.grid import TokenGrid
from .tokens.merge import MERGES, merge_tokens
from .tokens.methods import METHODS, Evidence, Method
from .tokens.plan import Plan
from .tokens.unmerge import unmerge_tokens
from .tokens.unmerges import UNMERGES
from .tokens.update_cache import CacheKind, UpdateCache
from .tuned import Tuned
from .tuning.calibrate import calibrate_gradient
from .tuning.linearity import Linearity, measure_linearity
from .tuning.schedule_search import LearnedSchedule, learn_schedule
from .tuning.trajectory import measure_trajectory
from .tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "KEYS_VALUES",
    "MERGES",
    "METHODS",
    "SCOPES",
    "SKIP_RULES",
    "UNMERGES",
    "CacheKind",
    "Config",
    "EncoderHandle",
    "EncoderReduction",
    "Evidence",
    "Handle",
    "Inspection",
    "LearnedSchedule",
    "Linearity",
    "Method",
    "Plan",
    "Schedule",
    "StepSkipping",
    "Summary",
    "TokenGrid",
    "TokenReduction",
    "Trajectory",
    "Tuned",
    "UpdateCache",
    "__version__",
    "apply_tofu",
    "calibrate_gradient",
    "learn_schedule",
    "measure_linearity",
    "measure_trajectory",
    "merge_tokens",
    "profile",
    "remove_tofu",
    "resolve",
    "tune",
    "unmerge_tokens",
]
