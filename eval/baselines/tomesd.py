"""The package tomesd, which merges tokens in UNets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eval.baselines.host_state import attributes_kept
from eval.baselines.options import check_types


@contextmanager
def merged_by_tomesd(pipe: Any, **options: Any) -> Iterator[None]:
    """The pipeline patched by tomesd, which serves UNets of BasicTransformerBlocks.

    Raises:
        ValueError: if it has no UNet, or these are no options of tomesd's.
    """
    import tomesd

    try:
        inspect.signature(tomesd.apply_patch).bind(pipe, **options)
        check_types(tomesd.apply_patch, options)
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
