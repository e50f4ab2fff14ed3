"""Whole-step caching: predictions of skipped steps are made from the last ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from eval.baselines.clock import Clock


def computed_steps(total: int, computed: int, first: int) -> frozenset[int]:
    """Which steps whole-step caching computes: the first ones, then evenly spread, the last included.

    Raises:
        ValueError: if there are not that many.
    """
    if not 0 < first <= computed <= total:
        raise ValueError(
            f"step caching computes {computed} of {total} steps, the first {first} among them; "
            "choose 0 < first <= computed <= total"
        )
    rest = computed - first
    spread = (first - 1 + round((i + 1) * (total - first) / rest) for i in range(rest))
    return frozenset([*range(first), *spread])


class StepCache:
    """Whole-step caching: on skipped steps the denoiser's prediction is made from its last ones.

    A step is told by its timestep; guidance in two calls has two predictions a step.

    Args:
        computes: Whether a step is computed, from the clock and the latents at its first call.
        order: 0 repeats the last prediction; 1 extrapolates the last two (TaylorSeer's first order,
            arXiv 2503.06923, on the prediction instead of on every layer).

    Attributes:
        ran: How many calls were computed.
    """

    def __init__(self, denoiser: nn.Module, computes: Callable[[Clock, Tensor], bool], order: int):
        if order not in (0, 1):
            raise ValueError(f"order {order} is not 0 (repeat) or 1 (extrapolate)")
        self.inner, self.order, self.decides = denoiser.forward, order, computes
        self.clock = Clock()
        self.past: dict[int, list[tuple[int, Tensor]]] = {}
        self.computes = True
        self.ran = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's own, or what its past says."""
        if self.clock.starts(args, kwargs):
            self.past.clear()
        step = self.clock.step
        if not self.clock.call:
            latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.computes = self.decides(self.clock, latents)
        past = self.past.setdefault(self.clock.call, [])
        if self.computes or not past:
            out = self.inner(*args, **kwargs)
            past.append((step, out[0]))
            del past[:-2]
            self.ran += 1
            return out
        last, prediction = past[-1]
        if self.order == 1 and len(past) == 2:
            before, older = past[0]
            slope = (prediction - older) / (last - before)
            prediction = prediction + (step - last) * slope
        if kwargs.get("return_dict", True):
            raise ValueError(
                "step caching serves pipelines that ask for tuples (return_dict=False)"
            )
        return (prediction,)


@contextmanager
def cached_where(
    denoiser: nn.Module, computes: Callable[[Clock, Tensor], bool], order: int
) -> Iterator[StepCache]:
    """Put whole-step caching on a denoiser, outside of whatever its forward is now."""
    cache = StepCache(denoiser, computes, order)
    before = denoiser.__dict__.get("forward")
    denoiser.__dict__["forward"] = cache.forward
    try:
        yield cache
    finally:
        if before is None:
            del denoiser.__dict__["forward"]
        else:
            denoiser.__dict__["forward"] = before


@contextmanager
def step_cached(
    denoiser: nn.Module, *, total: int, computed: int, first: int = 2, order: int = 1
) -> Iterator[StepCache]:
    """Compute the steps of `computed_steps`, and make the others from the last ones."""
    steps = computed_steps(total, computed, first)
    with cached_where(denoiser, lambda clock, _: clock.step in steps, order) as cache:
        yield cache
