"""Source "change": how much a token's prediction changed between its last two computations, per step."""

from .base import SOURCES, Source

# Two predictions are needed before there is a change; `TokenStatistics` compares them.
SOURCES["change"] = Source("change", warmup=2)
