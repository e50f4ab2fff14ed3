"""What people pass to a pipeline whose steps are skipped: noise levels, shifts, guidance, a strength."""

import math

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests import tiny
from tests.compatibility.base import as_pipeline, sd, sd3, sdxl
from tofu_diffusers import apply_tofu

STEPS = 12
PICTURE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def generate(pipe, then=lambda pipe, index, kwargs: kwargs, tensors=("latents",), **call):
    """Latents, and of each denoiser the batches that its first layer was given, step by step.

    then: Called behind every step, like a pipeline's own callback.
    """
    found = [[[]] for _ in tiny.denoisers(pipe)]

    def end(pipe, index, timestep, kwargs):
        for steps in found:
            steps.append([])
        return then(pipe, index, kwargs)

    hooks = []
    for model, steps in zip(tiny.denoisers(pipe), found, strict=True):
        layer = next(each for each in model.modules() if not list(each.children()))
        hooks.append(
            layer.register_forward_hook(
                lambda _, args, out, steps=steps: steps[-1].append(len(out))
            )
        )
    call = {"steps": STEPS, "callback_on_step_end_tensor_inputs": [*tensors]} | call
    try:
        made = tiny.generate(pipe, callback_on_step_end=end, **call)
    finally:
        for hook in hooks:
            hook.remove()
    return made, [steps[:-1] for steps in found]


def signs(steps):
    """As a plan is written: at which steps the denoiser ran."""
    return "".join("#" if calls else "." for calls in steps)


def plans(handle):
    """Of each denoiser what `summary()` shows, which counts FLOPs and takes longer than all else."""
    steps = [each.steps for each in handle.inspect()]
    return ["".join("." if step.skipped else "#" for step in each) for each in steps]


# ---- noise levels -----------------------------------------------------------------------------------


def euler():
    return with_scheduler(sd(), "EulerDiscrete")


def multistep():
    return with_scheduler(sd(), "DPMSolverMultistep")


def with_scheduler(pipe, kind):
    cls = getattr(diffusers, f"{kind}Scheduler")
    pipe.scheduler = cls(**tiny.NOISE) if hasattr(pipe, "unet") else cls(shift=3.0)
    return pipe


def shifted_by_call():
    """SD3 whose scheduler takes its shift when the timesteps are set."""
    pipe = sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return pipe


def put_another_shift(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=9.0)


def set_another_shift(pipe):
    pipe.scheduler.set_shift(9.0)


def angle(noise, signal):
    return math.atan2(noise, signal) / (math.pi / 2)


def of_ratios(pipe, sigmas):
    """Of noise against signal, as Euler has them; the last one is where it ends."""
    return [angle(sigma, 1) for sigma in sigmas[:-1]]


def of_timesteps(pipe, timesteps):
    kept = pipe.scheduler.alphas_cumprod.double()[timesteps].tolist()
    return [angle(math.sqrt(1 - each), math.sqrt(each)) for each in kept]


def of_flow(shift):
    """Of noise's share, shifted."""

    def angles(pipe, sigmas):
        moved = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
        return [angle(sigma, 1 - sigma) for sigma in moved]

    return angles


def flux_shift(tokens):
    """Of FLUX's pictures: 0.5 at 256 tokens, 1.15 at 4096, along a line between."""
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


RATIOS = [14.6, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 3.0, 1.0, 0.3, 0.0]
SHARES = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.9, 0.8, 0.6, 0.3, 0.1]
TIMESTEPS = [999, 950, 900, 800, 700, 600, 500, 400, 300, 200, 100, 10]
# As a pipeline's own.
EVEN = torch.linspace(1, 1 / STEPS, STEPS).tolist()


def repeated(values):
    """The same, with two of them twice: steps that do not move."""
    return [values[i - 1] if i in (2, 6) else value for i, value in enumerate(values)]


