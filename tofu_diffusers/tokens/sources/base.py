"""How an importance source is asked for the scores of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockReading:
    """What a source can read of a block before it runs: of the conditional rows, one an image.

    Attributes:
        x: [I, N, C], the block's input.
        keys, queries: Give those of its first self-attention, [I, N, H * D].
        heads: Of that attention.
        probe: [C + 1], fitted to the block; None without a probe file.
        bias: [I, 1, 1 or N, N], what that attention adds to its logits, masks among it; None: nothing.
        counts: [I, N] float32, of how many tokens each row is the merged state, 0: padding. None: one each.
    """

    x: Tensor
    keys: Callable[[], Tensor]
    queries: Callable[[], Tensor]
    heads: Callable[[], int]
    probe: Tensor | None
    bias: Tensor | None = None
    counts: Tensor | None = None


Score = Callable[[BlockReading], Tensor]
"""-> [I, N] float32, zero or more; higher is kept."""


@dataclass(frozen=True)
class Source:
    """An importance source.

    Attributes:
        name: What users say.
        warmup: Steps that must compute all tokens before it has something to say.
        score: Reads it of a block; None: `TokenStatistics` keeps it from step to step.
    """

    name: str
    warmup: int = 0
    score: Score | None = None


SOURCES: dict[str, Source] = {}


def register_source(name: str) -> Callable[[Score], Score]:
    """Decorate a score that is read of a block to make it known by its name."""

    def register(score: Score) -> Score:
        SOURCES[name] = Source(name, score=score)
        return score

    return register
