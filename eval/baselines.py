"""What token reduction is measured against: fewer steps, whole-step caching, the caches of other packages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import CacheMixin, SchedulerMixin
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention import AttentionModuleMixin, FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

# The names of diffusers' hooks, by which they are removed.
PAB_HOOKS = ("pyramid_attention_broadcast",)
TAYLORSEER_HOOKS = ("taylorseer_cache",)
FIRST_BLOCK_HOOKS = ("fbc_leader_block_hook", "fbc_block_hook")


class Clock:
    """Where in its generation a denoiser's call is, told by the timestep.

    Attributes:
        time: The timestep.
        step: Of the generation.
        call: Of the step; guidance in two calls has two.
    """

    def __init__(self) -> None:
        self.time: float | None = None
        self.step = -1
        self.call = 0

    def starts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take note of a call with these arguments; whether it is the first of a generation."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        time = float(torch.as_tensor(timestep).flatten()[0])
        if time == self.time:
            self.call += 1
            return False
        # Timesteps fall; a rise is the next generation.
        again = self.time is None or time > self.time
        self.step = 0 if again else self.step + 1
        self.time, self.call = time, 0
        return again


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
        self.clock = Clock()
        self.past: dict[int, list[tuple[int, Tensor]]] = {}
        self.ran = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's own, or what its past says."""
        if self.clock.starts(args, kwargs):
            self.past.clear()
        step = self.clock.step
        past = self.past.setdefault(self.clock.call, [])
        if step in self.steps or not past:
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


def scheduler_like(scheduler: Any, name: str) -> Any:
    """Another of diffusers' schedulers, for models that were trained for the noise of this one.

    Raises:
        ValueError: if diffusers has none of that name, or it is for the other kind of noise.
    """
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(
            f"diffusers has no scheduler {name!r}, or lacks a package for it; give the name of a class, such "
            "as DPMSolverMultistepScheduler"
        )
    config, own = dict(scheduler.config), type(scheduler).__name__
    flow = "Flow" in own or config.get("use_flow_sigmas", False)
    shift = config.get("flow_shift" if "use_flow_sigmas" in config else "shift", 1.0)
    if flow == ("Flow" in name):
        return kind.from_config(config, **({"shift": shift} if flow else {}))
    if not flow or "use_flow_sigmas" not in inspect.signature(kind).parameters:
        raise ValueError(
            f"{name} is {'not ' if flow else ''}for flow matching, and {own} is{'' if flow else ' not'}; "
            "choose DPMSolverMultistepScheduler or UniPCMultistepScheduler, which are for both"
        )
    return kind(
        num_train_timesteps=config["num_train_timesteps"],
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )


