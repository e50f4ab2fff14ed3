"""Whose generation it is: copies of a pipeline, other pipelines around a denoiser, loops, threads."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
)

from tests import tiny
from tofu_diffusers import apply_tofu, remove_tofu

# What needs no past, what needs one, and what skips steps.
SETTINGS = [{"ratio": 0.5, "method": "tome"}, {"ratio": 0.5, **tiny.SHORT}, {"speedup": 1.5}]
STEPS = 10
PICTURE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def request_of(pipe):
    """The same models with a scheduler of its own, as servers make one a request."""
    request = copy.copy(pipe)
    request.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return request


def around(kind, pipe, **parts):
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    given = {name: getattr(pipe, name) for name in names} | parts
    made = kind(**given, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def tokens_seen(unet):
    """The tokens that the first attention is given, call by call."""
    seen = []
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (args[0] if args else kwargs["hidden_states"]).shape[1]
        ),
        with_kwargs=True,
    )
    return seen


# ---- pipelines around one denoiser ----------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_a_copy_with_a_scheduler_of_its_own_is_reduced_by_it(options, before):
    pipe = tiny.small_sd()
    with apply_tofu(pipe, **options):
        expected = tiny.generate(pipe, steps=STEPS)
    handle = apply_tofu(pipe, **options)
    if before:
        tiny.generate(pipe, steps=7)
    request = request_of(pipe)
    assert torch.equal(tiny.generate(request, steps=STEPS), expected)
    assert len(handle.inspect()[0].steps) == STEPS
    assert torch.equal(tiny.generate(pipe, steps=STEPS), expected)
    remove_tofu(pipe)
    assert "_tofu_clock" not in request.scheduler.__dict__


@pytest.mark.parametrize("options", [{"ratio": 0.0, "method": "tome"}, *SETTINGS], ids=str)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("first_steps", [8, 20])
def test_a_second_pass_is_the_same_whichever_pipeline_tofu_was_given(
    options, scheduler, first_steps
):
    """Image-to-image of other length and strength, around the denoiser and a scheduler of its own or not."""
    pipe = tiny.small_sd()
    own = {} if scheduler is DDIMScheduler else {"scheduler": scheduler()}
    second = around(StableDiffusionImg2ImgPipeline, pipe, **own)
    passed = {"image": PICTURE, "strength": 0.6, "steps": 20}
    with apply_tofu(second, **options):
        expected = tiny.generate(second, **passed)
    with apply_tofu(pipe, **options) as handle:
        tiny.generate(pipe, steps=first_steps)
        assert torch.equal(tiny.generate(second, **passed), expected)
        assert handle.inspect()[0].cache_bytes == 0
    # A bare denoiser that a pipeline calls is served by it as well.
    with apply_tofu(pipe.unet, **options):
        assert torch.equal(tiny.generate(second, **passed), expected)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_guidance_is_that_of_the_pipeline_that_generates(options):
    pipe = tiny.small_sd()
    other = copy.copy(pipe)
    with apply_tofu(pipe, **options):
        expected = tiny.generate(pipe, ["a cat", "a dog"], steps=STEPS)
        tiny.generate(pipe, steps=STEPS, guidance_scale=1.0)
        assert torch.equal(tiny.generate(other, ["a cat", "a dog"], steps=STEPS), expected)


def test_another_pipeline_with_the_scheduler_of_this_one_is_left_alone():
    pipe, other = tiny.small_sd(), tiny.tiny_sd(seed=5)
    other.scheduler = pipe.scheduler
    plain = tiny.generate(other, steps=STEPS)
    handle = apply_tofu(pipe, ratio=0.5)
    tiny.generate(pipe, steps=9)
    assert torch.equal(tiny.generate(other, steps=STEPS), plain)
    assert len(handle.inspect()[0].steps) == 9


def test_a_pipeline_that_is_gone_leaves_others_served():
    pipe = tiny.small_sd()
    with apply_tofu(pipe, ratio=0.5):
        expected = tiny.generate(pipe, steps=STEPS)
    handle = apply_tofu(pipe, ratio=0.5)
    other = around(StableDiffusionPipeline, pipe)
    del pipe
    gc.collect()
    assert torch.equal(tiny.generate(other, steps=STEPS), expected)
    handle.remove()
    assert "_tofu_clock" not in other.scheduler.__dict__


# ---- loops and calls of one's own ---------------------------------------------------------------


@torch.no_grad()
def test_a_loop_of_ones_own_tells_guidance_by_its_latents():
    """After a generation without guidance, and from the middle of the scheduler's steps."""
    pipe = tiny.small_sd()
    unet, scheduler = pipe.unet, pipe.scheduler
    inputs = tiny.model_inputs(unet)
    name = next(iter(inputs))
    images = torch.randn(2, *inputs[name].shape[1:], generator=torch.Generator().manual_seed(1))
    words = torch.randn(4, 77, 32, generator=torch.Generator().manual_seed(2))
    words = words[:, : inputs["encoder_hidden_states"].shape[1]]
    handle = apply_tofu(pipe, ratio=0.5, method="tome")
    tiny.generate(pipe, steps=4, guidance_scale=1.0)
    for guided in (True, False):
        scheduler.set_timesteps(12)
        x = images
        for timestep in scheduler.timesteps[4:]:
            rows = torch.cat([x, x]) if guided else torch.cat([x, x + 1])
            out = unet(rows, timestep, words)[0]
            x = scheduler.step(out[:2], timestep, x).prev_sample
            if len(handle.inspect()[0].steps) == 5:
                assert handle.inspect()[0].images == (2 if guided else 4)
        assert len(handle.inspect()[0].steps) == len(handle.inspect()[0].noise) == 8


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True])
def test_a_bare_call_after_a_generation_is_as_before_it(broken):
    pipe = tiny.small_sd()
    inputs = tiny.model_inputs(pipe.unet)
    for options in ({"ratio": 0.5}, {"ratio": 0.5, "method": "tome"}):
        handle = apply_tofu(pipe, **options)
        before = pipe.unet(**inputs)[0]
        assert not torch.equal(before, tiny.small_sd().unet(**inputs)[0])

        def stop(pipe, step, timestep, given):
            if broken and step == 6:
                raise InterruptedError
            return given

        try:
            tiny.generate(pipe, steps=12, callback_on_step_end=stop)
        except InterruptedError:
            assert handle.inspect()[0].step_known
        assert torch.equal(pipe.unet(**inputs)[0], before)
        assert handle.inspect()[0].cache_bytes == 0
    for options in ({"speedup": 2.0}, {"ratio": 0.5, "keys_values": "cached"}):
        apply_tofu(pipe, **options)
        with pytest.raises(RuntimeError, match="must know the denoising step"):
            pipe.unet(**inputs)


