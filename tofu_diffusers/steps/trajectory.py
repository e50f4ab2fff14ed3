"""How a denoiser's predictions change from step to step, and the steps that are worth computing for it.

The error that skipped steps leave in the latents is a sum over them: how far the step moves the latents,
times how wrong the forecast was. A forecast is a sum of predictions that were computed. So the square of the
error needs nothing of the predictions but their inner products. One unreduced generation gives those, and
from them the best steps for any number of steps and any speed-up are found in milliseconds, without the
denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

CORRECTED_SHARE = 0.5
"""The part of what the latents lack that a computed step makes up for, see `forecast.corrector_weights`. A
trained denoiser draws latents that went astray back by itself, so that the whole of it is too much: on both
embedded pipelines a half was ahead of all and of nothing at 2x and beyond, of steps and of tokens."""

TRANSIENT = 10.0
"""Weight of what the latents lack between computed steps, against what is missing in the end. The denoiser
is called on these latents, so that it costs more than it seems. Fitted on random schedules of the embedded
pipelines, where 3 to 30 do as well."""

DIMENSIONS, DIGITS = 32, 5
"""Of the points of a measured trajectory. Where few steps are skipped their errors are small: planned with 16
dimensions, 1.3x was behind 1.5x on the embedded `unet`; 50 are no better than 32."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Trajectory:
    """The path that a denoiser's predictions take along an unreduced generation.

    Args:
        levels: Noise levels at which they were made, descending: `Sampling.angles`.
        points: [L, D], each prediction as a point in few dimensions, whose inner products are those of the
            predictions (the mean over generations); any scale.

    Raises:
        ValueError: if the levels do not descend, or there is not one point for each.
    """

    levels: tuple[float, ...]
    points: tuple[tuple[float, ...], ...]

    def __repr__(self) -> str:
        first, *_, last = self.levels
        return f"Trajectory({len(self.levels)} noise levels from {first:.3f} to {last:.3f})"

    def __post_init__(self) -> None:
        levels = tuple(float(each) for each in self.levels)
        points = tuple(tuple(float(each) for each in row) for row in self.points)
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "points", points)
        if len(levels) < 2 or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(
                f"{len(levels)} levels of a trajectory, which must be 2 or more and descend"
            )
        sizes = {len(row) for row in points}
        if len(points) != len(levels) or len(sizes) != 1 or sizes == {0}:
            raise ValueError(
                f"{len(points)} points of {sorted(sizes)} numbers for {len(levels)} levels of a trajectory; "
                "each level has one point, all with the same dimensions"
            )
        if not np.isfinite([*levels, *(number for row in points for number in row)]).all():
            raise ValueError(
                "a trajectory with NaN or infinite numbers plans nothing; measure it again"
            )

    @classmethod
    def of(cls, value: Any) -> Trajectory:
        """Return a trajectory itself, or make one from its JSON form."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            if {*value} != {"levels", "points"}:
                found = ", ".join(map(str, value)) or "nothing"
                raise ValueError(f"a trajectory has levels and points, and this has {found}")
            return cls(**value)
        raise TypeError(f"a trajectory is a Trajectory or a mapping, not {type(value).__name__}")

    @classmethod
    def from_products(
        cls, levels: Sequence[float], products: Matrix, dimensions: int = DIMENSIONS
    ) -> Trajectory:
        """The path with these inner products [L, L], in as many dimensions as matter, each 1 wide at most.

        Raises:
            ValueError: if they are not finite, or all zero.
        """
        if not np.isfinite(products).all() or np.trace(products) <= 0:
            raise ValueError(
                "the predictions are NaN, infinite or all zero, and have no trajectory; look at a picture of "
                "this pipeline, and use float32 or bfloat16"
            )
        sizes, axes = np.linalg.eigh(products)
        largest = np.argsort(sizes)[::-1][:dimensions]
        points = axes[:, largest] * np.sqrt(np.maximum(sizes[largest], 0.0))
        points = np.round(points / np.abs(points).max(), DIGITS)
        return cls(tuple(np.round(levels, DIGITS).tolist()), tuple(map(tuple, points.tolist())))

    def at(self, levels: Sequence[float]) -> Matrix:
        """The inner products of the predictions at other levels.

        On the lines between those known; beyond them the line goes on. A generation that leaves them far is
        planned badly: measure with its own noise levels, or with more steps.

        Returns:
            [N, N].
        """
        known, points = np.array(self.levels), np.array(self.points)
        wanted = np.asarray(levels, dtype=float)
        # Of the pair of known levels around each, or nearest to it.
        first = np.clip(np.searchsorted(-known, -wanted, side="right") - 1, 0, len(known) - 2)
        share = (known[first] - wanted) / (known[first] - known[first + 1])
        there = points[first] + share[:, None] * (points[first + 1] - points[first])
        return np.asarray(there @ there.T)


def best_steps(
    products: Matrix, sizes: Matrix, computed: int, free: range, order: int, corrects: bool
) -> set[int]:
    """The steps to compute so that the latents lack least in the end, by dynamic programming.

    Args:
        products: [N, N], inner products of the unreduced predictions.
        sizes: [N], how far each step moves the latents along its prediction.
        computed: How many are computed in all.
        free: Which of them may be skipped; all others are computed.
        order: Of the forecast: 0 repeats the last prediction, 1 extrapolates the last two.
        corrects: Whether a computed step makes up for the forecasts before it, see `Forecaster`.
    """
    total = len(sizes)
    # More than three times the mean distance is never worth it.
    gap = min(total, 3 * len(free) // max(1, computed - (total - len(free))) + 2)
    cost = _costs(products, sizes, gap, order, corrects)
    # A step that must be computed is not jumped over.
    must = np.array([0.0 if step in free else 1.0 for step in range(total)])
    before = np.concatenate([[0.0], np.cumsum(must)])
    for length in range(2, gap + 1):
        ends = np.minimum(np.arange(total) + length, total)
        jumped = before[ends] - before[np.minimum(np.arange(total) + 1, total)]
        cost[jumped > 0, :, length] = np.inf
    # least[i, d]: of the best that computes i, and i - d last before it (0: nothing before).
    least = np.full((total, gap + 1), np.inf)
    least[0, 0] = 0.0
    choices = []
    for _ in range(computed - 1):
        ways = least[:, :, None] + cost
        choice, found = ways.argmin(axis=1), ways.min(axis=1)
        least = np.full_like(least, np.inf)
        for length in range(1, gap + 1):
            least[length:, length] = found[: total - length, length]
        choices.append(choice)
    ends = total - np.arange(total)
    last = np.where(ends <= gap, ends, 0)
    tail = least + np.where(ends <= gap, 0.0, np.inf)[:, None]
    tail = tail + cost[np.arange(total), :, last]
    step, distance = np.unravel_index(int(tail.argmin()), tail.shape)
    steps = {int(step)}
    for choice in reversed(choices):
        length = int(distance)
        step = step - length
        distance = choice[step, length]
        steps.add(int(step))
    return steps


def reach_of(products: Matrix, before: int, last: int, steps: NDArray[Any]) -> Matrix:
    """Of how many steps the last change is added, so that forecasts of these steps are off the least.

    By least squares, but never more than on a straight line, and never back: what is fitted to one
    trajectory must do for others.

    Args:
        products: [N, N], inner products of the unreduced predictions.
        before: The step computed before the last one.
        last: The step computed last.
        steps: Those that are forecast, behind the last one.

    Returns:
        One for each of the steps.
    """
    change: Matrix = products[last] - products[before]
    length = max(float(change[last] - change[before]), np.finfo(float).tiny)
    fitted = (last - before) * (change[steps] - change[last]) / length
    reach: Matrix = np.clip(fitted, 0.0, steps - last)
    return reach


def _costs(products: Matrix, sizes: Matrix, gap: int, order: int, corrects: bool) -> Matrix:
    """What the latents lack by skipping from one computed step to the next.

    Returns:
        [N, gap + 1, gap + 1], of the step computed at i, i - d computed last before it (d = 0: nothing) and
        i + e computed next, or the end reached: entry [i, d, e].
    """
    total = len(sizes)
    # Sums up to a step, not with it: of the sizes, of sizes times places, of predictions times sizes.
    moved = np.concatenate([[0.0], np.cumsum(sizes)])
    placed = np.concatenate([[0.0], np.cumsum(sizes * np.arange(total))])
    half = np.concatenate([np.zeros((1, total)), np.cumsum(sizes[:, None] * products, axis=0)])
    full = np.concatenate([np.zeros((total + 1, 1)), np.cumsum(half * sizes, axis=1)], axis=1)
    cost = np.full((total, gap + 1, gap + 1), np.inf)
    share = sizes / sizes.sum()
    for i in range(total):
        ends = np.arange(i + 1, min(total, i + gap) + 1)  # the next one computed
        amount = moved[ends] - moved[i + 1]
        # Of what the latents should have got.
        lost = half[ends] - half[i + 1]
        true = full[ends, ends] - 2 * full[ends, i + 1] + full[i + 1, i + 1]
        # Interpolated between i and the end, as corrected; there is no end behind the last step.
        next_ones = np.minimum(ends, total - 1)
        line = (placed[ends] - placed[i + 1] - i * amount) / (ends - i)
        part = np.where(ends < total - 1, CORRECTED_SHARE if corrects and order else 0.0, 0.0)
        for d in range(1, min(gap, i) + 1) if i else (0,):
            slope = np.zeros_like(amount)
            if d and order:
                ahead = np.arange(i + 1, ends[-1])
                turned = sizes[ahead] * reach_of(products, i - d, i, ahead) / d
                slope = np.concatenate([[0.0], np.cumsum(turned)])
            # Up to and with each skipped step; of none, at the next one, nothing is lacking.
            weights = np.concatenate([[0.0], share[i + 1 : ends[-1]]])
            places = np.stack([np.full_like(ends, i), np.full_like(ends, i - d), next_ones])
            plain = np.stack([amount + slope, -slope, 0 * line])
            bent = np.stack([amount - line, 0 * line, line])
            off = _squares(products, places, plain, lost, true)
            between = TRANSIENT * np.cumsum(weights * off)
            # Of the forecast, and of what it turns out to have missed.
            mixed = (1 - part) * plain + part * bent
            rest = _squares(products, places, mixed, lost, true)
            cost[i, d, 1 : len(ends) + 1] = between + rest
    # Rounding may leave a little below nothing.
    return np.asarray(np.maximum(cost, 0.0))


def _squares(
    products: Matrix, places: NDArray[Any], amounts: Matrix, lost: Matrix, true: Matrix
) -> Matrix:
    """How far so much of some predictions is from what the latents should have got, squared.

    Args:
        products: [N, N].
        places: [K, E], of K predictions for each of E ends.
        amounts: [K, E], of each.
        lost: [E, N], inner products of what the latents should have got with all predictions.
        true: [E], of this with itself.
    """
    crossed = products[places[:, None], places]
    own = np.einsum("ke,le,kle->e", amounts, amounts, crossed)
    with_lost = np.einsum("ke,ke->e", amounts, lost[np.arange(len(true)), places])
    return np.asarray(own - 2 * with_lost + true)
