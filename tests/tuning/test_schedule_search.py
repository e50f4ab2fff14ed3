"""Learned schedules leave out no less than constant ones, and drift no more where they were learned."""

import pytest
import torch

from tests import tiny
from tofu_diffusers import TokenReduction, apply_tofu, learn_schedule
from tofu_diffusers.tuning.schedule_search import (
    DEPTHS,
    NOISE_POINTS,
    ReductionBudget,
    follow_rewards,
    spread,
)

WORK = ReductionBudget((0.0, 0.2, 0.4, 0.6, 0.8), (0.0, 0.5, 1.0), (4.0, 1.0, 4.0))
CONFIG = TokenReduction(method="tome", ratio=0.4)
SHORT = {"rounds": 2, "candidates": 3, "num_inference_steps": 4}


def quiet(**options):
    pipe = tiny.tiny_sd(transformer_layers=2, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, config=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if config is not None:
        apply_tofu(pipe, config)
    return pipe("a cat", generator=generator, num_inference_steps=4, output_type="latent").images


@pytest.mark.parametrize("seed", range(6))
def test_a_spread_ratio_leaves_out_no_less_and_little_more(seed):
    logits = 2 * torch.randn(NOISE_POINTS + DEPTHS, generator=torch.Generator().manual_seed(seed))
    found = spread(CONFIG, 0.7, logits, WORK)
    assert found.ratio == 0.7 and not found.schedule.is_constant
    # A factor is a multiple of a quarter at every step and depth, so the share moves by steps.
    assert WORK.removed(CONFIG) <= WORK.removed(found) <= WORK.removed(CONFIG) + 0.06
    order = torch.tensor([factor for _, factor in found.schedule.points]).argsort()
    assert torch.equal(order, logits[:NOISE_POINTS].argsort())


def test_the_policy_goes_where_rewards_are():
    goal = torch.tensor([2.0, -1.0, 0.5])
    found = follow_rewards(lambda x: -float((x - goal).square().sum()), 3, 60, 8, seed=0)
    torch.testing.assert_close(found, goal, rtol=0, atol=0.4)
    # Of rewards only their order of size among each other counts, not their scale.
    scaled = follow_rewards(lambda x: -1e-6 * float((x - goal).square().sum()), 3, 60, 8, seed=0)
    torch.testing.assert_close(found, scaled, rtol=1e-3, atol=1e-3)
    assert torch.equal(follow_rewards(lambda x: 1.0, 3, 5, 4, seed=0), torch.zeros(3))


def test_the_work_is_that_of_the_generation():
    pipe = quiet()
    config = CONFIG.replace(warmup_steps=1, cooldown_steps=1)
    handle = apply_tofu(pipe, config, depth_schedule=[(0, 1.0), (1, 1.0)])
    pipe("a cat", num_inference_steps=5, output_type="latent")
    generation = handle._generations[0][1]
    work = ReductionBudget.of(generation)
    assert len(work.positions) == 3 and work.positions == tuple(sorted(work.positions))
    assert len(work.depths) == len(work.weights) == len(handle.stats())
    assert work.removed(config) == pytest.approx(config.ratio)
    # As many tokens as the sites count, where all weigh the same.
    ramp = config.replace(schedule="linear", depth_schedule=[(0, 0.5), (1, 1)])
    handle = apply_tofu(pipe, ramp)
    pipe("a cat", num_inference_steps=5, output_type="latent")
    rows = handle.stats()
    per_token = ReductionBudget(
        work.positions, work.depths, tuple(row["tokens_in"] for row in rows)
    )
    gone = sum(row["tokens_in"] - row["tokens_kept"] for row in rows)
    share = gone / sum(row["tokens_in"] for row in rows) * 5 / 3
    assert per_token.removed(ramp) == pytest.approx(share, abs=0.01)


def test_what_is_learned_is_what_was_measured(tmp_path):
    pipe = quiet()
    whole, state = latents(pipe), torch.get_rng_state()
    learned = learn_schedule(pipe, ["a cat"], CONFIG, **SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert learned.error <= learned.constant_error
    assert torch.equal(latents(pipe), whole)  # no trace
    for config, error in (
        (CONFIG, learned.constant_error),
        (learned.config, learned.error),
        (TokenReduction.load(learned.config.save(tmp_path).parent), learned.error),
    ):
        drift = float((latents(quiet(), config) - whole).square().mean())
        assert drift == pytest.approx(error, rel=1e-4)
    again = learn_schedule(quiet(), ["a cat"], CONFIG, **SHORT)
    assert again.config == learned.config


def test_what_cannot_be_learned_is_refused():
    pipe = quiet()
    for prompts, config, options, said in (
        ([], CONFIG, {}, "no prompts to learn from"),
        (
            ["a cat"],
            TokenReduction(ratio=0.4),
            {},
            "names no method; name one, such as method='tome'",
        ),
        (["a cat"], CONFIG.replace(schedule="linear"), {}, "has schedules already"),
        (["a cat"], CONFIG.replace(ratio=0.0), {}, "ratio 0 cannot be spread up to"),
        (["a cat"], CONFIG, {"most": 0.4}, "ratio 0.4 cannot be spread up to 0.4"),
        (["a cat"], CONFIG, {"most": 0.8}, r"method 'tome' can reach \(0.75\)"),
        (
            ["a cat"],
            CONFIG.replace(warmup_steps=2, cooldown_steps=1),
            {"num_inference_steps": 3},
            "all 3 steps compute all tokens",
        ),
        (["a cat"], CONFIG, {"rounds": 0}, "0 rounds of 6 candidates"),
        (["a cat"], CONFIG, {"candidates": 1}, "6 rounds of 1 candidates"),
    ):
        with pytest.raises(ValueError, match=said):
            learn_schedule(pipe, prompts, config, **options)
    assert "_tofu" not in pipe.unet.__dict__
    with pytest.raises(TypeError, match="takes a diffusers pipeline, not UNet2DCond"):
        learn_schedule(pipe.unet, ["a cat"], CONFIG)
    with (
        apply_tofu(pipe, ratio=0.5),
        pytest.raises(ValueError, match=r"call remove_tofu\(pipe\) before"),
    ):
        learn_schedule(pipe, ["a cat"], CONFIG)
