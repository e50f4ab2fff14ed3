"""The steps that are worth computing, found from the inner products of the predictions."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu_diffusers.steps.trajectory import (
    CORRECTED_SHARE,
    TRANSIENT,
    Trajectory,
    best_steps,
    reach_of,
)


def drawn(total, seed):
    draw = np.random.default_rng(seed)
    predictions = np.cumsum(draw.standard_normal((total, 4)), axis=0)
    return predictions, draw.uniform(0.2, 1.0, total)


def lacking(predictions, sizes, chosen, order, corrects):
    """What a schedule leaves, written out on the predictions themselves, skip by skip."""
    total, steps = len(sizes), sorted(chosen)
    share, error = sizes / sizes.sum(), 0.0
    for n, i in enumerate(steps):
        end = steps[n + 1] if n + 1 < len(steps) else total
        change = predictions[i] - predictions[steps[n - 1]] if n and order else 0 * predictions[i]
        gone, off = np.zeros(predictions.shape[1]), np.zeros(predictions.shape[1])
        for j in range(i + 1, end):
            # By least squares, between standing still and a straight line.
            there = predictions[j] - predictions[i]
            amount = there @ change / max(change @ change, 1e-300)
            if n:
                amount = min(max(amount, 0.0), (j - i) / (i - steps[n - 1]))
            gone = gone + sizes[j] * (amount * change - there)
            error += TRANSIENT * share[j] * gone @ gone
            if end < total:
                line = (j - i) / (end - i) * (predictions[end] - predictions[i])
                off = off + sizes[j] * (line - there)
        if corrects and order and end < total - 1:
            gone = (1 - CORRECTED_SHARE) * gone + CORRECTED_SHARE * off
        error += gone @ gone
    return error


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(0, 2**31), st.sampled_from([0, 1]), st.booleans(), st.data())
def test_no_other_choice_leaves_less(total, seed, order, corrects, data):
    predictions, sizes = drawn(total, seed)
    computed = data.draw(st.integers(1, total - 1))
    last = data.draw(st.integers(2, total))
    first = data.draw(st.integers(1, last - 1))
    free = range(first, last)
    must = {*range(total)} - {*free}
    computed = min(total - 1, max(computed, len(must) + (len(free) > 0)))
    if computed <= len(must):
        return
    products = predictions @ predictions.T
    chosen = best_steps(products, sizes, computed, free, order, corrects)
    assert len(chosen) == computed and must <= chosen
    found = lacking(predictions, sizes, chosen, order, corrects)
    for others in combinations(free, computed - len(must)):
        schedule = must | {*others}
        # Distances beyond three times the mean are not looked at.
        edges = [*sorted(schedule), total]
        if max(b - a for a, b in pairwise(edges)) > 3 * len(free) // (computed - len(must)) + 2:
            continue
        other = lacking(predictions, sizes, schedule, order, corrects)
        assert found <= other * (1 + 1e-6) + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(1, 3))
def test_no_other_reach_forecasts_better(seed, before, distance):
    """Of all between standing still and a straight line."""
    predictions, _ = drawn(10, seed)
    last = before + distance
    ahead = np.arange(last + 1, 10)
    reach = reach_of(predictions @ predictions.T, before, last, ahead)
    slope = (predictions[last] - predictions[before]) / distance

    def off(amount, step):
        return np.square(predictions[last] + amount * slope - predictions[step]).sum()

    for amount, step in zip(reach, ahead, strict=True):
        assert 0 <= amount <= step - last
        for other in np.linspace(0, step - last, 9):
            assert off(amount, step) <= off(other, step) + 1e-9


def test_predictions_of_zero_or_nan_have_no_trajectory():
    for products in (np.zeros((3, 3)), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="NaN, infinite or all zero"):
            Trajectory.from_products((1.0, 0.5, 0.0), products)


def test_a_mapping_of_something_else_is_refused():
    for other in ({}, {"levels": (1, 0.5), "points": ((1,), (2,)), "weights": "x"}):
        with pytest.raises(ValueError, match="a trajectory has levels and points, and this has"):
            Trajectory.of(other)


def test_beyond_the_levels_that_are_known_the_line_goes_on():
    """Held there, predictions would seem not to change, and nothing would be computed at the end."""
    trajectory = Trajectory((1.0, 0.8, 0.5), ((1.0, 0.0), (1.0, 0.2), (1.0, 0.8)))
    levels = [1.1, 1.0, 0.9, 0.8, 0.5, 0.2]
    points = np.array([[1.0, y] for y in (-0.1, 0.0, 0.1, 0.2, 0.8, 1.4)])
    np.testing.assert_allclose(trajectory.at(levels), points @ points.T)


def test_predictions_that_do_not_change_are_repeated():
    assert not reach_of(np.ones((5, 5)), 0, 1, np.arange(2, 5)).any()


def test_a_trajectory_is_itself_at_its_levels_and_on_the_lines_between_them():
    predictions, _ = drawn(6, 0)
    levels = (1.0, 0.9, 0.7, 0.4, 0.2, 0.05)
    products = predictions @ predictions.T
    trajectory = Trajectory(levels, predictions.tolist())
    np.testing.assert_allclose(trajectory.at(levels), products)
    halfway = (predictions[2] + predictions[3]) / 2
    finer = trajectory.at((0.7, 0.55, 0.4))
    wanted = [halfway @ each for each in (predictions[2], halfway, predictions[3])]
    np.testing.assert_allclose(finer[1], wanted)
    # From inner products alone, up to their scale.
    again = Trajectory.from_products(levels, products).at(levels)
    np.testing.assert_allclose(again / again[0, 0], products / products[0, 0], atol=1e-2)


@pytest.mark.parametrize(
    ("levels", "points", "words"),
    [
        ((1.0,), ((1.0,),), "1 levels of a trajectory"),
        ((0.2, 0.8), ((1, 0), (0, 1)), "2 or more and descend"),
        ((0.8, 0.2), ((1, 2, 3), (2, 1)), r"2 points of \[2, 3\] numbers for 2 levels"),
        ((0.8, 0.2), ((1,),), "1 points"),
        ((0.8, 0.2), ((), ()), r"2 points of \[0\] numbers"),
        ((0.8, 0.2), ((1,), (float("nan"),)), "NaN or infinite numbers"),
        ((0.8, float("nan")), ((1,), (2,)), "NaN or infinite numbers"),
    ],
)
def test_what_is_no_trajectory_is_refused(levels, points, words):
    with pytest.raises(ValueError, match=words):
        Trajectory(levels, points)
