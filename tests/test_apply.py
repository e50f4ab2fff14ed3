"""apply_tofu and remove_tofu: what they change, that they undo it exactly, what they refuse."""

import copy
import warnings
from functools import partial

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel

from tests import tiny
from tofu_diffusers import (
    METHODS,
    StepSkipping,
    TokenReduction,
    apply_tofu,
    profile,
    remove_tofu,
)

MAKERS = {
    "sd": tiny.tiny_sd,
    "sd2": tiny.tiny_sd2,
    "sdxl": tiny.tiny_sdxl,
    "sd3": tiny.tiny_sd3,
    "sd35": partial(tiny.tiny_sd3, dual=True),
}
# The token profile where it reduces: generations here are short.
EARLY = {"ratio": 0.5, **tiny.SHORT, "keys_values": "fresh"}
SETTINGS = {
    # One of four steps.
    "step": {"speedup": 4 / 3, "warmup_steps": 2},
    "fresh": EARLY,
    "tome": {"ratio": 0.5, "method": "tome"},
    "tofu_span": {"ratio": 0.5, "method": "tofu", "scope": "span"},
    "attention": {
        "ratio": 0.5,
        "method": "pitome",
        "scope": "attention",
        "merge": "mlerp",
        "unmerge": "mlerp",
    },
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
    apply_tofu(pipe, **SETTINGS[setting])
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
        options = SETTINGS[setting]
        options = options | {"ratio": 0.4} if "ratio" in options else options
        with apply_tofu(pipe, **options) as handle:
            latents = tiny.generate(pipe, steps=4, height=height, width=width)
            assert latents.shape[-2:] == (height // 8, width // 8)
            assert torch.isfinite(latents).all()
            assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
            # Not by the summary, which counts FLOPs and takes longer than all else.
            (generation,) = handle.inspect()
            skipped = sum(step.skipped for step in generation.steps)
            assert (len(generation.steps), skipped) == (4, setting == "step")
            assert bool(handle.stats()) == (setting != "step")


@pytest.mark.parametrize("setting", ["step", "fresh", "tome", "cached", "attention"])
def test_images_of_a_batch_do_not_influence_each_other(setting):
    """A plan of one image is the same alone, in a batch, and in another row."""
    for make in (tiny.tiny_sd, tiny.tiny_sd3):
        pipe = make()
        with apply_tofu(pipe, **SETTINGS[setting]):
            batch = tiny.generate(pipe, ["a cat", "a dog"], steps=4, seed=0)
            alone = tiny.generate(pipe, ["a dog"], steps=4, seed=1)
        torch.testing.assert_close(batch[1:], alone, rtol=1e-3, atol=1e-3)


def test_inference_mode_and_plain_calls_in_any_order():
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, **EARLY | {"keys_values": "cached"}):
        first = tiny.generate(pipe, steps=4)
        with torch.inference_mode():
            second = tiny.generate(pipe, steps=4)
        third = tiny.generate(pipe, steps=4)
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"speedup": 4 / 3}], ids=str)
def test_without_guidance(amount):
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, **amount) as handle:
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
    apply_tofu(pipe, **SETTINGS[setting])
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
    with apply_tofu(pipe, ratio=0.4, method="pitome", merge="mlerp", unmerge="copy"):
        by_options = tiny.generate(pipe)
    with apply_tofu(pipe, config.replace(ratio=0.2), ratio=0.4) as handle:
        assert handle.configs[0] == config
        by_both = tiny.generate(pipe)
    assert torch.equal(by_config, by_options) and torch.equal(by_config, by_both)


def test_a_ratio_is_the_token_profile_of_the_family():
    for family, make in (("unet", tiny.tiny_sd), ("sd3", tiny.tiny_sd3)):
        pipe, made = make(), []
        options = profile(family)["tokens"]["options"]
        whole = tiny.generate(pipe, steps=9)
        for configs, named in (
            ((), {"ratio": 0.5}),
            ((TokenReduction(ratio=0.5),), {}),
            ((TokenReduction(ratio=0.5, **options),), {}),
        ):
            with apply_tofu(pipe, *configs, **named) as handle:
                made.append(tiny.generate(pipe, steps=9))
                assert handle.configs == (TokenReduction(ratio=0.5, **options),)
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
        assert not torch.equal(made[0], whole)


