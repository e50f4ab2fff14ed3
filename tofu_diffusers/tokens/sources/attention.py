"""Source "attention": how much attention a token receives from the others, in the block's own attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BlockReading, register_source


@register_source("attention")
def attention(reading: BlockReading) -> Tensor:
    """Score tokens by the attention they receive, before any rotation.  -> [I, N] float32."""
    return received_attention(reading.queries(), reading.keys(), reading.heads())


def received_attention(queries: Tensor, keys: Tensor, heads: int, chunk: int = 2**24) -> Tensor:
    """Mean attention that each token receives, over heads and queries.  [I, N, H*D] x 2 -> [I, N] float32.

    In chunks of queries: the N x N map is never whole.
    """
    images, tokens, width = queries.shape
    shared = width // keys.shape[2]  # heads of queries to one of keys
    q = queries.view(images, tokens, heads, -1).transpose(1, 2).float() * (width // heads) ** -0.5
    k = keys.view(images, tokens, heads // shared, -1).transpose(1, 2).float().transpose(2, 3)
    k = k.repeat_interleave(shared, dim=1) if shared > 1 else k
    rows = max(1, chunk // (images * heads * tokens))
    received = torch.zeros(images, tokens, device=keys.device)
    for start in range(0, tokens, rows):
        received = received + (q[:, :, start : start + rows] @ k).softmax(-1).sum((1, 2))
    return received / (heads * tokens)
