"""Source "gradient": how much the prediction depends on a token, guessed from the token by a fitted probe.

`tuning/probes.py` says what the probe is fitted to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BlockReading, register_source


@register_source("gradient")
def gradient(reading: BlockReading) -> Tensor:
    """Score tokens by the block's probe.  -> [I, N] float32."""
    assert reading.probe is not None
    return sensitivity(reading.x, reading.probe)


def features(x: Tensor) -> Tensor:
    """What a probe reads of tokens: standardised over the channels, as behind a norm, and how long they are.

    Args:
        x: [B, N, C], the input of a block, any float dtype.

    Returns:
        [B, N, C + 1] float32.
    """
    x = x.float()
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return torch.cat([(x - mean) * (variance + 1e-6).rsqrt(), log_norm(x)[..., None]], dim=-1)


def sensitivity(x: Tensor, probe: Tensor) -> Tensor:
    """How much the prediction depends on each token, by a probe [C + 1]; up to a factor an image.

    Returns:
        [B, N] float32, above zero.
    """
    logarithm = features(x) @ probe
    return (logarithm - logarithm.mean(dim=1, keepdim=True)).exp()


def log_norm(rows: Tensor) -> Tensor:
    """Logarithm of the norm of each token, or of its gradient.  [B, N, C] -> [B, N] float32."""
    norm: Tensor = torch.linalg.vector_norm(rows.float(), dim=-1)
    return norm.clamp(min=torch.finfo(torch.float32).tiny).log()
