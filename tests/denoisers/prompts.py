"""What stands for the prompts of two rows."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_mask(dtype: torch.dtype = torch.long) -> Tensor:
    """Which of 7 tokens belong to the prompt: 3 in the first row, 6 in the second."""
    return torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]], dtype=dtype)
