"""The steps that are worth computing, found from the inner products of the predictions."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu_diffusers.steps.trajectory import TRANSIENT, Trajectory, best_steps


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
        slope = np.zeros(predictions.shape[1])
        if n and order:
            slope = (predictions[i] - predictions[steps[n - 1]]) / (i - steps[n - 1])
        gone = np.zeros(predictions.shape[1])
        for j in range(i + 1, end):
            gone = gone + sizes[j] * (predictions[i] + (j - i) * slope - predictions[j])
            error += TRANSIENT * share[j] * gone @ gone
        if corrects and order and end < total - 1:
            slope = (predictions[end] - predictions[i]) / (end - i)
            made = [predictions[i] + (j - i) * slope for j in range(i + 1, end)]
            gone = sum(
                (
                    sizes[j] * (p - predictions[j])
                    for j, p in zip(range(i + 1, end), made, strict=True)
                ),
                np.zeros(predictions.shape[1]),
            )
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
    # Beyond its ends it stays as it is.
    np.testing.assert_allclose(trajectory.at((1.0, 0.0))[1, 1], predictions[5] @ predictions[5])
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
    ],
)
def test_what_is_no_trajectory_is_refused(levels, points, words):
    with pytest.raises(ValueError, match=words):
        Trajectory(levels, points)
