"""Tiny denoisers with random weights: how one is described, built and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


class Noise:
    """Draws tensors from a generator of its own: `noise(2, 4, 6, 10)` is standard normal, float32."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


@dataclass(frozen=True)
class TinyDenoiser:
    """One class of diffusers, small enough that a call takes a few hundredths of a second.

    Args:
        name: Of the class.
        config: Arguments of its constructor.
        inputs: `inputs(noise)` gives the arguments of one forward as a pipeline gives them, by name: two
            rows where there is a batch, a grid that is not square, every tensor of floats from `noise`.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[Noise], Inputs]

    def build(self, seed: int = 0) -> nn.Module:
        """The model with small random weights everywhere, so that no output is 0 from the start."""
        with torch.random.fork_rng(devices=[]):
            model = getattr(diffusers, self.name)(**self.config)
        noise = Noise(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                small = noise(*parameter.shape) * 0.1
                # Scales of norms lie around 1.
                parameter.copy_(small if parameter.ndim > 1 else 1 + small)
        return model.eval().requires_grad_(False)

    def arguments(self, seed: int = 0) -> Inputs:
        """The arguments of one forward."""
        return self.inputs(Noise(seed))


DENOISERS: dict[str, TinyDenoiser] = {}


def add(name: str, config: dict[str, Any], inputs: Callable[[Noise], Inputs]) -> None:
    """Make a tiny denoiser known by the name of its class."""
    assert name not in DENOISERS, name
    DENOISERS[name] = TinyDenoiser(name, config, inputs)


NO_DENOISERS = {
    "DreamLiteTransformer2DModel": "stands inside DreamLiteUNetModel",
    "MiniMaxMusic3RVQDepthDecoder": "writes codes of sound one after another",
    "MotionAdapter": "holds weights for UNetMotionModel",
    "TransformerTemporalModel": "stands inside video UNets",
    "UVit2DModel": "fills in masked picture tokens, and knows no noise level",
}
"""Models in diffusers' rooms of denoisers that no pipeline denoises with."""
