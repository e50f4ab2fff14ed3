"""How sure is a mean or a distance, and by how much do two settings differ? By resampling the images.

>>> mine, others = of_mean(psnr_of_one), of_mean(psnr_of_another)
>>> relative_increase(mine, others).upper  # at most this much more, with 95 % confidence

A statistic draws the same images in every setting with n images, so two settings on the same prompts are
compared pair by pair. A Frechet distance is drawn only `FEW` times, so its interval is a coarse one: 50
draws of 1280 features take one busy core 2 s at 256 images, 8 s at 1024 and 50 s at 2560.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from eval.metrics.extractors import frechet_distance, kernel_distance

SEED = 0
MANY, FEW = 2000, 50
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Resampled:
    """A statistic of n images, and what it is on each resample of them.

    Args:
        value: Of the images as they are.
        draws: One a resample; in the same order for every statistic of n images.
        n: Images.
    """

    value: float
    draws: tuple[float, ...]
    n: int

    def entry(self) -> dict[str, float | int]:
        """The value and its 95 % percentile interval, as results have them."""
        low, high = _interval(np.array(self.draws))
        return {"value": self.value, "low": low, "high": high, "n": self.n}


@dataclass(frozen=True)
class Change:
    """From one setting to another: the 95 % interval (low, high) and the one-sided 95 % bounds.

    A loss is held to a limit, as in non-inferiority, by one bound: `upper` where less is better, `lower`
    where more is.
    """

    value: float
    low: float
    high: float
    lower: float
    upper: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """As JSON has it."""
        return asdict(self)


def of_mean(values: Sequence[float] | Tensor) -> Resampled:
    """The mean of one number an image.

    Raises:
        ValueError: if there are not two or more.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        raise ValueError(f"an interval needs 2 images or more, not {len(numbers)}")
    result = scipy.stats.bootstrap(
        (numbers,),
        np.mean,
        n_resamples=MANY,
        batch=100,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=SEED,
    )
    return Resampled(
        float(numbers.mean()), tuple(result.bootstrap_distribution.tolist()), len(numbers)
    )


def of_frechet(mine: Tensor, others: Tensor, *, paired: bool) -> Resampled:
    """The Frechet distance of two sets of features.  [N, D], [M, D]

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
        """Of the kernel over all pairs of each resample.  [R, N], [R, M] -> [R]"""
        kernel: np.ndarray = (left @ right.T / width + 1) ** 3
        total: np.ndarray = ((a @ kernel) * b).sum(1)
        if left is right:  # nobody is paired with itself
            return (total - a @ kernel.diagonal()) / (len(left) * (len(left) - 1))
        return total / (len(left) * len(right))

    a, b = _counts(n, m, MANY, paired)
    draws = mean(x, x, a, a) + mean(y, y, b, b) - 2 * mean(x, y, a, b)
    return _centred(kernel_distance(mine, others), draws, n)


def difference(mine: Resampled, others: Resampled) -> Change:
    """By how much `mine` is more than `others`, image by image.

    Raises:
        ValueError: if they are of other numbers of images or resamples.
    """
    a, b = _pair(mine, others)
    return _change(mine.value - others.value, a - b, mine.n)


def relative_increase(mine: Resampled, others: Resampled) -> Change:
    """The same as a share of `others`: 0.05 is 5 % more.

    Raises:
        ValueError: as `difference`; or if `others` is not above 0 throughout, and so nothing to divide by.
    """
    a, b = _pair(mine, others)
    least = min(b.min(), others.value)
    if least <= 0:
        raise ValueError(
            f"no ratio to a value that may be {least:.3g}, not above 0; take the difference"
        )
    return _change(mine.value / others.value - 1, a / b - 1, mine.n)


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
    """How often each resample has each image.  [R, N], [R, M], float64"""
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


def _pair(mine: Resampled, others: Resampled) -> tuple[np.ndarray, np.ndarray]:
    for what, a, b in (
        ("images", mine.n, others.n),
        ("resamples", len(mine.draws), len(others.draws)),
    ):
        if a != b:
            raise ValueError(f"{a} {what} against {b}; only the same can be compared in pairs")
    return np.array(mine.draws), np.array(others.draws)


def _change(value: float, draws: np.ndarray, n: int) -> Change:
    bounds = (float(np.quantile(draws, q)) for q in (1 - CONFIDENCE, CONFIDENCE))
    return Change(value, *_interval(draws), *bounds, n)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))
