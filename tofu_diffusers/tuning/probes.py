"""How much a prediction depends on each token: measured by its gradient once, then guessed from the token.

The gradient of a sum of the prediction with random signs, with respect to a block's input, has at each token
the expected square norm of that token's part of the Jacobian (Hutchinson's estimator). A probe per block,
linear in the token's features, is fitted to its logarithm; then no backward pass is needed any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..tokens.random_bits import uniform
from ..tokens.sources.gradient import features, log_norm

KIND = "gradient probes"


def signed_sum(prediction: Tensor, seed: int) -> Tensor:
    """The sum of a prediction with random signs, whose gradient is looked at.  [...] -> 0-d."""
    places = torch.arange(prediction.numel(), device=prediction.device)
    signs = (uniform(seed, None, places) < 0.5).to(prediction.dtype).mul(2).sub(1)
    return (prediction * signs.view(prediction.shape)).sum()


class Fit:
    """Ridge regression of the logarithm of gradient norms on features, within each image.

    What an image and a step have in common (how noisy it is) says nothing of which token matters more, so
    both sides are taken relative to their mean over the image's tokens.
    """

    def __init__(self, width: int) -> None:
        self.square = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.product = torch.zeros(width + 1, dtype=torch.float64)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Tokens and their gradients, both [B, N, C]."""
        known = features(x).double().cpu()
        known = (known - known.mean(dim=1, keepdim=True)).flatten(0, 1)
        wanted = log_norm(gradient).double().cpu()
        wanted = (wanted - wanted.mean(dim=1, keepdim=True)).flatten()
        self.square += known.T @ known
        self.product += known.T @ wanted

    def probe(self, ridge: float = 1e-3) -> Tensor:
        """The probe, with this share of the features' mean square as penalty.  -> [C + 1] float32."""
        penalty = ridge * self.square.diagonal().mean().clamp(min=1e-12)
        regular = self.square + penalty * torch.eye(len(self.product), dtype=torch.float64)
        probe: Tensor = torch.linalg.solve(regular, self.product)
        return probe.float()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of each row of [B, N], averaged."""
    ranks = torch.stack([each.argsort(dim=1).argsort(dim=1).double() for each in (a, b)])
    ranks = ranks - ranks.mean(dim=2, keepdim=True)
    first, second = ranks / torch.linalg.vector_norm(ranks, dim=2, keepdim=True)
    return float((first * second).sum(dim=1).mean())


def save_probes(path: str | Path, probes: Mapping[str, Tensor]) -> None:
    """Write the probes, by block name, as safetensors."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(probes), path, metadata={"kind": KIND})


def load_probes(path: str | Path, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The probes of these blocks of a denoiser or encoder, whose tokens have so many channels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no probes, or not those of these blocks.
    """
    remedy = "write one with calibrate_gradient(pipe, prompts, path)"
    if not Path(path).is_file():
        raise FileNotFoundError(f"no probe file {path}; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            probes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kind = (file.metadata() or {}).get("kind")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); {remedy}") from error
    if kind != KIND:
        raise ValueError(f"{path} holds no gradient probes; {remedy}")
    for name, width in widths.items():
        has = probes[name].numel() - 1 if name in probes else None
        if has != width:
            what = "none" if has is None else f"one for {has} channels"
            raise ValueError(
                f"{path} was made for another model: for {name} with {width} channels it has {what}; "
                f"{remedy}"
            )
    return {name: probes[name] for name in widths}
