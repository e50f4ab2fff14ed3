"""apply_tofu and remove_tofu: what they change, that they undo it exactly, what they refuse."""

import copy
from functools import partial

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel

from tests import tiny
from tofu_diffusers import METHODS, TokenReduction, apply_tofu, remove_tofu

MAKERS = {
    "sd": tiny.tiny_sd,
    "sd2": tiny.tiny_sd2,
    "sdxl": tiny.tiny_sdxl,
    "sd3": tiny.tiny_sd3,
    "sd35": partial(tiny.tiny_sd3, dual=True),
}
# The default profile where it is not whole: generations here are short.
EARLY = {"warmup_steps": 2, "keys_values": "fresh"}
SETTINGS = {
    "step": {"scope": "step", "warmup_steps": 2},
    "fresh": EARLY,
    "tome": {"method": "tome"},
    "tofu_span": {"method": "tofu", "scope": "span"},
    "attention": {"method": "pitome", "scope": "attention", "merge": "mlerp", "unmerge": "mlerp"},
    "cached": EARLY | {"keys_values": "cached"},
    "fresh_attention": EARLY | {"scope": "attention", "unmerge": "temporal"},
}


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def fingerprint(pipe):
    """Every instance attribute that apply_tofu could leave behind."""
    model = denoiser(pipe)
    modules = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    forwards = {
        name: getattr(module.forward, "__func__", module.forward)
        for name, module in model.named_modules()
    }
    return modules, forwards, sorted(pipe.scheduler.__dict__), sorted(pipe.__dict__)


@pytest.fixture(params=MAKERS)
def pipe(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("setting", SETTINGS)
def test_removal_is_exact(pipe, setting):
    baseline = tiny.generate(pipe, ["a cat", "a dog"], steps=4)
    before = fingerprint(pipe)
    apply_tofu(pipe, ratio=0.5, **SETTINGS[setting])
    reduced = tiny.generate(pipe, ["a cat", "a dog"], steps=4)
    assert torch.isfinite(reduced).all()
    assert not torch.equal(reduced, baseline)
    remove_tofu(pipe)
    # Schedulers keep timesteps of their last run; those are not ours.
    after = fingerprint(pipe)
    assert after[0] == before[0] and after[1] == before[1]
    assert not [name for name in after[2] if "tofu" in name or name in ("step", "set_timesteps")]
    assert after[3] == before[3] or set(after[3]) - set(before[3]) <= {"_interrupt"}
    assert torch.equal(tiny.generate(pipe, ["a cat", "a dog"], steps=4), baseline)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["attention", "block", "span"])
def test_ratio_zero_is_bit_equal(method, scope):
    for make in (tiny.tiny_sd, tiny.tiny_sd3):
        pipe = make()
        baseline = tiny.generate(pipe, steps=3)
        with apply_tofu(pipe, ratio=0, method=method, scope=scope):
            assert torch.equal(tiny.generate(pipe, steps=3), baseline)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_repeats(method):
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5, method=method):
        first = tiny.generate(pipe, ["a cat", "a dog"], steps=4)
        assert torch.equal(tiny.generate(pipe, ["a cat", "a dog"], steps=4), first)


@pytest.mark.parametrize("size", [(128, 128), (120, 200), (112, 208)])
@pytest.mark.parametrize("setting", ["step", "fresh", "tome", "cached"])
def test_square_odd_and_oblong_sizes(size, setting):
    height, width = size
    for make in (tiny.tiny_sd, tiny.tiny_sdxl, tiny.tiny_sd3):
        if make is tiny.tiny_sd3 and (height % 16 or width % 16):
            continue  # the unmodified pipeline refuses these
        pipe = make()
        with apply_tofu(pipe, ratio=0.4, **SETTINGS[setting]) as handle:
            latents = tiny.generate(pipe, steps=4, height=height, width=width)
            assert latents.shape[-2:] == (height // 8, width // 8)
            assert torch.isfinite(latents).all()
            assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())


@pytest.mark.parametrize("setting", ["step", "fresh", "tome", "cached", "attention"])
def test_images_of_a_batch_do_not_influence_each_other(setting):
    """A plan of one image is the same alone, in a batch, and in another row."""
    for make in (tiny.tiny_sd, tiny.tiny_sd3):
        pipe = make()
        with apply_tofu(pipe, ratio=0.5, **SETTINGS[setting]):
            batch = tiny.generate(pipe, ["a cat", "a dog"], steps=4, seed=0)
            alone = tiny.generate(pipe, ["a dog"], steps=4, seed=1)
        torch.testing.assert_close(batch[1:], alone, rtol=1e-3, atol=1e-3)