def test_without_a_past_a_ratio_does_without_memory():
    """In a generation of few steps, and in one call of a bare denoiser; a long one is the profile's again."""
    pipe, made = tiny.tiny_sd(), {}
    whole = tiny.generate(pipe, steps=4)
    for name, options in (("asked", {}), ("tofu", {"method": "tofu"})):
        with apply_tofu(pipe, ratio=0.5, **options) as handle:
            made[name] = tiny.generate(pipe, steps=4)
            assert ("without memory" in str(handle.summary())) == (name == "asked")
            made[f"{name} long"] = tiny.generate(pipe, steps=9)
            assert "without memory" not in str(handle.summary())
            assert torch.equal(tiny.generate(pipe, steps=4), made[name])
            assert handle.configs[0].method == ("importance" if name == "asked" else "tofu")
    assert torch.equal(made["asked"], made["tofu"])
    with apply_tofu(pipe, **{"ratio": 0.5, **profile("unet")["tokens"]["options"]}):
        assert torch.equal(tiny.generate(pipe, steps=9), made["asked long"])
    assert not torch.equal(made["asked long"], made["tofu long"])
    unet, inputs, outs = pipe.unet, tiny.model_inputs(pipe.unet), []
    for options in ({}, {"method": "tofu"}):
        with apply_tofu(unet, ratio=0.5, **options), torch.no_grad():
            outs.append(unet(**inputs)[0])
    assert torch.equal(*outs)
    assert torch.equal(tiny.generate(pipe, steps=4), whole)


def test_without_a_past_a_plain_ratio_takes_what_its_grid_allows():
    """ToFu, which stands in, matches inside a frame: of one token a frame it can remove none."""
    pipe, size = tiny.tiny_wan(), {"height": 16, "width": 16, "num_frames": 17}
    said = "removes 0 of 5 tokens instead of 2 on the 5x1x1 grid"
    plain = tiny.generate(pipe, steps=4, **size)
    with apply_tofu(pipe, ratio=0.5) as handle:
        with pytest.warns(UserWarning, match=said) as caught:
            assert torch.equal(tiny.generate(pipe, steps=4, **size), plain)
        assert len(caught) == 1 and said in str(handle.summary())
        assert handle.summary().flops_saved == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.generate(pipe, steps=10, **size)
        assert said not in str(handle.summary()) and handle.summary().flops_saved > 0
    # Whoever names the method is told that it cannot.
    with (
        apply_tofu(pipe, ratio=0.5, method="tofu"),
        pytest.raises(ValueError, match="can remove at most 0 there"),
    ):
        tiny.generate(pipe, steps=4, **size)


def test_a_single_call_takes_what_its_grid_allows_and_says_so():
    transformer = tiny.tiny_wan().transformer
    inputs = tiny.model_inputs(transformer)
    inputs["hidden_states"] = inputs["hidden_states"][..., :2, :2]
    with torch.no_grad():
        plain = transformer(**inputs)[0]
        with apply_tofu(transformer, ratio=0.5), pytest.warns(UserWarning, match="no past"):
            assert torch.equal(transformer(**inputs)[0], plain)


def test_a_further_option_does_not_change_the_method():
    pipe = tiny.tiny_sd()
    for options in ({"seed": 1}, {"keys_values": "cached"}, {"warmup_steps": 3}, {"reuse": 2}):
        with apply_tofu(pipe, ratio=0.5) as handle:
            (plain,) = handle.configs
        with apply_tofu(pipe, ratio=0.5, **options) as handle:
            assert handle.configs == (plain.replace(**options),)


def test_a_speedup_skips_steps_by_the_profile_of_the_family():
    for family, make in (("unet", tiny.tiny_sd), ("sd3", tiny.tiny_sd3)):
        pipe, made = make(), []
        options = profile(family)["speedup"]["options"]
        for configs, named in (
            ((), {"speedup": 1.5}),
            ((StepSkipping(speedup=1.5),), {}),
            ((StepSkipping(speedup=1.5, **options),), {}),
        ):
            with apply_tofu(pipe, *configs, **named) as handle:
                made.append(tiny.generate(pipe, steps=9))
                assert handle.configs == (StepSkipping(speedup=1.5, **options),)
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_options_change_the_one_config_that_has_them():
    pipe = tiny.tiny_sd()
    both = TokenReduction(method="tome"), StepSkipping()
    with apply_tofu(pipe, *both, ratio=0.25, order=0, speedup=1.5) as handle:
        reduction, skipping = handle.configs
    assert reduction == TokenReduction(method="tome", ratio=0.25)
    assert (skipping.speedup, skipping.order) == (1.5, 0)


