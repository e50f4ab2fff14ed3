"""What a denoiser's tofu knows at this moment, as plain values: for tests, tools and the curious."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config import Config
from ..runtime.generation import Generation, StepRecord
from ..tokens.grid import TokenGrid
from ..tokens.plan import Plan


@dataclass(frozen=True)
class Inspection:
    """Result of `handle.inspect()`, one a denoiser.

    Attributes:
        denoiser: Its class.
        family: Its family.
        configs: What is in force now, with nothing left open.
        index: Of the step that comes next, or runs.
        noise: Levels of all steps of the generation (1: pure noise); empty: there is none.
        step_known: Whether it is in a generation.
        steps: What its steps were run with: calls, ratios, whether they were skipped.
        cfg_branches: Branches of guidance in a batch; 0: not known yet.
        images: In the batch of the last call.
        per_image: Whether reduced blocks run images one by one.
        grids: By resolution.
        plans: By resolution, those of the images that are held now; their rows are images.
        cache_bytes: Held now in caches.
    """

    denoiser: str
    family: str
    configs: tuple[Config, ...]
    index: int
    noise: tuple[float, ...]
    step_known: bool
    steps: tuple[StepRecord, ...]
    cfg_branches: int
    images: int
    per_image: bool
    grids: dict[int, TokenGrid]
    plans: dict[int, tuple[Plan, ...]]
    cache_bytes: int


def inspect(model: nn.Module, generation: Generation) -> Inspection:
    """Read off what there is; nothing is changed, and nothing waits for the device."""
    runtime = generation.runtime
    setup, call = runtime.setup, runtime.call
    plans: dict[int, tuple[Plan, ...]] = {}
    for cache in setup.plan_caches:
        found = tuple(plan for key, plan in cache.plans.items() if "/" not in key)
        plans[cache.resolution] = plans.get(cache.resolution, ()) + found
    return Inspection(
        denoiser=type(model).__name__,
        family=setup.family.name,
        configs=setup.configs,
        index=generation.index,
        noise=generation.sampling.noise,
        step_known=call.step_known,
        steps=tuple(generation.steps()),
        cfg_branches=int(call.cfg_branches),
        images=call.images,
        per_image=call.per_image,
        grids=dict(call.grids),
        plans=plans,
        cache_bytes=runtime.caches.nbytes,
    )
