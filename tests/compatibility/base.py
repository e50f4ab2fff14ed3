"""A row of the table of what runs together with tofu, and the proof of its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tofu_diffusers import Handle, apply_tofu, remove_tofu

AMOUNTS = {"tokens": {"ratio": 0.5}, "steps": {"speedup": 2.0}}
# More than the few with which a ratio does without memory.
STEPS = 9
PICTURE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
Builders = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Works:
    """Runs, and really reduces tokens or skips steps."""

    cell = "works"

    def __call__(self) -> AbstractContextManager[Any]:
        return nullcontext()


@dataclass(frozen=True)
class Refused:
    """Is refused in these words, by `apply_tofu` or by the generation."""

    words: str
    cell = "refused"

    def __call__(self) -> AbstractContextManager[Any]:
        return pytest.raises((ValueError, RuntimeError), match=self.words)


def generate(pipe: Any, **options: Any) -> Tensor:
    """Latents of 128 x 128 pixels, from any pipeline that takes a prompt first."""
    small = {} if hasattr(pipe, "unet") else {"height": 128, "width": 128}
    if not hasattr(pipe, "unet"):
        small["max_sequence_length"] = 16
    return tiny.generate(pipe, **{**small, **options})


Outcome = Works | Refused


@dataclass(frozen=True)
class Row:
    """What people stack on a pipeline together with tofu.

    Args:
        name: As the table calls it.
        unet, transformer: The tiny pipelines that it is tried on, by the names of their models.
        tokens, steps: What is expected of `ratio=0.5` and of `speedup=2.0`.
        note: What to know of it.
        needs: A package without which it cannot be tried.
    """

    name: str
    unet: Builders = field(default_factory=dict)
    transformer: Builders = field(default_factory=dict)
    tokens: Outcome = field(default_factory=Works)
    steps: Outcome = field(default_factory=Works)
    note: str = ""
    needs: str | None = None

    def outcome(self, workflow: str, pipeline: str) -> Outcome:
        """What is expected of a workflow on a pipeline."""
        found: Outcome = getattr(self, workflow)
        return found

    def prove(self, pipeline: str, workflow: str) -> None:
        """Fail unless the workflow does on this pipeline what the table says."""
        raise NotImplementedError

    def build(self, pipeline: str) -> Any:
        """The tiny pipeline of that name."""
        return {**self.unet, **self.transformer}[pipeline]()


@dataclass(frozen=True)
class Combination(Row):
    """Something that is put on a pipeline, or is a part of it, before tofu or after.

    Args:
        put: Puts it on; what it returns generates instead of the pipeline. None: the pipelines have it.
        take: Takes it off again; None: nothing does.
        call: Arguments of the generation.
        count: Steps of it.
        run: Generates.
        instead: Further options with which tokens are reduced where that is refused.
        close: Whether taking it off, or another order, changes roundings.
        changes: Whether it alone changes what is generated.
    """

    put: Callable[[Any], Any] | None = None
    take: Callable[[Any], Any] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    count: int = STEPS
    instead: Mapping[str, Any] = field(default_factory=dict)
    run: Callable[..., Tensor] = generate
    close: bool = False
    changes: bool = True

    def prove(self, pipeline: str, workflow: str) -> None:
        outcome, amount = self.outcome(workflow, pipeline), AMOUNTS[workflow]
        alone, both = self.expected(pipeline)
        # It before tofu, and off before tofu where it can be taken off.
        pipe = self.build(pipeline)
        used = self.placed(pipe)
        with outcome():
            handle = apply_tofu(used, **amount)
            with counted(used) as calls:
                first = self.generate(used)
        if isinstance(outcome, Refused):
            remove_tofu(used)
            assert torch.equal(self.generate(used), both)
            if self.instead and workflow == "tokens":
                with apply_tofu(used, **amount, **self.instead) as handle:
                    assert self.generate(used).isfinite().all() and is_active(handle)
        else:
            assert first.shape == both.shape and first.isfinite().all()
            assert is_active(handle) and not torch.equal(first, both)
            if workflow == "steps":
                assert len(calls) == planned_calls(handle) < CALLS[self.name, pipeline]
            if self.take is not None:
                self.take(used)
                handle.remove()
                self.same(self.generate(pipe, plain=True), alone)
            else:
                handle.remove()
                self.same(self.generate(used), both)
        if self.put is None:
            return
        # Tofu before it, and off before it.
        pipe = self.build(pipeline)
        with outcome():
            apply_tofu(pipe, **amount)
            used = self.placed(pipe)
            second = self.generate(used)
        if not isinstance(outcome, Refused):
            self.same(second, first)
        remove_tofu(pipe)
        if used is not pipe:
            remove_tofu(used)
        self.same(self.generate(used), both)
        if self.take is not None:
            self.take(used)
            self.same(self.generate(pipe, plain=True), alone)

    def expected(self, pipeline: str) -> tuple[Tensor | None, Tensor]:
        """What the pipeline generates without tofu: alone where that can be had again, and with it."""
        key = (self.name, pipeline)
        if key not in EXPECTED:
            pipe = self.build(pipeline)
            alone = None if self.take is None else self.generate(pipe, plain=True)
            placed = self.placed(pipe)
            with counted(placed) as calls:
                both = self.generate(placed)
            CALLS[key] = len(calls)
            assert alone is None or not self.changes or not torch.equal(alone, both)
            EXPECTED[key] = alone, both
        return EXPECTED[key]

    def placed(self, pipe: Any) -> Any:
        """The pipeline with it."""
        put = None if self.put is None else self.put(pipe)
        return pipe if put is None else put

    def generate(self, pipe: Any, plain: bool = False) -> Tensor:
        """A generation; some draw from the global generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.run(pipe, steps=self.count, **({} if plain else self.call))

    def same(self, found: Tensor, expected: Tensor) -> None:
        if self.close:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(found, expected)


