"""The caches of diffusers: Pyramid Attention Broadcast, TaylorSeer, First Block Cache, MagCache."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from diffusers import CacheMixin
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention import AttentionModuleMixin, FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn

from eval.baselines.clock import Clock
from eval.baselines.host_state import attributes_kept, hook_registries

# The names of diffusers' hooks, by which they are removed.
PAB_HOOKS = ("pyramid_attention_broadcast",)
TAYLORSEER_HOOKS = ("taylorseer_cache",)
FIRST_BLOCK_HOOKS = ("fbc_leader_block_hook", "fbc_block_hook")
MAG_HOOKS = ("mag_cache_leader_block_hook", "mag_cache_block_hook")


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
        if not any(each.get_hook(TAYLORSEER_HOOKS[0]) for each in hook_registries(denoiser)):
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
def magnitude_cached(
    pipe: Any,
    *,
    threshold: float,
    steps: int,
    most: int = 3,
    retention: float = 0.2,
    prompt: str = "a red apple",
) -> Iterator[None]:
    """MagCache of diffusers (arXiv 2506.09045): the blocks' residual reused while its length changes little.

    How it changes from step to step is measured first, in one generation of the pipeline.

    Args:
        pipe: A pipeline with a `transformer`.
        threshold: Bound of the summed error that the lengths let expect. Higher reuses more.
        steps: Of the generation.
        most: Steps that are skipped in a row.
        retention: Share of the steps, at the start, that are computed.
        prompt: Of the generation that is measured.

    Raises:
        ValueError: if the pipeline has no transformer of blocks that diffusers knows; on a threshold that
            nothing is under.
    """
    if threshold <= 0:
        raise ValueError(f"threshold {threshold} reuses nothing; choose one above 0")
    denoiser = getattr(pipe, "transformer", None)
    if denoiser is None:
        raise ValueError(f"MagCache serves pipelines with a transformer, not {type(pipe).__name__}")
    told = io.StringIO()
    measuring = MagCacheConfig(num_inference_steps=steps, calibrate=True)
    with hooked(denoiser, Clock(), apply_mag_cache, measuring, MAG_HOOKS), redirect_stdout(told):
        pipe(
            prompt,
            num_inference_steps=steps,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    # It hands its numbers over in print, to be copied.
    ratios = [line for line in told.getvalue().splitlines() if line.startswith("[1")]
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=most,
        retention_ratio=retention,
        num_inference_steps=steps,
        mag_ratios=ast.literal_eval(ratios[0]),
    )
    with hooked(denoiser, Clock(), apply_mag_cache, config, MAG_HOOKS):
        yield
