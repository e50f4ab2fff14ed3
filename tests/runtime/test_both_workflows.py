"""Tokens shrink inside the steps that run: both workflows on one denoiser."""

import warnings

import pytest
import torch

from tests import tiny
from tofu_diffusers import StepSkipping, TokenReduction, apply_tofu, remove_tofu

PIPELINES = {"sd3": tiny.tiny_sd3, "flux": tiny.tiny_flux, "sd": tiny.tiny_sd}


def given_to(linear):
    """How many tokens a linear layer is given, call by call; what stops the count."""
    seen = []
    hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen, hook.remove


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    ("steps", "speedup"), [(10, 1.5), (10, 2), (12, 2), (16, 3), (20, 3), (25, 4)]
)
def test_tokens_go_also_where_few_steps_are_computed(name, steps, speedup):
    """By the profile if enough steps run to have a past, else by what needs none."""
    pipe = PIPELINES[name]()
    (model,) = tiny.denoisers(pipe)
    feed = next(m for path, m in model.named_modules() if path.endswith("ff.net.0.proj"))
    seen, stop = given_to(feed)
    tiny.generate(pipe, ["a cat"], steps=1)
    (all_tokens,) = {*seen}
    configs = TokenReduction(ratio=0.5), StepSkipping(speedup=speedup, warmup_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply_tofu(pipe, *configs) as handle:
            tiny.generate(pipe, ["a cat"], steps=steps)
            stop()
            summary = handle.summary()
    (counted,) = summary.steps
    assert counted.computed <= max(2, steps / speedup)
    assert min(seen) < all_tokens
    assert summary.speedup > 1.1 * steps / counted.computed
    assert ("method tofu" in str(summary)) == (counted.computed <= 8), summary
    remove_tofu(pipe)


def test_counting_warns_of_nothing():
    pipe = tiny.tiny_sd3()
    with apply_tofu(pipe, ratio=0.5, warmup_steps=30) as handle:
        with pytest.warns(
            UserWarning, match=r"removes nothing in these 12 steps, .* lower warmup_steps"
        ):
            tiny.generate(pipe, ["a cat"], steps=12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.summary()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ratio": 0.001}, r"on \d+x\d+ \(.*: ratio 0\.001 is less than one token"),
        ({"ratio": 0.5, "schedule": [(0, 0), (1, 0)]}, "take the ratio to 0 at every step"),
        ({"ratio": 0.5, "depth_schedule": [(0, 0), (1, 0)]}, "take the ratio to 0 at every step"),
        ({"ratio": 0.5, "min_tokens": 1000}, "min_tokens 1000 leaves out all grids"),
        ({"ratio": 0.5, "cooldown_steps": 12}, "12 at the end, of 12 that are computed"),
    ],
)
def test_a_reduction_that_removes_nothing_says_what_keeps_all_tokens(options, why):
    pipe = tiny.tiny_sd3()
    with apply_tofu(pipe, **options), pytest.warns(UserWarning, match=why), torch.no_grad():
        tiny.generate(pipe, ["a cat"], steps=12)
