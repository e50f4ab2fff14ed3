"""How sure is a distance? By resampling the images, as `eval.statistics` does for means.

A Frechet distance is drawn only `FEW` times, so its interval is a coarse one: 50 draws of 1280 features take
one busy core 2 s at 256 images, 8 s at 1024 and 50 s at 2560.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.metrics.frechet import frechet_distance, kernel_distance
from eval.statistics import MANY, SEED, Resampled

FEW = 50


def of_frechet(mine: Tensor, others: Tensor, *, paired: bool) -> Resampled:
    """The Frechet distance of two sets of features.  [N, D], [M, D].

    Args:
        mine: Of the setting.
        others: What it is compared with.
        paired: Row i of both belongs together (a prompt and seed), and both are drawn together.

    A resample has about 63 % of the images, some of them several times, so its distance is biased upwards
    like that of a smaller set. All draws are therefore shifted to have `value` as their mean: the interval
    says how the distance at this n varies, and not how far any finite n is from the truth.
    """
    x, y = mine.double(), others.double()
    draws = [
        _frechet(x, y, torch.from_numpy(a), torch.from_numpy(b))
        for a, b in zip(*_counts(len(x), len(y), FEW, paired), strict=True)
    ]
    return _centred(frechet_distance(mine, others), np.array(draws), len(x))


def of_kernel(mine: Tensor, others: Tensor, *, paired: bool) -> Resampled:
    """The kernel distance (KID) of two sets of features, drawn and shifted as in `of_frechet`."""
    x, y = mine.double().numpy(), others.double().numpy()
    n, m, width = len(x), len(y), x.shape[1]

    def mean(left: np.ndarray, right: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Mean of the kernel over all pairs of each resample.  [R, N], [R, M] -> [R]."""
        kernel: np.ndarray = (left @ right.T / width + 1) ** 3
        total: np.ndarray = ((a @ kernel) * b).sum(1)
        if left is right:  # nobody is paired with itself
            return (total - a @ kernel.diagonal()) / (len(left) * (len(left) - 1))
        return total / (len(left) * len(right))

    a, b = _counts(n, m, MANY, paired)
    draws = mean(x, x, a, a) + mean(y, y, b, b) - 2 * mean(x, y, a, b)
    return _centred(kernel_distance(mine, others), draws, n)


def _frechet(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    """With row i of x counted a[i] times, and row j of y b[j] times."""

    def moments(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, and a matrix R with R^T R the covariance and no more rows than columns."""
        rows, counts = rows[counts > 0], counts[counts > 0, None]
        mean = (counts * rows).sum(0) / counts.sum()
        root = ((rows - mean) * counts.sqrt()) / (counts.sum() - 1).sqrt()
        if len(root) > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R
        return mean, root

    (mean_x, root_x), (mean_y, root_y) = moments(x, a), moments(y, b)
    # Tr sqrt(X^T X Y^T Y) is the sum of the singular values of X Y^T, at most images by images.
    shared = torch.linalg.svdvals(root_x @ root_y.T).sum()
    spread = root_x.square().sum() + root_y.square().sum() - 2 * shared
    return float((mean_x - mean_y).square().sum() + spread)


def _counts(n: int, m: int, resamples: int, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample has each image.  [R, N], [R, M], float64."""
    if paired and n != m:
        raise ValueError(f"{n} images cannot be paired with {m}; give one of both for each")

    def draw(seed: int, size: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return generator.multinomial(size, np.full(size, 1 / size), resamples).astype(np.float64)

    mine = draw(SEED, n)
    # Their own generator: the draws of n images are the same whatever they are compared with.
    return mine, mine if paired else draw(SEED + 1, m)


def _centred(value: float, draws: np.ndarray, n: int) -> Resampled:
    return Resampled(value, tuple((draws - draws.mean() + value).tolist()), n)