# By hand: pipeline, what is passed, the angles of what was passed, what is done behind `apply_tofu`.
PASSED = {
    "SD, sigmas": (euler, {"sigmas": RATIOS}, of_ratios, None),
    "SD, sigmas twice": (euler, {"sigmas": repeated(RATIOS)}, of_ratios, None),
    "SD, timesteps": (euler, {"timesteps": TIMESTEPS}, of_timesteps, None),
    "SD, timesteps twice": (euler, {"timesteps": repeated(TIMESTEPS)}, of_timesteps, None),
    "DPM++, timesteps": (multistep, {"timesteps": TIMESTEPS}, of_timesteps, None),
    "DPM++, timesteps twice": (multistep, {"timesteps": repeated(TIMESTEPS)}, of_timesteps, None),
    "SD3, sigmas": (sd3, {"sigmas": SHARES}, of_flow(3), None),
    "SD3, sigmas twice": (sd3, {"sigmas": repeated(SHARES)}, of_flow(3), None),
    "FLUX, sigmas": (tiny.tiny_flux, {"sigmas": SHARES}, of_flow(flux_shift(64)), None),
    "FLUX, sigmas twice": (
        tiny.tiny_flux,
        {"sigmas": repeated(SHARES)},
        of_flow(flux_shift(64)),
        None,
    ),
    "FLUX, a larger picture": (
        tiny.tiny_flux,
        {"sigmas": EVEN, "height": 512, "width": 512},
        of_flow(flux_shift(1024)),
        None,
    ),
    "SD3, a shift": (
        shifted_by_call,
        {"sigmas": EVEN, "mu": 2.5},
        of_flow(math.exp(2.5)),
        None,
    ),
    "SD3, a scheduler of another shift": (sd3, {"sigmas": EVEN}, of_flow(9), put_another_shift),
    "SD3, another shift": (sd3, {"sigmas": EVEN}, of_flow(9), set_another_shift),
}


@pytest.mark.parametrize("name", PASSED)
def test_steps_are_planned_at_the_noise_levels_that_were_passed(name):
    build, call, angles, late = PASSED[name]
    pipe = build()
    with apply_tofu(pipe, speedup=2.0) as handle:
        ((_, generation),) = handle._generations
        if late is not None:
            late(pipe)
        _, (steps,) = generate(pipe, **call)
        expected = angles(pipe, next(iter(call.values())))
        assert len(expected) == STEPS
        # Timesteps are whole numbers where levels are looked up.
        assert generation.sampling.angles == pytest.approx(expected, abs=3e-3)
        (plan,) = plans(handle)
    assert signs(steps) == plan and plan.count("#") == STEPS // 2
    # Of other levels it is another plan.
    other = sd3() if build is shifted_by_call else build()
    with apply_tofu(other, speedup=2.0) as handle:
        generate(other)
        ((_, generation),) = handle._generations
        assert generation.sampling.angles != pytest.approx(expected, abs=2e-2)
        assert plans(handle) != [plan]


TWO_CALLS = {
    "KDPM2": (sd, "KDPM2Discrete"),
    "KDPM2 ancestral": (sd, "KDPM2AncestralDiscrete"),
    "Heun": (sd, "HeunDiscrete"),
    "flow-matching Heun": (sd3, "FlowMatchHeunDiscrete"),
}


@pytest.mark.parametrize("name", TWO_CALLS)
def test_each_of_two_calls_a_step_is_computed_as_planned(name):
    """The last step has one."""
    build, kind = TWO_CALLS[name]
    pipe = with_scheduler(build(), kind)
    plain, (whole,) = generate(pipe)
    assert signs(whole) == "#" * (2 * STEPS - 1)
    with apply_tofu(pipe, speedup=2.0) as handle:
        made, (steps,) = generate(pipe)
        assert [signs(steps)] == plans(handle)
    assert signs(steps).count("#") == STEPS - 1
    assert made.isfinite().all() and not torch.equal(made, plain)


# ---- two denoisers ------------------------------------------------------------------------------------


def test_two_denoisers_have_a_history_each():
    pipe, returned = tiny.tiny_wan(two=True), []
    with apply_tofu(pipe, speedup=2.0) as handle:
        pipe.transformer_2.register_forward_hook(lambda _, args, out: returned.append(out[0]))
        _, (high, low) = generate(pipe, steps=20)
        turn = next(i for i, calls in enumerate(low) if calls)
        assert plans(handle) == [signs(high[:turn]), signs(low[turn:])]
        counts = handle.summary().steps
        assert plans(handle) == [each.plan for each in counts]
    assert not any(high[turn:]) and sum(each.computed for each in counts) == 10
    # Guidance is in two calls.
    assert [sum(map(len, calls)) for calls in (high, low)] == [2 * each.computed for each in counts]
    # Behind its first step the second one has no more to go by than that, and repeats it.
    assert low[turn + 1] == low[turn + 2] == [] and len(returned) == 2 * (20 - turn)
    for call, out in enumerate(returned[2:6]):
        assert torch.equal(out, returned[call % 2])


