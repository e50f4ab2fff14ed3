"""Generations that do not come to their end, and what is left of them."""

import copy
import pickle

import pytest
import torch

from tests import tiny
from tests.inputs import unet_inputs
from tofu_diffusers import apply_tofu, remove_tofu

# With a past: generations here are short.
TOKENS = {"ratio": 0.5, "scope": "block", **tiny.SHORT}
SETTINGS = {
    "tokens": TOKENS,
    "cached": {**TOKENS, "keys_values": "cached"},
    "attention": {"ratio": 0.5, "method": "importance", "scope": "attention", "unmerge": "copy"},
    "step": {"speedup": 1.5},
}
BUILDS = {"unet": tiny.tiny_sd, "flux": tiny.tiny_flux, "ddpm": tiny.tiny_ddpm}


class Stop(Exception):
    pass


def stop_in(pipe, call):
    """Raise in the middle of this call of a denoiser that has several blocks."""
    (model,) = tiny.denoisers(pipe)
    (*_, part) = [module for module in model.modules() if hasattr(module, "to_q")]
    seen = []

    def hook(module, args, out):
        seen.append(module)
        if len(seen) == call:
            raise Stop

    return part.to_q.register_forward_hook(hook)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", BUILDS)
def test_a_call_that_fails_leaves_nothing_for_the_next(family, setting):
    pipe = BUILDS[family]()
    handle = apply_tofu(pipe, **SETTINGS[setting])
    whole = tiny.generate(pipe, steps=6)
    for call in (3, 4, 5):
        hook = stop_in(pipe, call)
        # Where steps are skipped the denoiser is called less often than that.
        if setting != "step" or call < 5:
            with pytest.raises(Stop):
                tiny.generate(pipe, steps=6)
        hook.remove()
        assert torch.equal(tiny.generate(pipe, steps=6), whole)
    assert handle.inspect()[0].cache_bytes == 0


@pytest.mark.parametrize("setting", ["step", "cached"])
def test_reset_ends_a_generation_that_was_broken_off(setting):
    pipe = tiny.small_sd()
    inputs = unet_inputs()
    alone = pipe.unet(**inputs)[0]
    handle = apply_tofu(pipe, **SETTINGS[setting])
    whole = tiny.generate(pipe, steps=8)

    def stop(pipe, index, timestep, kwargs):
        if index == 4:
            raise Stop
        return kwargs

    with pytest.raises(Stop):
        tiny.generate(pipe, steps=8, callback_on_step_end=stop)
    generation = handle._generations[0][1]
    assert generation.runtime.caches.nbytes > 0
    handle.reset()
    assert generation.runtime.caches.nbytes == 0
    with pytest.raises(RuntimeError, match="must know the denoising step"):
        pipe.unet(**inputs)
    assert torch.equal(tiny.generate(pipe, steps=8), whole)
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        handle.reset()
    assert torch.equal(pipe.unet(**inputs)[0], alone)


@torch.no_grad()
def test_a_skipped_step_answers_in_the_way_it_is_asked():
    unet, inputs = tiny.small_sd().unet, unet_inputs()
    with apply_tofu(unet, speedup=1.5, warmup_steps=2) as handle:
        found = []
        for index in range(6):
            handle.step(index, 6)
            out = unet(**inputs, return_dict=index >= 3)
            found.append(out.sample if index >= 3 else out[0])
        assert handle.summary().flops_saved > 0
        (count,) = handle.summary().steps
        assert (count.steps, count.computed) == (6, 4)
    assert all(each.shape == found[0].shape for each in found)


# Copies


def test_a_copied_scheduler_carries_neither_tofu_nor_the_model():
    pipe = tiny.small_sd()
    apply_tofu(pipe, **TOKENS)
    whole = tiny.generate(pipe, steps=4)
    for twin in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        assert len(pickle.dumps(twin)) < 50_000
        twin.set_timesteps(7)
        assert len(twin.timesteps) == 7 and len(pipe.scheduler.timesteps) == 4
        sample = torch.ones(1, 4, 8, 8)
        stepped = twin.step(sample, twin.timesteps[0], sample).prev_sample
        assert stepped.isfinite().all()
    assert torch.equal(tiny.generate(pipe, steps=4), whole)


def test_attributes_of_a_scheduler_can_be_kept_and_put_back():
    """As pipelines do that denoise several views by turns (Panorama)."""
    pipe = tiny.small_sd()
    handle = apply_tofu(pipe, **TOKENS)
    whole = tiny.generate(pipe, steps=4)
    kept = copy.deepcopy(pipe.scheduler.__dict__)
    pipe.scheduler.__dict__.update(kept)
    assert torch.equal(tiny.generate(pipe, steps=4), whole)
    assert len(handle.inspect()[0].steps) == 4
    remove_tofu(pipe)
    assert not {"_tofu_clock", "step", "set_timesteps"} & {*pipe.scheduler.__dict__}


def test_a_denoiser_with_tofu_is_not_pickled():
    unet = tiny.small_sd().unet
    apply_tofu(unet, **TOKENS)
    with pytest.raises(pickle.PicklingError, match="call remove_tofu first"):
        pickle.dumps(unet)
    remove_tofu(unet)
    pickle.loads(pickle.dumps(unet))


# Several pipelines, denoisers and handles


def test_an_old_handle_leaves_newer_tofu_alone():
    pipe = tiny.tiny_wan(two=True)
    both = apply_tofu(pipe, ratio=0.5, method="tome")
    one = apply_tofu(pipe.transformer, ratio=0.25, method="tome")
    assert not both.removed
    both.remove()
    assert not one.removed and "_tofu" in pipe.transformer.__dict__
    assert "_tofu" not in pipe.transformer_2.__dict__
    one.remove()
    assert "_tofu" not in pipe.transformer.__dict__


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapper_around_tofu_comes_off_first(compiled):
    pipe = tiny.small_sd()
    plain = tiny.generate(pipe)
    apply_tofu(pipe, ratio=0.5, method="tome")
    reduced = tiny.generate(pipe)
    ours = pipe.unet.forward

    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    pipe.unet.forward = torch.compile(ours, backend="eager") if compiled else wrapper
    for change in (remove_tofu, lambda pipe: apply_tofu(pipe, ratio=0.25)):
        with pytest.raises(
            RuntimeError, match=r"replaced after apply_tofu .* take that change off"
        ):
            change(pipe)
        assert torch.equal(tiny.generate(pipe), reduced)
    pipe.unet.forward = ours
    remove_tofu(pipe)
    assert torch.equal(tiny.generate(pipe), plain)
