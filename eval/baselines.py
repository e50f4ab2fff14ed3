"""What token reduction is measured against: fewer steps, whole-step caching, tomesd, diffusers' caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast
from torch import Tensor, nn

PAB_HOOK = "pyramid_attention_broadcast"


def computed_steps(total: int, computed: int, first: int) -> frozenset[int]:
    """Which steps whole-step caching computes: the first ones, then evenly spread, the last included.

    Raises:
        ValueError: if there are not that many.
    """
    if not 0 < first <= computed <= total:
        raise ValueError(
            f"step caching computes {computed} of {total} steps, the first {first} of them whole; "
            "choose 0 < first <= computed <= total"
        )
    rest = computed - first
    spread = (first - 1 + round((i + 1) * (total - first) / rest) for i in range(rest))
    return frozenset([*range(first), *spread])


class StepCache:
    """Whole-step caching: on skipped steps the denoiser's prediction is made from its last ones.

    A step is told by its timestep; guidance in two calls has two predictions a step.

    Args:
        order: 0 repeats the last prediction; 1 extrapolates the last two (TaylorSeer's first order,
            arXiv 2503.06923, on the prediction instead of on every layer).
    """

    def __init__(self, denoiser: nn.Module, total: int, computed: int, first: int, order: int):
        if order not in (0, 1):
            raise ValueError(f"order {order} is not 0 (repeat) or 1 (extrapolate)")
        self.inner, self.order, self.total = denoiser.forward, order, total
        self.steps = computed_steps(total, computed, first)
        self.step = -1
        self.time: float | None = None
        self.call = 0
        self.past: dict[int, list[tuple[int, Tensor]]] = {}
        self.ran = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's own, or what its past says."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if time == self.time:
            self.call += 1
        else:
            # Timesteps fall; a rise is the next generation.
            again = self.time is None or time > self.time
            self.step = 0 if again else self.step + 1
            self.time, self.call = time, 0
            if again:
                self.past.clear()
        past = self.past.setdefault(self.call, [])
        if self.step in self.steps or not past:
            out = self.inner(*args, **kwargs)
            past.append((self.step, out[0]))
            del past[:-2]
            self.ran += 1
            return out
        last, prediction = past[-1]
        if self.order == 1 and len(past) == 2:
            before, older = past[0]
            slope = (prediction - older) / (last - before)
            prediction = prediction + (self.step - last) * slope
        if kwargs.get("return_dict", True):
            raise ValueError(
                "step caching serves pipelines that ask for tuples (return_dict=False)"
            )
        return (prediction,)


@contextmanager
def step_cached(
    denoiser: nn.Module, *, total: int, computed: int, first: int = 2, order: int = 1
) -> Iterator[StepCache]:
    """Put whole-step caching on a denoiser, outside of whatever its forward is now."""
    cache = StepCache(denoiser, total, computed, first, order)
    before = denoiser.__dict__.get("forward")
    denoiser.__dict__["forward"] = cache.forward
    try:
        yield cache
    finally:
        if before is None:
            del denoiser.__dict__["forward"]
        else:
            denoiser.__dict__["forward"] = before


def multistep(scheduler: Any) -> DPMSolverMultistepScheduler:
    """A second-order multistep scheduler (DPM-Solver++) for the same noise as this one."""
    config = dict(scheduler.config)
    if "Flow" in type(scheduler).__name__:
        extra = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": config.get("shift", 1.0),
        }
        return DPMSolverMultistepScheduler(
            num_train_timesteps=config["num_train_timesteps"], **extra
        )
    return DPMSolverMultistepScheduler.from_config(config)


@contextmanager
def rescheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline with another scheduler."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


@contextmanager
def merged_by_tomesd(pipe: Any, **options: Any) -> Iterator[None]:
    """The pipeline patched by tomesd, which serves UNets of BasicTransformerBlocks.

    Raises:
        ValueError: if it has no UNet.
    """
    import tomesd

    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"tomesd serves pipelines with a UNet, not {type(pipe).__name__}")
    # It draws from a forked global generator; the state is put back.
    state = torch.get_rng_state()
    tomesd.apply_patch(pipe, **options)
    try:
        yield
    finally:
        tomesd.remove_patch(pipe)
        torch.set_rng_state(state)


@contextmanager
def broadcast_attention(
    denoiser: nn.Module, *, skip: int, first: int = 100, last: int = 800
) -> Iterator[None]:
    """Pyramid Attention Broadcast of diffusers: self-attention outputs reused between timesteps.

    Args:
        skip: A self-attention is computed every so many steps.
        first, last: Timesteps between which this holds.
    """
    now: dict[str, float] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now["timestep"] = float(torch.as_tensor(timestep).flatten()[0])

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(first, last),
        current_timestep_callback=lambda: now["timestep"],
    )
    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    apply_pyramid_attention_broadcast(denoiser, config)
    try:
        yield
    finally:
        hook.remove()
        HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(PAB_HOOK, recurse=True)
