"""Which implementation runs: Triton on CUDA where it can be imported, the torch reference everywhere else.

The environment variable TOFU_KERNELS forces one for whatever has both: `reference`, or `triton`, which on a
CPU needs Triton's interpreter (TRITON_INTERPRET=1). Both are read once, when this is imported. Kernels take
float32, float16 and bfloat16 of up to `WIDEST` channels and are not differentiated: other tensors, and what
needs a gradient, go to torch.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch
from torch import Tensor

from .reference import best_match as reference_match
from .reference import best_match_tiles as reference_match_tiles
from .reference import energy as reference_energy
from .reference import energy_tiles as reference_energy_tiles

CHOICES = ("reference", "triton")
KERNELS = ("energy", "gather", "match", "merge", "unmerge")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 2**14
"""Most channels: a program holds whole rows in registers."""


def read_choice(value: str | None) -> str | None:
    """The value of TOFU_KERNELS; None: unset or empty, so the device decides.

    Raises:
        ValueError: it names no implementation.
    """
    if not value:
        return None
    if value not in CHOICES:
        raise ValueError(
            f"TOFU_KERNELS is {value!r}; choose one of {', '.join(CHOICES)}, or leave it unset"
        )
    return value


def load(choice: str | None) -> bool:
    """Register the Triton operations, `torch.ops.tofu`; whether there are any.

    Raises:
        ValueError: Triton is asked for and cannot be imported.
    """
    # A torch without CUDA is spared the import, which takes about as long as torch's own.
    if choice == "reference" or (choice is None and torch.version.cuda is None):
        return False
    try:
        for name in KERNELS:
            import_module(f"{__package__}.triton.{name}")
    except ImportError as error:
        if choice is None:
            return False
        raise ValueError(
            f"TOFU_KERNELS is 'triton', but triton cannot be imported ({error}); install it, or "
            f"choose one of {', '.join(CHOICES)}"
        ) from error
    return True


CHOICE = read_choice(os.environ.get("TOFU_KERNELS"))
LOADED = load(CHOICE)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors [..., C] runs in Triton.

    Raises:
        ValueError: Triton is forced, and they are on a CPU without its interpreter.
    """
    if not LOADED or any([t.dtype not in DTYPES or t.shape[-1] > WIDEST for t in tensors]):
        return False
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        return False
    if all([t.device.type == "cuda" for t in tensors]):
        return True
    if CHOICE is None or any([t.device.type != "cpu" for t in tensors]):
        return False
    if not INTERPRETED:
        raise ValueError(
            "TOFU_KERNELS is 'triton', but the tensors are on the CPU, where Triton needs its "
            "interpreter: set TRITON_INTERPRET=1 too, or TOFU_KERNELS=reference (choices: "
            f"{', '.join(CHOICES)})"
        )
    return True


def use_fused_rows(*tensors: Tensor) -> bool:
    """Whether a kernel that only moves rows is called; compiled, torch fuses its own with what is around."""
    return use_triton(*tensors) and not torch.compiler.is_compiling()


def best_match(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.best_match`."""
    queries, candidates = queries.detach(), candidates.detach()
    if use_triton(queries, candidates) and queries.dtype == candidates.dtype:
        value, index = torch.ops.tofu.best_match(queries, candidates)
        return value, index
    return reference_match(queries, candidates)


def best_match_tiles(metric: Tensor, candidate: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.best_match_tiles`."""
    metric = metric.detach()
    if use_triton(metric):
        value, position = torch.ops.tofu.best_match_tiles(metric, candidate, tiles)
        return value, position
    return reference_match_tiles(metric, candidate, tiles)


def energy(metric: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """See `reference.energy`."""
    metric = metric.detach()
    if use_triton(metric):
        result: Tensor = torch.ops.tofu.energy(metric, margin, alpha)
        return result
    return reference_energy(metric, margin, alpha)


def energy_tiles(metric: Tensor, tiles: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """See `reference.energy_tiles`."""
    metric = metric.detach()
    if use_triton(metric):
        result: Tensor = torch.ops.tofu.energy_tiles(metric, tiles, margin, alpha)
        return result
    return reference_energy_tiles(metric, tiles, margin, alpha)
