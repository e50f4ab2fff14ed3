"""SeaCache's rule on whole predictions: a step is skipped while the latents' signal has changed little.

diffusers has SeaCache on the blocks of a transformer. That one never skips on SD3's, whose last block
returns no text, and there is none for UNets; the rule needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eval.baselines.clock import Clock
from eval.baselines.step_cache import StepCache, cached_where
from eval.denoiser import denoiser_of

POWER = 3.0
"""Exponent of the frequency in the power of clean pictures, diffusers' default."""
TINY = 1e-16


def filtered(latents: Tensor, signal: float, noise: float) -> Tensor:
    """The signal that the spectrum of clean pictures lets expect in noisy latents (arXiv 2602.18993, eq. 7).

    Args:
        latents: [B, C, H, W].
        signal, noise: What clean latents and noise are multiplied by in them.
    """
    gain = torch.ones((), device=latents.device)
    for axis in (-2, -1):
        frequencies = torch.fft.fftfreq(latents.shape[axis], device=latents.device)
        power = 1 / (frequencies.abs() ** POWER + TINY)
        own = signal * power / (signal**2 * power + noise**2 + TINY)
        gain = gain * (own[:, None] if axis == -2 else own)
    spectrum = torch.fft.fft2(latents.float()) * (gain / gain.mean())
    return torch.fft.ifft2(spectrum).real


class Gate:
    """Which steps are computed.

    Args:
        scheduler: Knows how much of the latents is noise.
        threshold: Bound of the summed relative change of the filtered latents. Higher skips more.
        most: Steps that are skipped in a row; 0 is no bound.
    """

    def __init__(self, scheduler: Any, threshold: float, most: int) -> None:
        self.scheduler, self.threshold, self.most = scheduler, threshold, most
        self.before: Tensor | None = None
        self.change, self.skipped = 0.0, 0

    def levels(self, time: float) -> tuple[float, float]:
        """What clean latents and noise are multiplied by at a timestep."""
        if hasattr(self.scheduler, "alphas_cumprod"):
            share = float(self.scheduler.alphas_cumprod[round(time)])
            return share**0.5, (1 - share) ** 0.5
        # Those of flow matching are noise levels.
        noise = time / self.scheduler.config.num_train_timesteps
        return 1 - noise, noise

    def __call__(self, clock: Clock, latents: Tensor) -> bool:
        """Whether the step that begins is computed."""
        assert clock.time is not None  # the clock has been told of this call
        now = filtered(latents, *self.levels(clock.time))
        if not clock.step:
            self.before = None
        if self.before is not None:
            size = self.before.abs().mean().clamp(min=TINY)
            self.change += float((now - self.before).abs().mean() / size)
        last = clock.step == len(self.scheduler.timesteps) - 1
        full = self.most > 0 and self.skipped == self.most
        computes = self.before is None or last or full or self.change >= self.threshold
        self.before = now
        self.skipped = 0 if computes else self.skipped + 1
        if computes:
            self.change = 0.0
        return computes


@contextmanager
def sea_cached(
    pipe: Any, *, threshold: float, order: int = 1, most: int = 2
) -> Iterator[StepCache]:
    """Skip steps of a pipeline's denoiser by SeaCache's rule.

    Args:
        threshold: Bound of the summed relative change of the filtered latents, that of the whole batch.
            Higher skips more.
        order: 0 repeats the last prediction, the paper's; 1 extrapolates the last two, diffusers' default.
        most: Steps that are skipped in a row, diffusers' default; 0 is no bound.

    Raises:
        ValueError: on a threshold that nothing is under, or numbers that are none of these; if the pipeline
            has no denoiser by a usual name.
    """
    if threshold <= 0 or most < 0:
        raise ValueError(
            f"threshold {threshold}, most {most}: SeaCache needs a threshold above 0 and 0 or more steps"
        )
    with cached_where(denoiser_of(pipe), Gate(pipe.scheduler, threshold, most), order) as cache:
        yield cache
