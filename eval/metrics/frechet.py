"""Distances between two sets of features: Frechet distance and kernel distance (KID)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image import fid
from torchmetrics.image.kid import KernelInceptionDistance

SUBSETS = 100  # of KID where the two sets are not of one size


class _Given(nn.Identity):
    """The extractor of metrics that are given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(mine: Tensor, others: Tensor, *, split: bool = False) -> float:
    """Frechet distance of two sets' Gaussians, in float64.  [N, D], [M, D].

    split: every process of a group gives its part of both sets, and gets the distance of the whole.
    """
    metric = fid.FrechetInceptionDistance(feature=_Given(mine.shape[1]), sync_on_compute=split)
    metric.update(others.double(), real=True)
    metric.update(mine.double(), real=False)
    return max(0.0, float(metric.compute()))  # of equal sets, rounding leaves it a hair below


def few_pictures(mine: Tensor, others: Tensor) -> str | None:
    """A warning, if the sets are smaller than their features are wide.  [N, D], [M, D]."""
    least, width = min(len(mine), len(others)), mine.shape[1]
    if least >= width:
        return None
    return (
        f"{least} images for {width} feature dimensions: biased upwards; compare at the same number "
        "of images only"
    )


def kernel_distance(mine: Tensor, others: Tensor) -> float:
    """KID: the squared MMD under (x y / D + 1)^3, in float64.  [N, D], [M, D].

    Of sets of one size it is that of all pictures; of others the mean over `SUBSETS` seeded subsets, each
    as large as the smaller set. It is unbiased for independent sets, and below 0 for much the same pictures.
    """
    size = min(len(mine), len(others))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", ".*save all extracted features")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            feature=_Given(mine.shape[1]),
            subsets=1 if len(mine) == len(others) else SUBSETS,
            subset_size=size,
            sync_on_compute=False,
        )
        metric.update(others.double(), real=True)
        metric.update(mine.double(), real=False)
        return float(metric.compute()[0])
