"""How sure is a number, and by how much do two settings differ? Spreads, and means by resampling the images.

>>> mine, others = of_mean(psnr_of_one), of_mean(psnr_of_another)
>>> relative_increase(mine, others).upper  # at most this much more, with 95 % confidence

A statistic draws the same images in every setting with n images, so two settings on the same prompts are
compared pair by pair.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

SEED = 0
MANY = 2000
CONFIDENCE = 0.95


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    low, high = np.percentile(values, [20, 80])
    return {"value": statistics.median(values), "low": float(low), "high": float(high)}


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
    # Here, as whatever only times needs `spread` and no more.
    import scipy.stats

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


def of_rank_correlation(
    mine: Sequence[float] | Tensor, others: Sequence[float] | Tensor
) -> Resampled:
    """Spearman's rank correlation of two numbers an item.

    Raises:
        ValueError: if there are not three items or more.
    """
    import scipy.stats

    a, b = (np.asarray(each, dtype=np.float64) for each in (mine, others))
    if len(a) < 3:
        raise ValueError(f"a rank correlation needs 3 items or more, not {len(a)}")

    def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        ranks = [scipy.stats.rankdata(each, axis=axis) for each in (x, y)]
        first, second = (each - each.mean(axis=axis, keepdims=True) for each in ranks)
        scale = np.linalg.norm(first, axis=axis) * np.linalg.norm(second, axis=axis)
        found: np.ndarray = (first * second).sum(axis=axis) / scale
        return found

    result = scipy.stats.bootstrap(
        (a, b),
        spearman,
        paired=True,
        n_resamples=MANY,
        batch=100,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=SEED,
    )
    draws = tuple(result.bootstrap_distribution.tolist())
    return Resampled(float(spearman(a, b)), draws, len(a))


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