@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"speedup": 2.0}, {}], ids=str)
def test_the_order_of_two_configs_does_not_matter(amount):
    pipe = tiny.tiny_sd()
    first, second = TokenReduction(method="tome"), StepSkipping(rule="even")
    handle = apply_tofu(pipe, first, second, **amount)
    assert apply_tofu(pipe, second, first, **amount).configs == handle.configs
    remove_tofu(pipe)


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
    ({"ratio": 0.5, "family": "fluxx"}, ValueError, "unknown family 'fluxx'"),
    ({"speedup": 2.0, "family": "fluxx"}, ValueError, "unknown family 'fluxx'"),
    ({"rato": 0.5}, ValueError, r"unknown option 'rato' \(did you mean 'ratio'"),
    ({"speedup": 2.0, "waive": 1}, ValueError, r"unknown option 'waive'"),
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
    ({"ratio": 0.5, "memory_limit": 0}, ValueError, "memory_limit 0 GiB must be above 0"),
    ({"speedup": 2.0, "memory_limit": 0}, ValueError, "memory_limit 0 GiB must be above 0"),
    ({"schedule": "sine"}, ValueError, "unknown schedule kind 'sine'"),
    ({"ratio": 0.5, "warmup_steps": -1}, ValueError, "warmup_steps -1 is below 0"),
    ({"speedup": 2.0, "warmup_steps": -1}, ValueError, "warmup_steps -1 is below 0"),
    ({"speedup": 0.5}, ValueError, "speedup 0.5 is below 1"),
    ({"speedup": float("nan")}, ValueError, "speedup nan is below 1 or no number"),
    ({"speedup": float("inf")}, ValueError, "speedup inf is below 1 or no number"),
    ({"speedup": "twice"}, TypeError, "speedup must be a number"),
    ({"speedup": True}, TypeError, "speedup must be a number"),
    ({"speedup": 2.0, "rule": "erly"}, ValueError, "unknown rule 'erly'"),
    ({"speedup": 2.0, "order": 2}, ValueError, "order 2 is above 1; choose 0 .* or 1"),
    ({"speedup": 2.0, "corrector": None}, TypeError, "corrector must be True or False"),
    ({"ratio": 0.5, "corrector": "yes"}, TypeError, "corrector must be True or False"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_leave_the_pipeline_as_it_was(options, error, message):
    pipe = tiny.tiny_sd()
    before = fingerprint(pipe)
    with pytest.raises(error, match=message):
        apply_tofu(pipe, **options)
    assert fingerprint(pipe) == before


# (configs, options, error, everything that must be named)
AMBIGUOUS = [
    ((), {"ratio": 0.5, "speedup": 2.0}, ValueError,
     ("ratio 0.5", "speedup 2.0", "TokenReduction(ratio=0.5), StepSkipping(speedup=2.0)")),
    ((), {"method": "tome", "rule": "late"}, ValueError,
     ("method (TokenReduction)", "rule (StepSkipping)", "TokenReduction(...), StepSkipping(...)")),
    ((), {"ratio": 0.5, "rule": "late"}, ValueError,
     ("ratio (TokenReduction)", "rule (StepSkipping)", "TokenReduction(...), StepSkipping(...)")),
    ((), {"speedup": 2.0, "method": "tome"}, ValueError,
     ("'method'", "TokenReduction", "StepSkipping", "speedup")),
    ((), {}, ValueError, ("how much?", "ratio=0.5", "speedup=2.0")),
    ((), {"warmup_steps": 2}, ValueError,
     ("TokenReduction and StepSkipping both have warmup_steps", "how much?", "ratio=0.5", "speedup=2.0")),
    ((0.5,), {}, TypeError, ("TokenReduction and StepSkipping, not 0.5", "ratio=0.5", "speedup=2.0")),
    (({"ratio": 0.5},), {}, TypeError, ("not {'ratio': 0.5}", "ratio=0.5", "speedup=2.0")),
    ((TokenReduction(), TokenReduction()), {}, ValueError,
     ("two TokenReduction", "one of each type")),
    ((StepSkipping(), TokenReduction(), StepSkipping()), {}, ValueError,
     ("two StepSkipping", "one of each type")),
    ((TokenReduction(),), {"speedup": 2.0}, ValueError,
     ("'speedup'", "StepSkipping", "given are TokenReduction", "give StepSkipping(speedup=2.0) beside it")),
    ((StepSkipping(),), {"ratio": 0.5}, ValueError,
     ("'ratio'", "TokenReduction", "given are StepSkipping", "give TokenReduction(ratio=0.5) beside it")),
    (([TokenReduction(), StepSkipping()],), {}, TypeError, ("not a list", "one after another")),
    ((TokenReduction(), StepSkipping()), {"warmup_steps": 2}, ValueError,
     ("'warmup_steps'", "TokenReduction and StepSkipping", "say it inside")),
]  # fmt: skip


@pytest.mark.parametrize(("configs", "options", "error", "said"), AMBIGUOUS)
def test_what_can_mean_two_things_is_refused_with_both_and_the_way_out(
    configs, options, error, said
):
    pipe = tiny.tiny_sd()
    before = fingerprint(pipe)
    with pytest.raises(error) as found:
        apply_tofu(pipe, *configs, **options)
    message = str(found.value)
    assert [part for part in said if part not in message] == [], message
    assert fingerprint(pipe) == before


TOKEN_OPTIONS = [
    {"method": "tome"},
    {"method_options": {"source": "change"}},
    {"merge": "mean"},
    {"unmerge": "copy"},
    {"unmerge": "blend"},
    {"keys_values": "fresh"},
    {"scope": "block"},
    {"schedule": "linear"},
    {"share": "resolution"},
    {"resolutions": (0,)},
    {"min_tokens": 64},
    {"seed": 1},
]
STEP_OPTIONS = [{"rule": "even"}, {"order": 0}]


@pytest.mark.parametrize(
    ("amount", "options"),
    [
        *(({"speedup": 2.0}, options) for options in TOKEN_OPTIONS),
        *(({"ratio": 0.5}, options) for options in STEP_OPTIONS),
    ],
    ids=str,
)
def test_an_option_of_the_other_workflow_is_refused(amount, options):
    """By name, with both types and the way out: by number, and with a config of the type."""
    kinds = {"speedup": StepSkipping, "ratio": TokenReduction}
    pipe, kind = tiny.tiny_sd(), kinds[next(iter(amount))]
    before = tiny.generate(pipe, steps=2)
    (named,) = options
    with pytest.raises(ValueError, match=named) as by_number:
        apply_tofu(pipe, **amount, **options)
    with pytest.raises(ValueError, match=named) as by_config:
        apply_tofu(pipe, kind(**amount), **options)
    for found in (by_number, by_config):
        assert all(each.__name__ in str(found.value) for each in kinds.values())
    assert "TokenReduction(...), StepSkipping(" in str(by_number.value)
    with pytest.raises(TypeError, match=named):
        kind(**amount, **options)
    assert torch.equal(tiny.generate(pipe, steps=2), before)


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
    with pytest.raises(
        TypeError, match="takes a diffusers pipeline, a denoiser or an encoder, not str"
    ):
        apply_tofu("a pipeline", ratio=0.5)
    with pytest.raises(ValueError, match="Linear is no denoiser: its forward takes no timestep"):
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
    with pytest.raises(ValueError, match="has no site for tofu"):
        apply_tofu(bare, TokenReduction(), StepSkipping())
    apply_tofu(bare, speedup=2.0).remove()  # steps of any denoiser can be skipped


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


@pytest.mark.parametrize("take_off", [remove_tofu, lambda pipe: apply_tofu(pipe, speedup=3.0)])
def test_of_two_denoisers_none_is_given_back_where_one_cannot_be(take_off):
    pipe = tiny.tiny_wan(two=True)
    handle = apply_tofu(pipe, speedup=2.0)
    ours = pipe.transformer_2.forward
    pipe.transformer_2.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    for take in (take_off, lambda _: handle.remove()):
        with pytest.raises(RuntimeError, match="was replaced after apply_tofu"):
            take(pipe)
        assert not handle.removed
        assert all("_tofu" in vars(each) for each in (pipe.transformer, pipe.transformer_2))
    pipe.transformer_2.forward = ours
    handle.remove()
    assert not any("_tofu" in vars(each) for each in (pipe.transformer, pipe.transformer_2))
