"""eval.studies.emoji.forecasts: one group of tokens is what `tune` fits; of three, each has a third."""

import pytest
import torch

from eval.bench.pipeline import one_batch
from eval.studies.emoji.forecasts import SETTINGS, Forecasts
from tests import tiny
from tofu_diffusers import apply_tofu
from tofu_diffusers.steps.sampler import Sampling
from tofu_diffusers.tuning.fit import Fit, handing_on
from tofu_diffusers.tuning.trajectory import told_of_steps

PLAN = "#.##.#.#"
CALL = {"num_inference_steps": 8, "height": 64, "width": 64, "output_type": "latent"}


def test_with_all_tokens_in_one_group_it_fits_what_tune_fits():
    pipe, mine = tiny.tiny_sd(), Forecasts(PLAN, None)
    fit, behind = Fit(mine.computed, len(PLAN)), []
    with told_of_steps(pipe.scheduler, lambda *told: behind.append(told[2][0].clone())):
        one_batch(pipe, ["a cat"], 3, CALL)
    plain = handing_on(mine.computed, len(PLAN), Sampling.of(pipe.scheduler))
    with apply_tofu(pipe, plain), fit.watching(pipe.scheduler, behind):
        one_batch(pipe, ["a cat"], 3, CALL)
    mine.fit(pipe, ["a cat"], 3, CALL)
    for step in range(1, len(PLAN)):
        torch.testing.assert_close(mine.fits[0].weights(step), fit.weights(step))


@pytest.mark.parametrize("name", ["fitted-curvature", "fitted-random"])
def test_each_token_is_in_one_of_three_equal_groups(name):
    predictions = torch.randn(3, 2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    groups = Forecasts(PLAN, SETTINGS[name][0])._groups([*predictions], (5, 3, 2))
    assert [group.sum(dim=(1, 2, 3)).tolist() for group in groups] == [[8.0, 8.0]] * 3
    assert torch.equal(sum(groups), torch.ones(2, 1, 6, 4))
