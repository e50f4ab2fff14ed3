"""How far a picture is from the unreduced one of its prompt and seed: PSNR, SSIM, LPIPS."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    lpips,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from eval.metrics.extractors import Pictures, weights_of

PSNR_CAP_DB = (
    120.0  # more than any two pictures have that differ and are of less than 5,000 x 5,000 pixels
)
# The backbones of LPIPS by the start of their file's SHA-256: alexnet-owt-7be5be79.pth, vgg16-397923af.pth.
LPIPS_NETS = {"7be5be79": "alex", "397923af": "vgg"}


class Lpips:
    """LPIPS with torchmetrics' linear heads and a local file of torchvision's AlexNet or VGG-16.

    Raises:
        ValueError: if the file is another.
        ImportError: without torchvision.
    """

    def __init__(self, path: str | Path) -> None:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        name = LPIPS_NETS.get(digest[:8])
        if name is None:
            raise ValueError(
                f"{path} is no backbone of LPIPS: its SHA-256 starts with {digest[:8]}, not with "
                f"{' or '.join(LPIPS_NETS)}; take torchvision's alexnet-owt-7be5be79.pth or "
                "vgg16-397923af.pth"
            )
        try:
            self.net = lpips._NoTrainLpips(net=name, pnet_rand=True)
        except ModuleNotFoundError as error:
            raise ImportError(
                "LPIPS needs the torchvision that fits your torch; install it, or leave out --lpips-path"
            ) from error
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # "features.3.weight" there is "slice2.3.weight" here.
        names = {name: f"features.{name.split('.', 1)[1]}" for name in self.net.net.state_dict()}
        self.net.net.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
        self.identity = {"name": f"lpips-{name}", "weights": weights_of(self.net)}

    @torch.no_grad()
    def __call__(self, mine: Tensor, others: Tensor) -> Tensor:
        """LPIPS of each picture to the one at its place.  uint8 [B, 3, H, W] x 2 -> [B]."""
        return self.net(mine / 255, others / 255, normalize=True).flatten()


def psnr_db(mine: Tensor, others: Tensor) -> Tensor:
    """PSNR of each picture to the one at its place.  uint8 [B, 3, H, W] x 2 -> float64 [B]."""
    x, y = mine.double(), others.double()
    psnr = peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return psnr.clamp(max=PSNR_CAP_DB)


def drift(mine: Pictures, others: Pictures, perceptual: Lpips | None = None) -> dict[str, Tensor]:
    """Of each picture from the one at its place: PSNR, SSIM and, if given, LPIPS."""
    found: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": []}
    for a, b in zip(mine.batches(), others.batches(), strict=True):
        x, y = a.double(), b.double()
        ssim = structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")
        found["psnr_db"].append(psnr_db(a, b))
        found["ssim"].append(ssim)
        if perceptual is not None:
            found.setdefault("lpips", []).append(perceptual(a, b))
    return {name: torch.cat(values) for name, values in found.items()}
