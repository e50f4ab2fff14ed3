"""A group norm inside a block, whose statistics run over all tokens when some are not there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .state import NormHook


def norm_forward(module: Any, x: Tensor) -> Tensor:
    """A group norm of the kept tokens by the statistics of all.  [B, C, K] -> [B, C, K]."""
    here: NormHook = module.__dict__["_tofu"]
    unreduced = here.hook.unreduced
    if unreduced is None:
        normed: Tensor = here.original(module, x)
        return normed
    batch, groups = x.shape[0], module.num_groups
    every = unreduced.mT.reshape(batch, groups, -1).float()
    variance, mean = torch.var_mean(every, dim=2, keepdim=True, correction=0)
    y = (x.reshape(batch, groups, -1).float() - mean) * (variance + module.eps).rsqrt()
    y = y.view(x.shape)
    if module.affine:
        y = y * module.weight[:, None].float() + module.bias[:, None].float()
    result: Tensor = y.to(x.dtype)
    return result
