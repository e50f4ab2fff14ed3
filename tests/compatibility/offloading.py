"""Where weights lie between calls."""

from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module

from .base import FLUX, TRANSFORMER, UNET, Combination, denoiser

CPU = torch.device("cpu")


def offload(pipe: Any) -> None:
    cpu_offload(denoiser(pipe), execution_device=CPU)


def offload_whole(pipe: Any) -> None:
    cpu_offload_with_hook(denoiser(pipe), execution_device=CPU)


def unhook(pipe: Any) -> None:
    remove_hook_from_module(denoiser(pipe), recurse=True)


def group_offload(pipe: Any, kind: str) -> None:
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    denoiser(pipe).enable_group_offload(CPU, CPU, kind, **options)


nothing_changes = partial(Combination, unet=UNET, transformer=TRANSFORMER | FLUX, changes=False)
OFFLOADING = (
    nothing_changes("accelerate's `cpu_offload` (sequential)", put=offload, take=unhook),
    nothing_changes(
        "accelerate's `cpu_offload_with_hook` (by model)", put=offload_whole, take=unhook
    ),
    nothing_changes("group offloading, by blocks", put=partial(group_offload, kind="block_level")),
    nothing_changes("group offloading, by leaves", put=partial(group_offload, kind="leaf_level")),
)
