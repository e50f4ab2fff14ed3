"""A step's calls: which of them is which, when nobody tells the steps, and what a forecast cannot do."""

import warnings

import pytest
import torch
from diffusers.guiders import SkipLayerGuidance

from tests import tiny
from tests.compatibility.guidance import MODULAR_UNET
from tofu_diffusers import apply_tofu

TEXT = torch.randn(3, 1, 7, 32, generator=torch.Generator().manual_seed(0))


def latents():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def test_when_guidance_ends_no_call_is_forecast_from_another_branch():
    """Guidance has a call of its own, and what ran as the third call runs as the second from then on."""
    unet = tiny.tiny_sd().unet
    time = torch.tensor(500)
    with torch.no_grad():
        whole = unet(latents(), time, TEXT[2]).sample
        handle = apply_tofu(unet, speedup=2.0, warmup_steps=2, rule="even", corrector=False)
        skipped = []
        for i in range(14):
            handle.step(i, 14)
            unet(latents(), time, TEXT[0])
            if i < 6:
                unet(latents(), time, TEXT[1])
            out = unet(latents(), time, TEXT[2]).sample
            skipped.append(handle.inspect()[0].steps[-1].skipped)
            if i != 6:  # whose number of calls shows when it is over
                assert torch.allclose(out, whole, atol=1e-5), i
    assert any(skipped[:6]) and not skipped[7] and any(skipped[8:])


def test_a_guider_tells_at_once_that_the_calls_of_a_step_change():
    pipe = MODULAR_UNET["SDXL"]()
    where = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}
    guider = SkipLayerGuidance(
        guidance_scale=3.0, stop=0.5, skip_layer_guidance_stop=1.0, skip_layer_config=where
    )
    pipe.update_components(guider=guider)
    with apply_tofu(pipe, speedup=2.0, rule="even", warmup_steps=2) as handle:
        pipe(
            prompt="a",
            negative_prompt="b",
            num_inference_steps=16,
            height=64,
            width=64,
            output="latents",
        )
        steps = handle.inspect()[0].steps
    calls = [step.calls for step in steps]
    changed = [i for i in range(1, 16) if calls[i] != calls[i - 1]]
    assert {2, 3} == {*calls} and calls[changed[-1]] == 2
    assert not any(steps[i].skipped for i in changed)


def test_a_loop_that_steps_no_scheduler_is_refused_at_its_second_timestep():
    pipe = tiny.tiny_sd()
    apply_tofu(pipe, speedup=2.0)
    pipe.scheduler.set_timesteps(4)
    x = latents()
    with torch.no_grad(), pytest.raises(RuntimeError, match="called at a second timestep without"):
        for time in pipe.scheduler.timesteps:
            x = x - 0.1 * pipe.unet(x, time, encoder_hidden_states=TEXT[0]).sample


def test_gradients_through_a_skipped_step_are_refused_in_words():
    pipe = tiny.tiny_sd()
    apply_tofu(pipe, speedup=2.0)
    pipe.unet.requires_grad_(False)
    pipe.scheduler.set_timesteps(12)
    x, found = latents(), 0
    words = "gradients are wanted through a step at which UNet2D"
    with torch.enable_grad(), pytest.raises(RuntimeError, match=words):
        for time in pipe.scheduler.timesteps:
            x = x.detach().requires_grad_()
            out = pipe.unet(x, time, encoder_hidden_states=TEXT[0]).sample
            (gradient,) = torch.autograd.grad(out.square().mean(), x)
            found += 1
            x = pipe.scheduler.step(out, time, x - gradient).prev_sample
    assert found  # of the steps before


def test_a_speedup_that_is_missed_on_the_way_is_told():
    pipe = tiny.tiny_wan(two=True)
    apply_tofu(pipe, speedup=2.0, warmup_steps=4)
    with pytest.warns(UserWarning, match="speedup 2 is not reached: 1[0-9] of 20 steps were"):
        tiny.generate(pipe, steps=20)
    apply_tofu(pipe, speedup=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny.generate(pipe, steps=20)


def test_a_handle_says_what_it_is():
    handle = apply_tofu(tiny.tiny_sd(), speedup=2.0)
    assert repr(handle) == "Handle(StepSkipping on UNet2DConditionModel)"
    handle.remove()
    assert repr(handle) == "Handle(removed)"