# ---- guidance -----------------------------------------------------------------------------------------


# A share of 20 steps; it is on behind the first one.
@pytest.mark.parametrize(
    ("first", "last", "layers_skipped"),
    [(0.01, 0.2, range(1, 4)), (0.3, 0.7, range(7, 14)), (0.0, 1.0, range(1, 20))],
    ids=["early", "in the middle", "throughout"],
)
def test_guidance_by_skipped_layers_is_skipped_with_its_step(first, last, layers_skipped):
    pipe, given = sd3(), {"skip_guidance_layers": [1], "steps": 20}
    given |= {"skip_layer_guidance_start": first, "skip_layer_guidance_stop": last}
    plain, (whole,) = generate(pipe, **given)
    # In a call of its own, without the unconditional row.
    assert whole == [[2, 1] if i in layers_skipped else [2] for i in range(20)]
    with apply_tofu(pipe, speedup=2.0) as handle:
        made, (steps,) = generate(pipe, **given)
        assert [signs(steps)] == plans(handle)
        assert sum(step.ran for step in handle.inspect()[0].steps) == sum(map(len, steps))
    assert made.isfinite().all() and not torch.equal(made, plain)
    # A forecast has no past of that call where it begins: alone it runs there.
    begins = layers_skipped[0]
    assert steps[begins][-1:] == [1]
    ran = [i for i, calls in enumerate(steps) if calls and i != begins]
    assert [steps[i] for i in ran] == [whole[i] for i in ran] and len(ran) <= 11


@pytest.mark.parametrize("before", [2, 5, 9])
def test_guidance_that_begins_on_the_way_is_computed_where_it_begins(before):
    """The batch has twice the rows from then on."""

    def begin(pipe, index, kwargs):
        if index == before:
            pipe._guidance_scale = 7.5
            words = kwargs["prompt_embeds"]
            kwargs["prompt_embeds"] = torch.cat([torch.zeros_like(words), words])
        return kwargs

    pipe = sd()
    with apply_tofu(pipe, speedup=2.0) as handle:
        generate(pipe, guidance_scale=1.0)
        (plan,) = plans(handle)
        made, (steps,) = generate(pipe, begin, ["prompt_embeds"], guidance_scale=1.0)
        assert plans(handle) == [signs(steps)]
    # All else is as it was.
    assert signs(steps) == plan[: before + 1] + "#" + plan[before + 2 :]
    rows = [rows for calls in steps for rows in calls]
    early = signs(steps[: before + 1]).count("#")
    assert rows == [1] * early + [2] * (len(rows) - early)
    assert made.isfinite().all()


# ---- a strength that leaves few steps ---------------------------------------------------------------


IMAGE_TO_IMAGE = {
    "StableDiffusionImg2Img": sd,
    "StableDiffusionXLImg2Img": sdxl,
    "StableDiffusion3Img2Img": sd3,
    "FluxImg2Img": tiny.tiny_flux,
}


@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_a_strength_that_leaves_few_steps_has_all_run_and_warns(name, left):
    pipe = as_pipeline(getattr(diffusers, f"{name}Pipeline"), IMAGE_TO_IMAGE[name]())
    given = {"image": PICTURE, "strength": left / 20, "steps": 20, "height": 128, "width": 128}
    if hasattr(pipe, "unet"):
        del given["height"], given["width"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, (whole,) = generate(pipe, **given)
        torch.manual_seed(0)
        with (
            apply_tofu(pipe, speedup=2.0) as handle,
            pytest.warns(UserWarning, match=rf"speedup 2 is not reached: {left} of {left} steps"),
        ):
            made, (steps,) = generate(pipe, **given)
            assert plans(handle) == ["#" * left]
    assert steps == whole and signs(steps) == "#" * left
    assert torch.equal(made, plain)
