"""Times every call of a module: the denoiser's steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Timer:
    """Times every call of a module, by CUDA events on a GPU and by the clock elsewhere.

    Hooks go on the module itself, so that what is put inside of it later is timed along.
    """

    module: nn.Module
    marks: list[tuple[Any, Any]] = field(default_factory=list)

    def _now(self) -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> Timer:
        def before(*_: Any) -> None:
            self.start = self._now()

        def after(*_: Any) -> None:
            self.marks.append((self.start, self._now()))

        self.hooks = [
            self.module.register_forward_pre_hook(before),
            self.module.register_forward_hook(after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def calls_ms(self) -> list[float]:
        """Of every call so far; waits for the device."""
        if not torch.cuda.is_available():
            return [(end - start) * 1e3 for start, end in self.marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in self.marks]
