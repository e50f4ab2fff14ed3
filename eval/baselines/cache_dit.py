"""DBCache of cache-dit, with and without its forecasts (TaylorSeer, FoCa)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention import JointTransformerBlock

from eval.baselines.host_state import attributes_kept

FORECASTS = ("repeat", "taylorseer", "foca")


@contextmanager
def dual_block_cached(
    pipe: Any,
    *,
    threshold: float,
    steps: int,
    first: int = 1,
    warmup: int = 2,
    forecast: str = "repeat",
) -> Iterator[None]:
    """DBCache of cache-dit: the blocks behind the first ones are left out while those change little.

    Its own table of pipelines goes by their class names, so that a subclass is not in it: here it is told
    where the blocks are.

    Args:
        pipe: A pipeline with a `transformer` of SD3's kind.
        threshold: Blocks are left out while what the first ones add differs from when all were last computed
            by at most this share. Higher leaves out more.
        steps: Of the generation.
        first: Blocks that are computed at every step.
        warmup: Steps at the start at which all blocks are computed.
        forecast: Of what the blocks left out add: "repeat", "taylorseer" (first order, arXiv 2503.06923) or
            "foca" (arXiv 2508.16211).

    Raises:
        ValueError: if cache-dit is not installed, or the pipeline has no such transformer; on an unknown
            forecast or a number with which nothing would be left out.
    """
    if forecast not in FORECASTS:
        raise ValueError(f"unknown forecast {forecast!r}; choose one of {', '.join(FORECASTS)}")
    if threshold <= 0 or first < 1 or warmup < 1:
        raise ValueError(
            f"threshold {threshold}, first {first}, warmup {warmup}: DBCache needs a threshold above 0, and "
            "1 or more first blocks and warm-up steps"
        )
    transformer = getattr(pipe, "transformer", None)
    blocks = getattr(transformer, "transformer_blocks", [])
    if not blocks or not all(isinstance(block, JointTransformerBlock) for block in blocks):
        raise ValueError(f"DBCache is set up here for SD3's transformer, not {type(pipe).__name__}")
    if first >= len(blocks):
        raise ValueError(f"first {first} leaves none of {len(blocks)} blocks to leave out")
    try:
        package: Any = importlib.import_module("cache_dit")
    except ImportError as error:
        raise ValueError("cache-dit is not installed; pip install cache-dit") from error
    adapter = package.BlockAdapter(
        pipe=pipe,
        transformer=transformer,
        blocks=blocks,
        forward_pattern=package.ForwardPattern.Pattern_1,
    )
    config = package.DBCacheConfig(
        Fn_compute_blocks=first,
        Bn_compute_blocks=0,
        max_warmup_steps=warmup,
        residual_diff_threshold=threshold,
        num_inference_steps=steps,
    )
    calibrators = {
        "taylorseer": package.TaylorSeerCalibratorConfig,
        "foca": package.FoCaCalibratorConfig,
    }
    calibrator = None
    if forecast in calibrators:
        # SD3's last block returns no text, without which the forecast of the text fails.
        calibrator = calibrators[forecast](enable_encoder_calibrator=False)
    with attributes_kept(transformer):
        package.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            package.disable_cache(adapter)