@contextmanager
def rescheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline with another scheduler."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has the forward and the notes of other packages that it had before.

    Undoing what they did, these leave their notes, and on a module the forward that was its class's.
    """
    names = ("forward", "_diffusers_hook", "_tome_info")
    before = [
        (module, name, module.__dict__.get(name)) for module in model.modules() for name in names
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            if value is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


@contextmanager
def merged_by_tomesd(pipe: Any, **options: Any) -> Iterator[None]:
    """The pipeline patched by tomesd, which serves UNets of BasicTransformerBlocks.

    Raises:
        ValueError: if it has no UNet, or these are no options of tomesd's.
    """
    import tomesd

    try:
        inspect.signature(tomesd.apply_patch).bind(pipe, **options)
    except TypeError as error:
        raise ValueError(f"tomesd cannot be given {options}: {error}") from error
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"tomesd serves pipelines with a UNet, not {type(pipe).__name__}")
    # It draws from a forked global generator; the state is put back.
    state = torch.get_rng_state()
    with attributes_kept(pipe.unet):
        tomesd.apply_patch(pipe, **options)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)
            torch.set_rng_state(state)


@contextmanager
def hooked(
    denoiser: nn.Module,
    clock: Clock,
    apply: Callable[[nn.Module, Any], None],
    config: Any,
    names: Sequence[str],
) -> Iterator[None]:
    """A cache of diffusers on a denoiser, its state that of one generation and of one call of a step.

    diffusers keeps state by the name of `cache_context`, and resets it after a generation. Its pipelines do
    both only for models that are CacheMixin, which neither SD3's transformer nor the UNets are: so both are
    done here, from the timesteps, for every model alike.

    Args:
        clock: Told of every call.
        names: Of the hooks.
    """
    with attributes_kept(denoiser):
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        inner = denoiser.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if clock.starts(args, kwargs):
                registry.reset_stateful_hooks()
            with CacheMixin.cache_context(denoiser, f"call {clock.call}"):
                return inner(*args, **kwargs)

        try:
            apply(denoiser, config)
            # An earlier cache_context may have noted which modules have hooks.
            registry.invalidate_child_registries_cache()
            denoiser.__dict__["forward"] = forward
            yield
        finally:
            for name in names:
                registry.remove_hook(name, recurse=True)
            registry.invalidate_child_registries_cache()


@contextmanager
def broadcast_attention(
    denoiser: nn.Module, *, skip: int, first: int = 100, last: int = 800
) -> Iterator[None]:
    """Pyramid Attention Broadcast of diffusers: self-attention outputs reused between timesteps.

    Args:
        skip: A self-attention is computed every so many steps.
        first, last: Timesteps between which this holds.
    """
    clock = Clock()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(first, last),
        current_timestep_callback=lambda: clock.time,
    )
    with hooked(denoiser, clock, apply_pyramid_attention_broadcast, config, PAB_HOOKS):
        yield


@contextmanager
def extrapolated(
    denoiser: nn.Module,
    *,
    interval: int,
    first: int = 3,
    order: int = 1,
    modules: str = "diffusers",
) -> Iterator[None]:
    """TaylorSeer of diffusers (arXiv 2503.06923): outputs inside the denoiser are extrapolated.

    Args:
        interval: After the first steps, one of so many is computed.
        first: How many steps are computed before.
        order: Of the Taylor series; 0 repeats.
        modules: Whose outputs these are: "diffusers", of attentions called `attn` in the model's own lists
            of blocks, as it has it; "paper", of all attentions and feed-forwards.

    Raises:
        ValueError: if there are none, as in a UNet by diffusers' names; on unknown modules; on numbers
            with which nothing would be saved, or extrapolated from nothing.
    """
    if interval < 2 or first < 1 or order < 0:
        raise ValueError(
            f"interval {interval}, first {first}, order {order}: TaylorSeer needs an interval of 2 or more, "
            "1 or more first steps and order 0 or more"
        )
    if modules not in ("diffusers", "paper"):
        raise ValueError(f"unknown modules {modules!r}; choose diffusers or paper")
    kinds = (Attention, AttentionModuleMixin, FeedForward)
    own = [re.escape(name) for name, each in denoiser.named_modules() if isinstance(each, kinds)]
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=first,
        max_order=order,
        cache_identifiers=own if modules == "paper" else None,
        # By default it keeps them in bfloat16, which would round what a float32 model computed: an error
        # that is not the method's.
        taylor_factors_dtype=next(denoiser.parameters()).dtype,
    )
    with hooked(denoiser, Clock(), apply_taylorseer_cache, config, TAYLORSEER_HOOKS):
        registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
        if not any(each and each.get_hook(TAYLORSEER_HOOKS[0]) for each in registries):
            raise ValueError(
                f"TaylorSeer finds no modules in {type(denoiser).__name__} as {modules} has them; "
                'modules "paper" takes all attentions and feed-forwards of diffusers'
            )
        yield


@contextmanager
def first_block_cached(denoiser: nn.Module, *, threshold: float) -> Iterator[None]:
    """First Block Cache of diffusers (after TeaCache, arXiv 2411.19108): all blocks but the first reused.

    Args:
        threshold: They are, while what the first block adds differs from when they were last computed by
            at most this share. The difference is that of the whole batch.

    Raises:
        ValueError: if the denoiser has no list of two or more transformer blocks, as no UNet has; if the
            last one returns no text, as in SD3, which diffusers' hook cannot take; if diffusers does not
            know the blocks; on a threshold that nothing is under.
    """
    if threshold <= 0:
        raise ValueError(f"threshold {threshold} reuses nothing; choose one above 0")
    for block in denoiser.modules():
        if isinstance(block, JointTransformerBlock) and block.context_pre_only:
            raise ValueError(
                f"First Block Cache of diffusers fails on {type(denoiser).__name__}: it subtracts the text "
                "that the last block returns, and this one returns none"
            )
    config = FirstBlockCacheConfig(threshold=threshold)

    def apply(denoiser: nn.Module, config: FirstBlockCacheConfig) -> None:
        try:
            apply_first_block_cache(denoiser, config)
        except IndexError as error:
            raise ValueError(
                f"First Block Cache serves transformers of two blocks or more, not {type(denoiser).__name__}"
            ) from error

    with hooked(denoiser, Clock(), apply, config, FIRST_BLOCK_HOOKS):
        yield


@contextmanager
def deep_cached(pipe: Any, *, interval: int, branch: int = 0) -> Iterator[None]:
    """DeepCache's package (arXiv 2312.00858): all of a UNet but its outer layers reused between steps.

    Args:
        interval: One of so many steps is computed whole, the first among them.
        branch: Which skip connection, counted inwards from 0 and 3 a level: of the other steps only what is
            outside of it is computed.

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
