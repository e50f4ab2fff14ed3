"""Source "cfg": how far the conditional prediction is from the unconditional one (IBTM, arXiv 2411.16720)."""

from .base import SOURCES, Source

# Of the last step; `TokenStatistics` keeps it.
SOURCES["cfg"] = Source("cfg", warmup=1)