# By row and pipeline.
EXPECTED: dict[tuple[str, str], tuple[Tensor | None, Tensor]] = {}
CALLS: dict[tuple[str, str], int] = {}


@dataclass(frozen=True)
class Course(Row):
    """Something that happens to a pipeline with tofu.

    Args:
        happens: Given a pipeline and what to ask tofu for; fails unless all is right.
    """

    happens: Callable[[Any, dict[str, float]], None] = field(kw_only=True)

    def prove(self, pipeline: str, workflow: str) -> None:
        with self.outcome(workflow, pipeline)():
            self.happens(self.build(pipeline), AMOUNTS[workflow])


def is_active(handle: Handle) -> bool:
    """Whether the last generation had fewer tokens or fewer steps."""
    # Not by the summary, which counts FLOPs and takes longer than all else.
    fewer_tokens = [row["tokens_kept"] < row["tokens_in"] for row in handle.stats()]
    return any(fewer_tokens) or any(
        step.skipped for each in handle.inspect() for step in each.steps
    )


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Note every call of the denoiser that really runs, seen by its first layer."""
    calls: list[int] = []
    layer = next(each for each in denoiser(pipe).modules() if not list(each.children()))
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def planned_calls(handle: Handle) -> int:
    """Calls of the denoiser in the last generation that were computed."""
    return sum(step.ran for step in handle.inspect()[0].steps)


def denoiser(pipe: Any) -> Any:
    """The one that the pipeline has."""
    return tiny.denoisers(pipe)[0]


def drawn_anew(build: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A network with weights of its own."""
    with torch.random.fork_rng(devices=[]):
        model = build(*args, **options)
    return tiny.randomise(model, 3).eval().requires_grad_(False)


def as_pipeline(cls: Any, pipe: Any, **parts: Any) -> Any:
    """A pipeline of another class with the parts of this one and further ones."""
    made = cls.from_pipe(pipe, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def sd(**options: Any) -> Any:
    """One level: in most rows a second one would try nothing more."""
    return tiny.tiny_sd(channels=(32,), **options)


def sdxl() -> Any:
    """One level with attention."""
    return tiny.tiny_sdxl(channels=(32, 32), transformer_layers=(1, 2))


def sd3(**options: Any) -> Any:
    """As small as its text allows."""
    return tiny.tiny_sd3(sample_size=16, num_layers=3, **options)


UNET = {"SD": sd}
TRANSFORMER = {"SD3": sd3}
FLUX = {"FLUX": tiny.tiny_flux}
