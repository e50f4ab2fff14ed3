"""A denoiser split between processes."""

import multiprocessing
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from diffusers import ContextParallelConfig

from tofu_diffusers import apply_tofu

from .base import FLUX, STEPS, Course, Refused, generate, is_active

PROCESSES = 2


def one_of_two(rank: int, meeting: Path, pipe: Any, amount: dict[str, float], told: Any) -> None:
    """A process: what it generates in parallel is what it generates alone, up to roundings."""
    try:
        plain = generate(pipe, steps=STEPS)
        with apply_tofu(pipe, speedup=2.0):
            expected = generate(pipe, steps=STEPS)
        # Where there are no accelerators, diffusers divides by their number.
        torch.accelerator.device_count = lambda: 1
        torch.distributed.init_process_group(
            "gloo", init_method=meeting.as_uri(), rank=rank, world_size=PROCESSES
        )
        pipe.transformer.set_attention_backend("native")
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES))
        with apply_tofu(pipe, **amount) as handle:
            found = generate(pipe, steps=STEPS)
            assert is_active(handle)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        off = generate(pipe, steps=STEPS)
        torch.testing.assert_close(off, plain, rtol=1e-3, atol=1e-3)
    except ValueError as error:
        told.send(error)
    except BaseException:
        told.send(AssertionError(traceback.format_exc()))
    else:
        told.send(None)


def in_parallel(pipe: Any, amount: dict[str, float]) -> None:
    """Forked, so that nothing is imported again."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for rank in range(PROCESSES):
            here, there = context.Pipe(duplex=False)
            args = (rank, Path(folder) / "meeting", pipe, amount, there)
            pairs.append((context.Process(target=one_of_two, args=args), here))
            pairs[-1][0].start()
        errors = [
            here.recv() if here.poll(60) else AssertionError("no answer") for _, here in pairs
        ]
        for process, _ in pairs:
            process.kill()
            process.join()
    for error in errors:
        if error is not None:
            raise error


PARALLEL = (
    Course(
        "context parallel (Ulysses)",
        transformer=FLUX,
        happens=in_parallel,
        tokens=Refused("tokens are split between processes"),
        note="no process has all tokens to choose from",
    ),
)
