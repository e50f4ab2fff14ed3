"""torch.compile, of the whole denoiser and block by block."""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

from tests import tiny
from tofu_diffusers import apply_tofu

from .base import STEPS, Course, denoiser, generate, is_active


def compiled_whole(pipe: Any) -> None:
    denoiser(pipe).compile(fullgraph=True, backend="eager")


def compiled_blocks(pipe: Any) -> None:
    denoiser(pipe).compile_repeated_blocks(fullgraph=True, backend="eager")


def course(compiled: Callable[[Any], None]) -> Callable[[Any, dict[str, float]], None]:
    """Compiled before tofu; tests/test_compile.py has the other order, all families and graphs."""

    def happens(pipe: Any, amount: dict[str, float]) -> None:
        plain = generate(pipe, steps=STEPS)
        with apply_tofu(pipe, **amount):
            expected = generate(pipe, steps=STEPS)
        torch._dynamo.reset()
        try:
            compiled(pipe)
            with apply_tofu(pipe, **amount) as handle:
                found = generate(pipe, steps=STEPS)
                assert is_active(handle)
            with torch.compiler.set_stance("force_eager"):
                assert torch.equal(generate(pipe, steps=STEPS), plain)
        finally:
            torch._dynamo.reset()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    return happens


# Tracing takes as long as there are layers.
UNET = {"SD": tiny.small_sd}
TRANSFORMER = {"FLUX": lambda: tiny.tiny_flux(num_layers=1, num_single_layers=1)}
COMPILING = (
    Course(
        "`torch.compile(fullgraph=True)`",
        unet=UNET,
        transformer=TRANSFORMER,
        happens=course(compiled_whole),
        note="the denoiser is compiled two or three times",
    ),
    Course(
        "`compile_repeated_blocks(fullgraph=True)`",
        unet=UNET,
        transformer=TRANSFORMER,
        happens=course(compiled_blocks),
        note="quickest; with `speedup=` as without tofu",
    ),
)
