"""How `from_pretrained` is told the format of numbers, whatever diffusers is installed."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from packaging.version import Version


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The argument of a pipeline's `from_pretrained`: before 0.40 diffusers passes over `dtype`."""
    known = Version(diffusers.__version__).release >= (0, 40)
    return {"dtype" if known else "torch_dtype": dtype}
