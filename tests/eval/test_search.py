"""eval.studies.emoji.search: the schedules that are tried are those that run, and what is found is better."""

import random

import torch

from eval.studies.emoji import search
from tests import tiny
from tofu_diffusers import SKIP_RULES, Trajectory


def tiny_search():
    pipe = tiny.tiny_sd(sample_size=8)
    pipe.set_progress_bar_config(disable=True)
    trajectory = Trajectory((1.0, 0.5, 0.0), ((1.0, 0.0), (1.0, 0.3), (1.0, 1.0)))
    return search.Search(pipe, trajectory, steps=8, side=64)


def test_candidates_have_as_many_steps_and_the_first():
    draw, computed = random.Random(0), [0, 2, 5]
    seen = set()
    for _ in range(300):
        tried = search.moved(computed, 8, draw)
        assert len({*tried}) == 3 and tried[0] == 0 and max(tried) < 8
        assert len({*tried} & {*computed}) == 2
        seen.add(tuple(tried))
    # Every neighbour is reached.
    assert len(seen) == 2 * 5


def test_the_steps_of_a_candidate_are_those_that_run():
    made = tiny_search()
    calls = []
    hook = made.pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    whole = made.made(None, ["a cat"], 0, "latent")
    assert len(calls) == 8
    some = made.made([0, 1, 4], ["a cat"], 0, "latent")
    hook.remove()
    assert len(calls) == 8 + 3 and not any(name[0].isdigit() for name in SKIP_RULES)
    assert not torch.equal(some, whole)


def test_what_is_found_is_no_worse_than_the_start():
    made = tiny_search()
    start = made.planned(2.0)
    assert len(start) == 4 and start[0] == 0
    found, ahead = made.best(start, candidates=6)
    assert len(found) == 4 and ahead >= 0
    assert (ahead > 0) == (found != start)
