"""The methods by name. A new one is a file here, registered by its class and imported below."""

from tofu_diffusers.methods.base import METHODS, Evidence, Method, make_method, register
from tofu_diffusers.methods.importance import Importance
from tofu_diffusers.methods.pitome import Pitome
from tofu_diffusers.methods.random import Random
from tofu_diffusers.methods.tofu import Tofu
from tofu_diffusers.methods.tome import Tome

__all__ = [
    "METHODS",
    "Evidence",
    "Importance",
    "Method",
    "Pitome",
    "Random",
    "Tofu",
    "Tome",
    "make_method",
    "register",
]