def test_inference_mode_and_plain_calls_in_any_order():
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5, keys_values="cached"):
        first = tiny.generate(pipe, steps=4)
        with torch.inference_mode():
            second = tiny.generate(pipe, steps=4)
        third = tiny.generate(pipe, steps=4)
    assert torch.equal(first, second) and torch.equal(first, third)


def test_without_guidance():
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5) as handle:
        tiny.generate(pipe, ["a cat", "a dog", "a hat"], steps=4, guidance_scale=1.0)
        assert handle.summary().flops_saved > 0


def test_the_global_generator_is_not_touched():
    pipe = tiny.tiny_sd()
    state = torch.get_rng_state()
    for method in METHODS:
        with apply_tofu(pipe, ratio=0.5, method=method):
            tiny.generate(pipe, steps=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_applying_twice_replaces():
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5, method="tome"):
        alone = tiny.generate(pipe)
    first = apply_tofu(pipe, ratio=0.25, method="pitome")
    second = apply_tofu(pipe, ratio=0.5, method="tome")
    assert first.removed and not second.removed
    assert torch.equal(tiny.generate(pipe), alone)
    with pytest.raises(RuntimeError, match="call apply_tofu again"):
        first.summary()
    with pytest.raises(RuntimeError, match="call apply_tofu again"):
        first.remove()


def test_the_context_manager_removes_also_after_an_error():
    pipe = tiny.tiny_sd()
    before = fingerprint(pipe)[0]
    with pytest.raises(KeyError), apply_tofu(pipe, ratio=0.5):
        raise KeyError("user's own")
    assert fingerprint(pipe)[0] == before


@pytest.mark.parametrize("setting", ["step", "fresh", "tome", "cached"])
def test_a_deepcopy_carries_its_own_tofu(setting):
    pipe = tiny.tiny_sd()
    baseline = tiny.generate(pipe, steps=4)
    apply_tofu(pipe, ratio=0.5, **SETTINGS[setting])
    reduced = tiny.generate(pipe, steps=4)
    twin = copy.deepcopy(pipe)
    remove_tofu(pipe)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.zero_()
    assert torch.equal(tiny.generate(twin, steps=4), reduced)
    remove_tofu(twin)
    assert torch.equal(tiny.generate(twin, steps=4), baseline)


def test_a_config_and_options_are_the_same_thing():
    pipe = tiny.tiny_sd()
    config = TokenReduction(method="pitome", ratio=0.4, merge="mlerp", unmerge="copy")
    with apply_tofu(pipe, config):
        by_config = tiny.generate(pipe)
    with apply_tofu(pipe, 0.4, method="pitome", merge="mlerp", unmerge="copy"):
        by_options = tiny.generate(pipe)
    with apply_tofu(pipe, config.replace(ratio=0.2), ratio=0.4) as handle:
        assert handle.configs[0] == config
        by_both = tiny.generate(pipe)
    assert torch.equal(by_config, by_options) and torch.equal(by_config, by_both)


def test_levels_min_tokens_and_blocks_select_sites():
    pipe = tiny.tiny_sd()

    def kept(**options):
        with apply_tofu(pipe, ratio=0.5, method="tome", **options) as handle:
            tiny.generate(pipe)
            rows = handle.stats()
        return [row["name"] for row in rows if row["tokens_kept"] < row["tokens_in"]]

    everything = kept()
    assert len(everything) == 7
    assert all("blocks.0" in name or "up_blocks.1" in name for name in kept(resolutions=(0,)))
    assert kept(min_tokens=100) == kept(resolutions=(0,))
    assert kept(first_blocks=1, last_blocks=2) == everything[1:-2]


# ---- bad input: refused early, the pipeline left as it was --------------------------------------

