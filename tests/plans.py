"""Plans from positions, as tests like to write them."""

import torch
from torch import Tensor

from tofu_diffusers.tokens.plan import Plan, make_plan


def plan_keeping(kept: Tensor, match: Tensor) -> Plan:
    """Keeps these positions [B, K]; for every token the position of its match [B, N]."""
    keep = torch.zeros_like(match, dtype=torch.bool).scatter(1, kept, True)
    return make_plan(keep, match, kept.shape[1])
