"""The package DeepCache, which reuses the inner layers of UNets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eval.baselines.host_state import attributes_kept


@contextmanager
def deep_cached(pipe: Any, *, interval: int, branch: int = 0) -> Iterator[None]:
    """DeepCache's package (arXiv 2312.00858): all of a UNet but its outer layers reused between steps.

    Args:
        interval: One of so many steps is computed in full, the first among them.
        branch: Which skip connection, counted inwards from 0 and 3 a resolution: of the other steps only what
            is outside of it is computed.

    Raises:
        ValueError: if the pipeline has no UNet; on a branch that the UNet does not have, or an interval
            at which nothing would be reused.
    """
    from DeepCache import DeepCacheSDHelper

    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise ValueError(f"DeepCache serves pipelines with a UNet, not {type(pipe).__name__}")
    branches = 3 * len(unet.down_blocks)
    if interval < 2 or not 0 <= branch < branches:
        raise ValueError(
            f"interval {interval}, branch {branch}: DeepCache needs an interval of 2 or more and, of this "
            f"UNet, a branch from 0 to {branches - 1}"
        )
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    with attributes_kept(unet):
        helper.enable()
        try:
            yield
        finally:
            helper.disable()
