"""Noise levels and steps are read from every kind of scheduler, whatever its timesteps mean."""

import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tests import tiny
from tests.compatibility.guidance import MODULAR_UNET
from tofu_diffusers import apply_tofu
from tofu_diffusers.steps.sampler import Sampling


def sampling(scheduler, steps=20):
    scheduler.set_timesteps(steps)
    return Sampling.of(scheduler)


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}], ids=["trained", "karras"])
def test_levels_do_not_hang_on_what_timesteps_mean(options):
    options = {**options, "prediction_type": "v_prediction"}
    plain = sampling(EulerDiscreteScheduler(**options))
    # Stable Video Diffusion: timesteps are logarithms of sigma.
    other = sampling(EulerDiscreteScheduler(timestep_type="continuous", **options))
    assert other.timesteps != plain.timesteps
    assert other.angles == pytest.approx(plain.angles, abs=1e-4)
    assert other.sizes == pytest.approx(plain.sizes, rel=1e-4)
    assert other.noise == other.angles


@pytest.mark.parametrize(
    "kind",
    [EDMEulerScheduler, EDMDPMSolverMultistepScheduler, CMStochasticIterativeScheduler],
)
def test_levels_of_edm_fall_from_noise_to_picture(kind):
    scheduler = kind()
    found = sampling(scheduler)
    assert list(found.angles) == sorted(found.angles, reverse=True) and len({*found.angles}) == 20
    assert found.angles[0] > 0.9 and found.angles[-1] < 0.1
    sigma, width = float(scheduler.sigmas[3]), scheduler.config.sigma_data
    assert found.angles[3] == pytest.approx(math.atan(sigma / width) / (math.pi / 2))


def test_levels_that_count_from_the_picture_on_are_turned_round():
    plain = sampling(FlowMatchEulerDiscreteScheduler())
    turned = sampling(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))  # Mochi
    assert turned.angles == pytest.approx(plain.angles, abs=1e-3)
    assert turned.noise == pytest.approx(plain.noise, abs=1e-3)
    assert turned.sizes[:-1] == pytest.approx(plain.sizes[:-1], abs=1e-3)


def test_sigmas_and_alphas_say_the_same():
    by_sigma, by_alpha = sampling(DPMSolverMultistepScheduler()), sampling(DDIMScheduler())
    alphas = DDIMScheduler().alphas_cumprod
    for each in (by_sigma, by_alpha):
        kept = float(alphas[int(each.timesteps[7])])
        angle = math.atan2(math.sqrt(1 - kept), math.sqrt(kept)) / (math.pi / 2)
        assert each.angles[7] == pytest.approx(angle, abs=1e-4)


def test_levels_that_say_nothing_count_as_even():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    scheduler.timesteps = torch.full((4,), 500)
    assert Sampling.of(scheduler).angles == Sampling.evenly(4).angles


def test_plans_of_edm_are_those_of_its_noise_levels():
    pipe = tiny.tiny_sdxl()
    plans = []
    options = {**tiny.NOISE, "use_karras_sigmas": True, "prediction_type": "v_prediction"}
    for kind in ("discrete", "continuous"):
        pipe.scheduler = EulerDiscreteScheduler(**options, timestep_type=kind)
        with apply_tofu(pipe, speedup=2.0) as handle:
            tiny.generate(pipe, steps=20)
            plans.append(handle.summary().steps[0].plan)
    assert plans[0] == plans[1] and plans[0].count("#") == 10


@pytest.mark.parametrize("strength", [0.6, 0.3])
def test_image_to_image_that_announces_nothing_is_planned_from_its_first_timestep(strength):
    """Modular pipelines announce no number of steps, and DDIM no first one."""
    pipe = MODULAR_UNET["SDXL"]()
    pipe.update_components(scheduler=DDIMScheduler(**tiny.NOISE))
    with apply_tofu(pipe, speedup=2.0) as handle:
        pipe(
            prompt="a",
            negative_prompt="b",
            image=torch.rand(1, 3, 64, 64),
            strength=strength,
            num_inference_steps=30,
            height=64,
            width=64,
            output="latents",
        )
        (steps,) = handle.summary().steps
        assert steps.steps == round(30 * strength)
        assert steps.computed == steps.steps // 2
        assert handle.inspect()[0].cache_bytes == 0  # the generation is over
