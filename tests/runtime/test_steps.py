"""Steps, branches of guidance, images: schedulers of all kinds, bare models, guidance in one call or two."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    UniPCMultistepScheduler,
)

from tests import tiny
from tests.inputs import sd3_inputs, unet_inputs
from tofu_diffusers import apply_tofu, remove_tofu

SCHEDULERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_set_before_or_after_applying(scheduler, when):
    """Every evaluation of the denoiser is a step, in order, also when the scheduler calls it twice."""
    pipe = tiny.small_sd()
    if when == "before":
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    handle = apply_tofu(pipe, ratio=0.5, keys_values="fresh", **tiny.SHORT)
    if when == "after":
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(calls)))
    first = tiny.generate(pipe, ["a cat", "a dog"], steps=5)
    evaluations = len(calls)
    generation = handle._generations[0][1]
    assert sum(step.calls for step in generation.steps()) == evaluations
    reduced = [step.ratios[0] != "0.0" for step in generation.steps()]
    assert reduced == [False, False] + [True] * (evaluations - 2)
    assert torch.equal(tiny.generate(pipe, ["a cat", "a dog"], steps=5), first)
    used = pipe.scheduler
    remove_tofu(pipe)
    assert not [name for name in used.__dict__ if name in ("step", "set_timesteps", "_tofu_clock")]


def image_to_image(compiled=False):
    pipe = tiny.tiny_sd(channels=(32,))
    pipe = StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "feature_extractor": None}, requires_safety_checker=False
    )
    if compiled:
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    return pipe


def test_image_to_image_starts_at_its_own_noise_level():
    """Strength 0.5 of 8 steps runs the last four; the schedule sees their noise levels."""
    pipe = image_to_image()
    # Nothing above noise level 0.35, everything below 0.34.
    handle = apply_tofu(pipe, ratio=0.5, method="tome", schedule=[(0.65, 0.0), (0.66, 1.0)])
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    tiny.generate(pipe, steps=8, image=image, strength=0.5)
    generation = handle._generations[0][1]
    assert len(generation.sampling) == 4 and generation.sampling.noise[0] < 0.55
    assert [step.ratios[0] for step in generation.steps()] == ["0.0", "0.5", "0.5", "0.5"]


@pytest.mark.parametrize("compiled", [False, True])
def test_image_to_image_skips_steps_of_its_own_and_comes_to_an_end(compiled):
    pipe = image_to_image(compiled)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with apply_tofu(pipe, speedup=1.8, warmup_steps=2, rule="late") as handle:
        tiny.generate(pipe, steps=20, image=image, strength=0.45)
        generation = handle._generations[0][1]
        skipped = [step.skipped for step in generation.steps()]
        assert len(skipped) == len(generation.sampling) == 9 and not skipped[-1] and any(skipped)
        # Those of nine steps that are all there are.
        plain = tiny.tiny_sd(channels=(32,))
        with apply_tofu(plain, speedup=1.8, warmup_steps=2, rule="late") as other:
            tiny.generate(plain, steps=9)
            assert skipped == [step.skipped for step in other.inspect()[0].steps]
        assert skipped.count(False) == 5
        assert not generation.runtime.call.step_known and generation.runtime.caches.nbytes == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_few_steps_are_warned_of_where_most_are_skipped(compiled):
    pipe = image_to_image(compiled)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with (
        apply_tofu(pipe, ratio=0.5, warmup_steps=4),
        pytest.warns(UserWarning, match="4 steps, of which 4 compute all tokens"),
    ):
        tiny.generate(pipe, steps=20, image=image, strength=0.2)


def test_warmup_and_cooldown_steps_stay_whole():
    pipe = tiny.small_sd()
    handle = apply_tofu(pipe, ratio=0.5, method="tome", warmup_steps=1, cooldown_steps=2)
    tiny.generate(pipe, steps=6)
    ratios = [step.ratios[0] for step in handle.inspect()[0].steps]
    assert ratios == ["0.0", "0.5", "0.5", "0.5", "0.0", "0.0"]


@pytest.mark.parametrize("make", [tiny.tiny_sd, tiny.tiny_sd3])
def test_the_profiles_begin_and_end_with_whole_steps(make):
    pipe = make()
    handle = apply_tofu(pipe, ratio=0.5)
    tiny.generate(pipe, steps=12)
    ratios = [step.ratios[0] for step in handle.inspect()[0].steps]
    assert ratios == ["0.0"] * 3 + ["0.5"] * 5 + ["0.0"] * 4
    # The last steps are the profile's to say only where nobody does.
    handle = apply_tofu(pipe, ratio=0.5, cooldown_steps=0)
    tiny.generate(pipe, steps=12)
    assert [step.ratios[0] for step in handle.inspect()[0].steps] == ["0.0"] * 3 + ["0.5"] * 9


def test_few_steps_are_warned_of():
    pipe = tiny.small_sd()
    with (
        apply_tofu(pipe, ratio=0.5, warmup_steps=2, cooldown_steps=1),
        pytest.warns(UserWarning, match="4 steps, of which 3 compute all tokens"),
    ):
        tiny.generate(pipe, steps=4)
    # The token profile is left for what needs no past by itself.
    for options in ({"method": "tome"}, {}):
        with apply_tofu(pipe, ratio=0.5, **options), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            tiny.generate(pipe, steps=4)


# ---- bare models --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bare_model_stands_alone_or_is_told():
    unet, inputs = tiny.small_sd().unet, unet_inputs()
    expected = unet(**inputs)[0]
    apply_tofu(unet, ratio=0.5, method="tome")
    assert torch.equal(unet(**inputs)[0], unet(**inputs)[0])
    for options in (
        {"unmerge": "temporal"},
        {"keys_values": "cached"},
        {"method": "importance"},
        {"schedule": "linear"},
        {"warmup_steps": 1},
        {"reuse": 2},
    ):
        handle = apply_tofu(unet, **({"ratio": 0.5, "method": "random"} | options))
        with pytest.raises(RuntimeError, match=r"must know the denoising step.*handle.step"):
            unet(**inputs)
        for step in range(4):
            handle.step(step, 4)
            unet(**inputs)
    handle.step(0, 4)  # the next generation
    unet(**inputs)
    with pytest.warns(UserWarning, match="step 0 of 4 was told twice in a row.*count on"):
        handle.step(0, 4)
    with pytest.raises(ValueError, match="step 4 is not one of 4 steps"):
        handle.step(4, 4)
    remove_tofu(unet)
    assert torch.equal(unet(**inputs)[0], expected)


@pytest.mark.parametrize(
    "options",
    # Of a bare model noise levels and step sizes are not known: a rule that needs none, and no corrector.
    [
        {"speedup": 5 / 3, "rule": "late", "corrector": False},
        {"ratio": 0.5, **tiny.SHORT, "corrector": False},
        {"ratio": 0.5},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_bare_model_told_its_steps_is_the_pipeline(options):
    pipe = tiny.small_sd()
    rows = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args, kwargs)), with_kwargs=True
    )
    with apply_tofu(pipe, **options):
        outputs = []
        hook = pipe.unet.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        tiny.generate(pipe, ["a cat", "a dog"], steps=5)
        hook.remove()
    calls = list(rows)
    handle = apply_tofu(pipe.unet, **options)
    for step, (args, kwargs) in enumerate(calls):
        handle.step(step, 5, cfg_branches=2)
        assert torch.equal(pipe.unet(*args, **kwargs)[0], outputs[step])


@torch.no_grad()
def test_guidance_in_two_calls_uses_the_conditional_plan():
    """Conditional call first: the same plans and the same caches as in one batch of both."""
    for model, inputs in (
        (tiny.small_sd().unet, unet_inputs(batch=4)),
        (tiny.tiny_sd3().transformer, sd3_inputs(batch=4)),
    ):
        steps = 5

        def at(rows, step, inputs=inputs):
            cut = {}
            for name, value in inputs.items():
                cut[name] = value[rows] if value.ndim else value
            first = next(iter(cut))
            # A trajectory: the latents drift, differently in every row and place.
            draw = torch.Generator().manual_seed(7)
            drift = torch.randn(inputs[first].shape, generator=draw)[rows]
            cut[first] = cut[first] + 0.2 * step * drift
            return cut

        for options in (tiny.SHORT, tiny.SHORT | {"keys_values": "cached"}, {"method": "tome"}):
            handle = apply_tofu(model, ratio=0.5, **options)
            together, apart = [], []
            for step in range(steps):
                handle.step(step, steps, cfg_branches=2)
                together.append(model(**at(slice(0, 4), step))[0])
            for step in range(steps):
                handle.step(step, steps)
                conditional = model(**at(slice(2, 4), step))[0]
                unconditional = model(**at(slice(0, 2), step))[0]
                apart.append(torch.cat([unconditional, conditional]))
            for left, right in zip(together, apart, strict=True):
                torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5, "keys_values": "cached", **tiny.SHORT},
        {"ratio": 0.5, "keys_values": "fresh", "unmerge": "taylor", **tiny.SHORT},
        {"speedup": 1.5},
        {
            "ratio": 0.5,
            "method": "tome",
            "merge": "prune",
            "unmerge": "temporal",
            "warmup_steps": 2,
        },
    ],
    ids=str,
)
def test_guidance_that_ends_on_the_way(options):
    """Half of the batch goes at step 4; what was remembered of the whole batch does not fit the rest."""
    pipe = tiny.small_sd()
    handle = apply_tofu(pipe, **options)
    generation, plain, errors = handle._generations[0][1], tiny.small_sd().unet, []

    def compare(module, args, kwargs, out):
        assert generation.runtime.call.images == 2 or "speedup" in options
        expected = plain(*args, **kwargs)[0]
        errors.append(float((out[0] - expected).abs().max()))

    def end_guidance(pipe, step, timestep, given):
        if step == 3:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    pipe.unet.register_forward_hook(compare, with_kwargs=True)
    tiny.generate(
        pipe,
        ["a cat", "a dog"],
        steps=9,
        callback_on_step_end=end_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert generation.runtime.call.cfg_branches == "1"
    # Whole: the first two, and the first without guidance.
    assert errors[0] == errors[1] == errors[4] == 0.0
    assert max(errors[5:]) > 0.0


@torch.no_grad()
def test_unconditional_rows_follow_the_conditional_ones():
    unet, inputs = tiny.small_sd().unet, unet_inputs(batch=4)
    handle = apply_tofu(unet, ratio=0.5, method="tome")
    handle.step(0, 4, cfg_branches=2)
    unet(**inputs)
    plan_caches = handle._generations[0][1].runtime.setup.plan_caches
    plans = [
        p for plan_cache in plan_caches for p in plan_cache.plans.values() if p.kept.shape[0] == 4
    ]
    assert plans
    for plan in plans:
        assert torch.equal(plan.kept[:2], plan.kept[2:])
        assert torch.equal(plan.assign[:2], plan.assign[2:])
        assert not torch.equal(plan.assign[0], plan.assign[1])


@torch.no_grad()
def test_no_token_waits_longer_than_max_age():
    pipe = tiny.small_sd()
    handle = apply_tofu(pipe, ratio=0.7, max_age=4, resolutions=(0,))
    generation = handle._generations[0][1]
    waited = []

    def look(module, args):
        if generation.runtime.caches.statistics is not None:
            waited.append((generation.index, generation.runtime.caches.statistics.last[0].clone()))

    pipe.unet.conv_out.register_forward_pre_hook(look)
    tiny.generate(pipe, ["a cat", "a dog"], steps=16)
    # Seen before the step is noted: the oldest token was last computed at most max_age steps ago.
    ages = [float((index - last).max()) for index, last in waited[3:]]
    assert max(ages) <= 4
    assert max(ages) > 1


def test_plan_reuse_over_steps():
    pipe = tiny.small_sd()
    made = []
    for reuse in (1, 3):
        with apply_tofu(pipe, ratio=0.5, method="tome", reuse=reuse) as handle:
            plan_cache = handle._generations[0][1].runtime.setup.plan_caches[0]
            plans = set()
            pipe.unet.conv_out.register_forward_pre_hook(
                lambda module, args, plan_cache=plan_cache, plans=plans: plans.update(
                    plan.kept for plan in plan_cache.plans.values()
                )
            )
            tiny.generate(pipe, steps=6)
            made.append(len(plans) // 2)
    assert made == [6, 2]


@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"speedup": 2.0}], ids=str)
def test_a_loop_without_scheduler_steps_is_refused(amount):
    pipe = tiny.small_sd()
    inputs = unet_inputs()
    with apply_tofu(pipe, **amount), torch.no_grad():
        pipe.scheduler.set_timesteps(20)
        with pytest.raises(RuntimeError, match="8 times without a scheduler step"):
            for _ in range(20):
                pipe.unet(**inputs)


def test_importance_from_every_source():
    pipe = tiny.small_sd()
    for source in ("change", "cfg", "attention", "key_norm"):
        outputs = []
        for keys_values in ("dropped", "cached"):
            with apply_tofu(
                pipe,
                ratio=0.5,
                method="importance",
                method_options={"source": source},
                keys_values=keys_values,
            ):
                outputs.append(tiny.generate(pipe, ["a cat", "a dog"], steps=5))
        assert torch.isfinite(torch.cat(outputs)).all()


def test_guidance_importance_needs_guidance():
    pipe = tiny.small_sd()
    with (
        apply_tofu(pipe, ratio=0.5, method="importance", method_options={"source": "cfg"}),
        pytest.raises(ValueError, match="source 'cfg' needs classifier-free guidance"),
    ):
        tiny.generate(pipe, steps=5, guidance_scale=1.0)


def perturbed(pipe):
    return StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers="mid"
    )


def edits(pipe):
    """By text and picture: their guidance is apart."""
    conv = torch.nn.Conv2d(8, 32, 3, padding=1)
    conv.weight.data = torch.cat([pipe.unet.conv_in.weight.data] * 2, dim=1)
    conv.bias.data = pipe.unet.conv_in.bias.data
    pipe.unet.conv_in = conv
    pipe.unet.register_to_config(in_channels=8)
    return StableDiffusionInstructPix2PixPipeline(
        **{**pipe.components, "feature_extractor": None}, requires_safety_checker=False
    )


@pytest.mark.parametrize("options", [{"method": "tome"}, tiny.SHORT], ids=str)
@pytest.mark.parametrize("build", [perturbed, edits])
def test_three_conditions_in_a_batch(build, options):
    """Images stay apart, each with the plan of its own."""
    pipe = build(tiny.tiny_sd())
    if build is perturbed and "method" not in options:
        apply_tofu(pipe, ratio=0.5, **options)
        with pytest.raises(
            ValueError,
            match=r"perturbed-attention guidance .* use keys_values='dropped', or StepSkipping",
        ):
            tiny.generate(pipe, steps=4)
        return
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))

    def made(rows):
        images = {} if build is perturbed else {"image": pictures[rows]}
        prompts = ["a cat", "a dog"][rows]
        return tiny.generate(pipe, prompts, steps=5, latents=latents[rows], **images)

    whole = made(slice(0, 2))
    with apply_tofu(pipe, ratio=0.5, **options) as handle:
        both, second = made(slice(0, 2)), made(slice(1, 2))
        assert (
            handle.computed()[0].shape[0] == 1
            and handle._generations[0][1].runtime.call.branches_in_batch == 3
        )
    torch.testing.assert_close(both[1:], second, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both, whole, rtol=1e-2, atol=1e-2)


def test_a_base_model_before_a_refiner_runs_the_first_steps():
    pipe = tiny.tiny_sdxl()
    handle = apply_tofu(pipe, ratio=0.5, method="tome")
    tiny.generate(pipe, steps=8, denoising_end=0.5)
    generation = handle._generations[0][1]
    assert len(generation.steps()) == len(generation.sampling) == 4
    assert generation.sampling.noise[0] > 0.8 and generation.sampling.noise[-1] >= 0.49


@torch.no_grad()
@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"speedup": 1.5}], ids=str)
@pytest.mark.parametrize("failing", [1, 2, 6])
def test_a_call_that_failed_may_be_tried_again(options, failing):
    unet, inputs = tiny.small_sd().unet, unet_inputs()

    def loop(failing=None):
        outputs, steps = [], 14
        with apply_tofu(unet, **options) as handle:
            for step in range(steps):
                given = inputs | {"sample": inputs["sample"] * (1 + 0.1 * step)}
                handle.step(step, steps, cfg_branches=2)
                if step == failing and not handle._all[0].runtime.call.skip:
                    hook = unet.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        unet(**given)
                    hook.remove()
                    handle.step(step, steps, cfg_branches=2)
                outputs.append(unet(**given)[0])
            assert len(handle.inspect()[0].steps) == steps
        return torch.stack(outputs)

    assert torch.equal(loop(failing), loop())


@torch.no_grad()
def test_a_batch_that_does_not_fall_into_the_branches_is_refused():
    unet, inputs = tiny.small_sd().unet, unet_inputs()
    with apply_tofu(unet, ratio=0.5, method="tome") as handle:
        handle.step(0, 10, cfg_branches=3)
        with pytest.raises(ValueError, match=r"batch of 2 .* 3 branches .* cfg_branches=1"):
            unet(**inputs)
        handle.step(0, 10, cfg_branches=2)
        unet(**inputs)


@torch.no_grad()
def test_a_step_moved_in_inference_mode_is_told_on_outside_of_it():
    """As on a GPU, where the first call in inference mode moves it there."""
    unet, inputs = tiny.small_sd().unet, unet_inputs()
    with apply_tofu(unet, speedup=1.5) as handle:
        handle.step(0, 10)
        with torch.inference_mode():
            call = handle._all[0].runtime.call
            call.step = call.step.clone()
            unet(**inputs)
        handle.step(1, 10)
        assert call.step == 1 and not call.step.is_inference()


@torch.no_grad()
def test_positions_written_in_place_are_read_again():
    model = tiny.tiny_flux().transformer
    inputs = tiny.model_inputs(model)

    def places(height, width):
        rows, columns = torch.arange(height).float(), torch.arange(width).float()
        both = rows.repeat_interleave(width), columns.repeat(height)
        return torch.stack([torch.zeros(height * width), *both], -1)

    with apply_tofu(model, ratio=0.4, method="tome"):
        held = places(6, 10)
        model(**inputs | {"img_ids": held})
        held.copy_(places(4, 15))
        written = model(**inputs | {"img_ids": held})[0]
        assert torch.equal(written, model(**inputs | {"img_ids": places(4, 15)})[0])


def test_a_memory_limit_names_only_what_would_help():
    pipe = tiny.small_sd()
    options = {"ratio": 0.5, "memory_limit": 1e-6, "keys_values": "dropped", "unmerge": "copy"}
    with (
        apply_tofu(pipe, **options),
        pytest.raises(MemoryError, match=r"raise it, use corrector=False, or take"),
    ):
        tiny.generate(pipe, steps=12)
