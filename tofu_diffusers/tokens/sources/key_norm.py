"""Source "key_norm": the length of a token's key over all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BlockReading, register_source


@register_source("key_norm")
def key_norm(reading: BlockReading) -> Tensor:
    """Score tokens by the Euclidean norm of their keys.  -> [I, N] float32."""
    return norm_of(reading.keys())


def norm_of(keys: Tensor) -> Tensor:
    """Euclidean norm of each token's key over all heads.  [I, N, C] -> [I, N] float32."""
    norms: Tensor = torch.linalg.vector_norm(keys.float(), dim=-1)
    return norms
