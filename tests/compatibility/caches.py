"""What reuses parts of a denoiser between steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig

from tests import tiny
from tofu_diffusers import apply_tofu, remove_tofu

from .base import FLUX, STEPS, TRANSFORMER, UNET, Combination, Course, Refused, generate, is_active

ATTENTION = Refused("gives again what an attention returned")
WAN = {"Wan": tiny.tiny_wan}
QWEN = {"Qwen-Image": tiny.tiny_qwen}


def cached(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda pipe: pipe.transformer.enable_cache(make(pipe))


def uncached(pipe: Any) -> None:
    pipe.transformer.disable_cache()


def cache(name: str, make: Callable[[Any], Any], **options: Any) -> Combination:
    return Combination(name, **({"transformer": FLUX} | options), put=cached(make), take=uncached)


def now(pipe: Any) -> Callable[[], Any]:
    return lambda: pipe._current_timestep or 0


def deep_cache(pipe: Any, amount: dict[str, float]) -> None:
    """Goes on after tofu and off before it; the other way round both are refused."""
    plain = generate(pipe, steps=STEPS)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    cached = generate(pipe, steps=STEPS)
    with pytest.raises(RuntimeError, match="remove that change before apply_tofu"):
        apply_tofu(pipe, **amount)
    helper.disable()
    handle = apply_tofu(pipe, **amount)
    helper.enable()
    both = generate(pipe, steps=STEPS)
    assert both.isfinite().all() and is_active(handle)
    assert not torch.equal(both, cached) and not torch.equal(both, plain)
    with pytest.raises(RuntimeError, match="take that change off first"):
        remove_tofu(pipe)
    helper.disable()
    handle.remove()
    assert torch.equal(generate(pipe, steps=STEPS), plain)


def cache_dit(pipe: Any, amount: dict[str, float]) -> None:
    """It skips blocks or steps itself: refused before tofu, and behind it when a generation begins."""
    from cache_dit import DBCacheConfig, disable_cache, enable_cache

    config = DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        residual_diff_threshold=1.0,
        num_inference_steps=STEPS,
    )
    plain = generate(pipe, steps=STEPS)
    if "speedup" in amount:  # with tokens reduced, cache-dit does not know the blocks, and says so
        other = copy.deepcopy(pipe)
        apply_tofu(other, **amount)
        enable_cache(other, cache_config=config)
        with pytest.raises(RuntimeError, match="cache-dit was put on"):
            generate(other, steps=STEPS)
        disable_cache(other)
    enable_cache(pipe, cache_config=config)
    assert not torch.equal(generate(pipe, steps=STEPS), plain)
    try:
        apply_tofu(pipe, **amount)
    finally:
        disable_cache(pipe)
        assert torch.equal(generate(pipe, steps=STEPS), plain)


CACHES = (
    cache("First Block Cache", lambda pipe: FirstBlockCacheConfig(threshold=1.0)),
    cache(
        "MagCache",
        lambda pipe: MagCacheConfig(mag_ratios=[1.0, 0.5] * 5, num_inference_steps=10),
        note="beside skipped steps it counts those that are computed: fit its ratios to them",
    ),
    cache("SeaCache", lambda pipe: SeaCacheConfig(threshold=0.5), transformer=WAN),
    cache(
        "text key and value cache",
        lambda pipe: TextKVCacheConfig(),
        transformer=QWEN,
        changes=False,
    ),
    cache(
        "Pyramid Attention Broadcast",
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=now(pipe),
        ),
        tokens=ATTENTION,
    ),
    cache(
        "FasterCache",
        lambda pipe: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            unconditional_batch_skip_range=2,
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True,
            current_timestep_callback=now(pipe),
        ),
        tokens=ATTENTION,
    ),
    cache(
        "TaylorSeer",
        lambda pipe: TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, max_order=1
        ),
        tokens=ATTENTION,
    ),
    Course(
        "DeepCache",
        unet=UNET,
        happens=deep_cache,
        note="on after tofu and off before it; other orders are refused",
    ),
    Course(
        "cache-dit",
        transformer=TRANSFORMER | FLUX,
        happens=cache_dit,
        tokens=Refused("has cache-dit"),
        steps=Refused("has cache-dit"),
        note="it skips blocks or steps itself",
        needs="cache_dit",
    ),
)
