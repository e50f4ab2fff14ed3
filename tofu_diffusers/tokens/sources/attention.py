"""Source "attention": how much attention a token receives from the others, in the block's own attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BlockReading, register_source


@register_source("attention")
def attention(reading: BlockReading) -> Tensor:
    """Score tokens by the attention they receive, before any rotation.  -> [I, N] float32."""
    return received_attention(
        reading.queries(),
        reading.keys(),
        reading.heads(),
        bias=reading.bias,
        counts=reading.counts,
    )


def received_attention(
    queries: Tensor,
    keys: Tensor,
    heads: int,
    chunk: int = 2**24,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean attention that each token receives, over heads and queries.  [I, N, H*D] x 2 -> [I, N] float32.

    In chunks of queries: the N x N map is never whole.

    Args:
        queries, keys: [I, N, H * D], any float dtype.
        heads: H, of the queries.
        chunk: Numbers of the map at a time.
        bias: [I, 1, 1 or N, N], added to the logits.
        counts: [I, N] float32, how many queries each row stands for.
    """
    images, tokens, width = queries.shape
    shared = width // keys.shape[2]  # heads of queries to one of keys
    q = queries.view(images, tokens, heads, -1).transpose(1, 2).float() * (width // heads) ** -0.5
    k = keys.view(images, tokens, heads // shared, -1).transpose(1, 2).float().transpose(2, 3)
    k = k.repeat_interleave(shared, dim=1) if shared > 1 else k
    rows = max(1, chunk // (images * heads * tokens))
    received = torch.zeros(images, tokens, device=keys.device)
    for start in range(0, tokens, rows):
        logits = q[:, :, start : start + rows] @ k
        if bias is not None:
            own = bias if bias.shape[2] == 1 else bias[:, :, start : start + rows]
            logits = logits + own.float()
        given = logits.softmax(-1)
        if counts is not None:
            given = given * counts[:, None, start : start + rows, None]
        received = received + given.sum((1, 2))
    if counts is None:
        return received / (heads * tokens)
    return received / (heads * counts.sum(dim=1, keepdim=True))
