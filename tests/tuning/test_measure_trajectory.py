"""measure_trajectory: what it keeps is what the scheduler was given."""

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

from tests import tiny
from tofu_diffusers import StepSkipping, apply_tofu, measure_trajectory
from tofu_diffusers.steps.sampler import Sampling

STEPS = 10


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_sd3, tiny.tiny_wan])
def test_it_has_the_inner_products_of_what_the_scheduler_is_given(build):
    pipe = build()
    given, step = [], pipe.scheduler.step

    def note(prediction, *args, **kwargs):
        given.append(prediction.flatten().double())
        return step(prediction, *args, **kwargs)

    pipe.scheduler.step = note
    call = {"num_inference_steps": STEPS, **tiny.CALLS.get(type(pipe), {})}
    call.setdefault("height", 64)
    call.setdefault("width", 64)
    trajectory = measure_trajectory(pipe, "a cat", seed=3, **call)
    assert pipe.scheduler.step is note  # as it was before
    assert trajectory.levels == pytest.approx(Sampling.of(pipe.scheduler).angles, abs=1e-5)
    rows = torch.stack(given)
    wanted, found = (rows @ rows.T).numpy(), trajectory.at(trajectory.levels)
    np.testing.assert_allclose(found / found[0, 0], wanted / wanted[0, 0], atol=2e-3)


def test_it_is_planned_by_and_saved_and_read(tmp_path):
    pipe = tiny.small_sd()
    before = tiny.generate(pipe, steps=4)
    options = {"num_inference_steps": 12, "height": 64, "width": 64}
    trajectory = measure_trajectory(pipe, ["a cat", "a dog"], **options)
    assert trajectory == measure_trajectory(pipe, ["a cat", "a dog"], **options)
    config = StepSkipping(speedup=3.0, rule="trajectory", trajectory=trajectory)
    config.save(tmp_path)
    assert StepSkipping.load(tmp_path) == config
    with apply_tofu(pipe, config) as handle:
        tiny.generate(pipe, steps=12)
        (count,) = handle.summary().steps
        assert count.computed == 4 and count.plan[0] == "#"
        # The profile leaves nothing else open.
        assert handle.configs[0].trajectory == trajectory
    with apply_tofu(pipe, speedup=3.0, trajectory=trajectory) as handle:
        tiny.generate(pipe, steps=12)
        assert handle.summary().steps[0].plan == count.plan
    assert torch.equal(tiny.generate(pipe, steps=4), before)


def test_a_sampler_of_two_calls_a_step_is_at_every_level_once():
    pipe = tiny.small_sd()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    trajectory = measure_trajectory(pipe, "a cat", num_inference_steps=10, height=64, width=64)
    assert len(trajectory.levels) == 10


def test_what_cannot_be_measured_is_refused():
    pipe = tiny.small_sd()
    with pytest.raises(ValueError, match="no prompts"):
        measure_trajectory(pipe, [])
    with pytest.raises(TypeError, match="no pipeline with a scheduler"):
        measure_trajectory(pipe.unet, "a cat")
    with pytest.raises(ValueError, match=r"9 steps of descending noise .* needs 10"):
        measure_trajectory(pipe, "a cat", num_inference_steps=9, height=64, width=64)
    with apply_tofu(pipe, ratio=0.5), pytest.raises(ValueError, match="has tofu"):
        measure_trajectory(pipe, "a cat")