BAD_OPTIONS = [
    ({"method": "tomme"}, ValueError, r"unknown method 'tomme' \(did you mean 'tome'"),
    ({"merge": "man"}, ValueError, r"unknown merge 'man' .*mean"),
    ({"unmerge": "coppy"}, ValueError, "unknown unmerge 'coppy'"),
    ({"scope": "blok"}, ValueError, "unknown scope 'blok'"),
    ({"keys_values": "warm"}, ValueError, "unknown keys_values 'warm'"),
    ({"family": "fluxx"}, ValueError, "unknown family 'fluxx'"),
    ({"rato": 0.5}, ValueError, r"unknown option 'rato' \(did you mean 'ratio'"),
    ({"ratio": 1.0}, ValueError, r"ratio 1.0 is outside \[0, 1\)"),
    ({"ratio": -0.1}, ValueError, r"ratio -0.1 is outside"),
    ({"ratio": float("nan")}, ValueError, "ratio nan is outside"),
    ({"ratio": "half"}, TypeError, "ratio must be a number"),
    ({"ratio": True}, TypeError, "ratio must be a number"),
    ({"ratio": 0.8, "method": "tome"}, ValueError, r"ratio 0.8 exceeds 0.75"),
    ({"ratio": 0.6, "method": "pitome"}, ValueError, r"ratio 0.6 exceeds 0.5"),
    ({"method": "tome", "method_options": {"stryde": 2}}, ValueError, "stryde"),
    ({"method": "tome", "keys_values": "cached"}, ValueError, "needs merge 'prune'"),
    ({"method": "tome", "unmerge": "taylor"}, ValueError, "needs merge 'prune'"),
    (
        {"scope": "span", "keys_values": "fresh"},
        ValueError,
        "scope 'span' cannot have keys_values 'fresh'",
    ),
    ({"resolutions": (7,)}, ValueError, "has no site for tofu"),
    ({"first_blocks": 99}, ValueError, "has no site for tofu"),
    ({"memory_limit": 0}, ValueError, "memory_limit"),
    ({"schedule": "sine"}, ValueError, "unknown schedule kind 'sine'"),
    ({"warmup_steps": -1}, ValueError, "warmup_steps -1 is below 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_leave_the_pipeline_as_it_was(options, error, message):
    pipe = tiny.tiny_sd()
    before = fingerprint(pipe)
    with pytest.raises(error, match=message):
        apply_tofu(pipe, **options)
    assert fingerprint(pipe) == before


def test_a_bad_second_apply_keeps_the_first():
    pipe = tiny.tiny_sd()
    handle = apply_tofu(pipe, ratio=0.5, method="tome")
    with pytest.raises(ValueError, match="unknown method"):
        apply_tofu(pipe, ratio=0.5, method="nothing")
    assert not handle.removed


def test_a_ratio_the_grid_cannot_reach_is_refused_before_any_module_runs():
    pipe = tiny.tiny_sd()
    ran = []
    for module in pipe.unet.modules():
        if module is not pipe.unet:
            module.register_forward_pre_hook(lambda module, args: ran.append(module))
    # Level 1 of 2 x 17 latents is 1 x 9: destinations in every second column, 5 of 9 can go.
    with (
        apply_tofu(pipe, ratio=0.74, method="tome"),
        pytest.raises(ValueError, match=r"ratio 0.74 would remove 6 of 9 tokens on the 1x9 grid"),
    ):
        tiny.generate(pipe, height=16, width=136)
    assert not ran


def test_targets_that_cannot_be_changed():
    with pytest.raises(TypeError, match="takes a diffusers pipeline or a denoiser, not str"):
        apply_tofu("a pipeline", ratio=0.5)
    with pytest.raises(ValueError, match="no family for denoiser class Linear"):
        apply_tofu(torch.nn.Linear(2, 2), ratio=0.5)
    pipe = tiny.tiny_sd()
    pipe.unet = None
    with pytest.raises(ValueError, match="no denoiser of a known class; it has"):
        apply_tofu(pipe, ratio=0.5)
    bare = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    with pytest.raises(ValueError, match="has no site for tofu"):
        apply_tofu(bare, ratio=0.5, method="tome")
    apply_tofu(bare, ratio=0.5).remove()  # steps can be left out of any denoiser


def test_a_pipeline_changed_by_tomesd_is_refused():
    pipe = tiny.tiny_sd()
    tomesd.apply_patch(pipe, ratio=0.5)
    before = fingerprint(pipe)[0]
    with pytest.raises(ValueError, match=r"call tomesd.remove_patch"):
        apply_tofu(pipe, ratio=0.5)
    assert fingerprint(pipe)[0] == before
    tomesd.remove_patch(pipe)
    apply_tofu(pipe, ratio=0.5).remove()


def test_removing_nothing_is_fine():
    pipe = tiny.tiny_sd()
    before = fingerprint(pipe)
    remove_tofu(pipe)
    assert fingerprint(pipe) == before