# ---- another denoiser -----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_an_exchanged_denoiser_is_noticed_and_nothing_is_kept_alive(kept):
    pipe = tiny.small_sd()
    handle = apply_tofu(pipe, ratio=0.5)
    tiny.generate(pipe, steps=9)
    old, other = pipe.unet, tiny.tiny_sd(seed=5).unet
    gone = [weakref.ref(module) for module in old.modules()]
    pipe.unet = other
    if not kept:
        del handle, old
        gc.collect()
        assert not any(module() for module in gone)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exchanged after apply_tofu"):
            tiny.generate(pipe, steps=9)
    remove_tofu(pipe)
    assert not {"_tofu_clock", "step", "set_timesteps"} & {*pipe.scheduler.__dict__}
    assert not kept or "_tofu" not in old.__dict__
    plain = tiny.generate(pipe, steps=9)
    with apply_tofu(pipe, ratio=0.5):
        assert not torch.equal(tiny.generate(pipe, steps=9), plain)
    assert torch.equal(tiny.generate(pipe, steps=9), plain)


def test_schedulers_of_the_past_are_not_kept_alive():
    pipe, made = tiny.small_sd(), []
    apply_tofu(pipe, ratio=0.5, method="tome")
    for _ in range(4):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        made.append(weakref.ref(pipe.scheduler))
        tiny.generate(pipe, steps=3)
    gc.collect()
    assert [each() is not None for each in made] == [False, False, False, True]


# ---- at the same time -----------------------------------------------------------------------------


