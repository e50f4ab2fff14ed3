"""One file a family, registered on the denoiser classes it knows."""

from . import sd3, unet
from .base import FAMILIES, Family, Run, find_family, known_classes, register_family

__all__ = [
    "FAMILIES",
    "Family",
    "Run",
    "find_family",
    "known_classes",
    "register_family",
    "sd3",
    "unet",
]
