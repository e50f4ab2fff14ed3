"""What people stack on a pipeline together with tofu, a file a kind; docs/compatibility.md shows it."""

from .adapters import ADAPTERS
from .attention import ATTENTION
from .base import AMOUNTS, Combination, Refused, Row
from .caches import CACHES
from .compiling import COMPILING
from .guidance import GUIDANCE
from .lifetimes import LIFETIMES
from .numerics import NUMERICS
from .offloading import OFFLOADING
from .parallel import PARALLEL
from .pipelines import PIPELINES
from .samplers import SAMPLERS

# By the heading above their table.
KINDS: dict[str, tuple[Row, ...]] = {
    "Adapters": ADAPTERS,
    "Pipelines and batches": PIPELINES,
    "Guidance": GUIDANCE,
    "Samplers": SAMPLERS,
    "Caches": CACHES,
    "Attention": ATTENTION,
    "Numbers": NUMERICS,
    "Offloading": OFFLOADING,
    "Compiling": COMPILING,
    "Several processes": PARALLEL,
    "What happens to a pipeline": LIFETIMES,
}

__all__ = ["AMOUNTS", "KINDS", "Combination", "Refused", "Row"]