def interleaved(pipe, other, at, in_thread):
    """Generate with `pipe`, and behind step `at` of it with `other`, in a thread of its own or not."""
    result = {}

    def generate_another():
        result["other"] = tiny.generate(other, steps=STEPS)

    def begin_another(pipe, step, timestep, given):
        if step == at and in_thread:
            thread = threading.Thread(target=generate_another)
            thread.start()
            thread.join()
        elif step == at:
            generate_another()
        return given

    try:
        result["pipe"] = tiny.generate(pipe, steps=STEPS, callback_on_step_end=begin_another)
    except RuntimeError as error:
        result["error"] = str(error)
    return result


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_generation_broken_into_is_refused_and_the_other_one_is_right(options, in_thread):
    pipe = tiny.small_sd()
    handle = apply_tofu(pipe, **options)
    expected = tiny.generate(pipe, steps=STEPS)
    result = interleaved(pipe, request_of(pipe), at=4, in_thread=in_thread)
    assert torch.equal(result["other"], expected)
    assert "another generation began" in result["error"] and "pipe" not in result
    assert torch.equal(tiny.generate(pipe, steps=STEPS), expected)
    assert handle.inspect()[0].cache_bytes == 0


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_threads_around_one_denoiser_are_right_or_refused(options):
    pipe = tiny.small_sd()
    apply_tofu(pipe, **options)
    prompts = ["a cat", "a dog", "a hat"]
    expected = [tiny.generate(pipe, prompt, steps=STEPS) for prompt in prompts]
    found = {}

    def work(index):
        request = request_of(pipe)
        for attempt in range(2):
            try:
                found[index, attempt] = tiny.generate(request, prompts[index], steps=STEPS)
            except RuntimeError as error:
                found[index, attempt] = str(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for (index, _), result in found.items():
        if isinstance(result, str):
            assert "another generation began" in result
        else:
            assert torch.equal(result, expected[index])
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert torch.equal(tiny.generate(pipe, prompt, steps=STEPS), wanted)


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_sd3])
def test_denoisers_of_their_own_in_two_threads_are_as_alone(build):
    """Step by step at the same time: each waits for the other behind every one."""
    pipes = [build(), tiny.tiny_sd(seed=5)]
    for pipe in pipes:
        apply_tofu(pipe, speedup=2.0)
    prompts = ["a cat", "a dog"]
    expected = [
        tiny.generate(pipe, prompt, steps=STEPS)
        for pipe, prompt in zip(pipes, prompts, strict=True)
    ]
    meeting, met, found = threading.Barrier(2, timeout=60), [], {}

    def wait(pipe, step, timestep, given):
        met.append(meeting.wait())
        return given

    def work(index):
        try:
            found[index] = tiny.generate(
                pipes[index], prompts[index], steps=STEPS, callback_on_step_end=wait
            )
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(met) == 2 * STEPS
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# ---- ways to step that cannot be followed -----------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_views_by_turns_are_refused_by_the_name_of_their_pipeline(options):
    pipe = around(StableDiffusionPanoramaPipeline, tiny.tiny_sd(channels=(32,)))
    arguments = {"height": 512, "width": 576, "steps": 2}  # two views
    plain = tiny.generate(pipe, **arguments)
    with apply_tofu(pipe, **options), pytest.raises(RuntimeError, match="PanoramaPipeline stepped"):
        tiny.generate(pipe, **arguments)
    with apply_tofu(pipe, ratio=0.0, method="tome"):
        assert torch.equal(tiny.generate(pipe, **arguments), plain)


def test_an_inversion_with_another_scheduler_of_the_pipeline_follows_that():
    pipe = tiny.small_sd()
    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    pipe = around(StableDiffusionDiffEditPipeline, pipe, inverse_scheduler=inverse)
    seen = tokens_seen(pipe.unet)

    def invert():
        seen.clear()
        draw = torch.Generator().manual_seed(0)
        pipe.invert(
            prompt="a cat",
            image=PICTURE,
            num_inference_steps=12,
            generator=draw,
            decode_latents=False,
        )
        return set(seen)

    (whole,) = invert()
    for options in ({"ratio": 0.5}, {"ratio": 0.5, "method": "tome"}):
        with apply_tofu(pipe, **options) as handle:
            # All tokens only in the warm-up, and until guidance is seen.
            assert invert() == {whole, whole // 2}
            assert len(handle.inspect()[0].steps) == 9  # of 12: the noisiest are left out
    with apply_tofu(pipe, speedup=2.0, rule="late") as handle:
        invert()
        (steps,) = handle.summary().steps
        assert (steps.steps, steps.computed) == (9, 5)
    with apply_tofu(pipe, ratio=0.0, method="tome"):
        assert invert() == {whole}


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"speedup": 2.0}], ids=str)
def test_tofu_put_on_in_the_middle_of_a_generation_is_refused(options):
    def apply(pipe, step, timestep, given):
        if step == 2:
            apply_tofu(pipe, **options)
        return given

    pipe = tiny.small_sd()
    expected = tiny.generate(pipe, steps=STEPS)
    with pytest.raises(RuntimeError, match="while StableDiffusionPipeline generates"):
        tiny.generate(pipe, steps=STEPS, callback_on_step_end=apply)
    # From the next generation on it does what was asked for.
    assert not torch.equal(tiny.generate(pipe, steps=STEPS), expected)
    remove_tofu(pipe)
    assert torch.equal(tiny.generate(pipe, steps=STEPS), expected)
