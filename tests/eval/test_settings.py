"""Settings and baselines of eval: what they do to a pipeline, and that they leave no trace."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from eval.baselines.fewer_steps import scheduler_like
from eval.baselines.seacache import filtered, sea_cached
from eval.baselines.step_cache import StepCache, computed_steps
from eval.bench.pipeline import Bench, counted_flops, measure
from eval.denoiser import denoiser_of
from eval.generate.settings import Setting
from tests import tiny

TOFU = {"name": "a", "kind": "tofu", "options": {"ratio": 0.5}}
CACHE = {"name": "b", "kind": "step_cache", "options": {"total": 7, "computed": 5}}
STEPS = 7  # odd: what counts on from generation to generation begins the second one elsewhere
SETTINGS = [
    Setting("tofu", "tofu", {"ratio": 0.5}),
    Setting("skipping", "tofu", {"speedup": 1.5, "warmup_steps": 2, "rule": "late", "order": 0}),
    Setting("steps", "fewer_steps", {"steps": 5}),
    Setting("multistep", "fewer_steps", {"steps": 5, "scheduler": "multistep"}),
    Setting("repeat", "step_cache", {"total": 7, "computed": 5, "order": 0}),
    Setting("line", "step_cache", {"total": 7, "computed": 5}),
    Setting("pab", "pab", {"skip": 2}),
    Setting("stack", "stack", {"of": [TOFU, CACHE]}),
    Setting("tomesd", "tomesd", {"ratio": 0.5}),
    Setting("taylorseer", "taylorseer", {"interval": 2}),
    Setting("paper", "taylorseer", {"interval": 3, "first": 2, "order": 2, "modules": "paper"}),
    Setting("first-block", "first_block_cache", {"threshold": 0.5}),
    Setting("magcache", "magcache", {"threshold": 5.0, "steps": STEPS}),
    Setting("seacache", "seacache", {"threshold": 5.0}),
    Setting("dbcache", "dbcache", {"threshold": 5.0, "steps": STEPS}),
    Setting("forecast", "dbcache", {"threshold": 5.0, "steps": STEPS, "forecast": "taylorseer"}),
    Setting("deepcache", "deepcache", {"interval": 2}),
    Setting("deeper", "deepcache", {"interval": 3, "branch": 3}),
]
HOOKED = [each for each in SETTINGS if each.kind in ("taylorseer", "first_block_cache")]
CASES = [
    *((tiny.tiny_sd, setting) for setting in SETTINGS),
    *((tiny.tiny_sd3, setting) for setting in SETTINGS),
    *((tiny.tiny_flux, setting) for setting in HOOKED),
]
REFUSED = {
    ("tomesd", "tiny_sd3"): "serves pipelines with a UNet, not StableDiffusion3Pipeline",
    ("taylorseer", "tiny_sd"): "finds no modules in UNet2DConditionModel",
    ("first-block", "tiny_sd"): "serves transformers of two blocks or more, not UNet2D",
    ("first-block", "tiny_sd3"): "fails on SD3Transformer2DModel",
    ("magcache", "tiny_sd"): "serves pipelines with a transformer, not StableDiffusionPipeline",
    ("dbcache", "tiny_sd"): "for SD3's transformer, not StableDiffusionPipeline",
    ("forecast", "tiny_sd"): "for SD3's transformer, not StableDiffusionPipeline",
    ("deepcache", "tiny_sd3"): "serves pipelines with a UNet, not StableDiffusion3Pipeline",
    ("deeper", "tiny_sd3"): "serves pipelines with a UNet, not StableDiffusion3Pipeline",
}


def generate(pipe, changes, prompts=("a cat", "a dog")):
    call = {"num_inference_steps": STEPS, **changes}
    return tiny.generate(pipe, list(prompts), steps=call.pop("num_inference_steps"), **call)


def own_attributes(pipe):
    """Of every module in the denoiser, by name."""
    return {name: set(vars(module)) for name, module in denoiser_of(pipe).named_modules()}


@pytest.mark.parametrize(
    ("builder", "setting"), CASES, ids=[f"{build.__name__}-{each.name}" for build, each in CASES]
)
def test_changes_what_is_generated_and_leaves_no_trace(builder, setting):
    pipe = builder()
    before = generate(pipe, {})
    noise, scheduler = torch.get_rng_state(), pipe.scheduler
    attributes = own_attributes(pipe)
    refused = REFUSED.get((setting.name, builder.__name__))
    if setting.kind == "dbcache" and not refused:
        pytest.importorskip("cache_dit")
    if refused:
        with pytest.raises(ValueError, match=refused), setting.applied(pipe):
            pass
    else:
        calls = []
        with setting.applied(pipe) as applied:
            hook = denoiser_of(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
            changed = generate(pipe, applied.call)
            again = generate(pipe, applied.call)
            hook.remove()
        assert len(calls) == 2 * (5 if setting.kind == "fewer_steps" else STEPS)
        assert torch.isfinite(changed).all() and not torch.equal(changed, before)
        # tomesd goes on drawing where it was.
        assert torch.equal(again, changed) or setting.kind == "tomesd"
    assert pipe.scheduler is scheduler
    assert torch.equal(torch.get_rng_state(), noise)
    assert own_attributes(pipe) == attributes
    assert torch.equal(generate(pipe, {}), before)
    assert Setting.from_dict(setting.to_dict()) == setting


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("taylorseer", {"interval": 1}, "interval 1, first 3, order 1"),
        ("taylorseer", {"interval": 2, "first": 0}, "interval 2, first 0, order 1"),
        ("taylorseer", {"interval": 2, "order": -1}, "interval 2, first 3, order -1"),
        ("taylorseer", {"interval": 2, "modules": "some"}, "unknown modules 'some'"),
        ("first_block_cache", {"threshold": 0.0}, "threshold 0.0 reuses nothing"),
        ("magcache", {"threshold": 0.0, "steps": 7}, "threshold 0.0 reuses nothing"),
        ("seacache", {"threshold": 0.0}, "threshold 0.0, most 2: SeaCache needs"),
        ("dbcache", {"threshold": 0.0, "steps": 7}, "threshold 0.0, first 1, warmup 2: DBCache"),
        ("dbcache", {"threshold": 0.1, "steps": 7, "forecast": "x"}, "unknown forecast 'x'"),
        ("deepcache", {"interval": 1}, "interval 1, branch 0"),
        ("tomesd", {"ratio": 0.5, "foo": 1}, "got an unexpected keyword argument 'foo'"),
        ("deepcache", {"interval": 2, "branch": 6}, "branch from 0 to 5"),
    ],
)
def test_caches_that_would_change_nothing_are_refused(kind, options, message):
    pipe = tiny.tiny_sd()
    with pytest.raises(ValueError, match=message), Setting("x", kind, options).applied(pipe):
        pass


@pytest.mark.parametrize("setting", HOOKED, ids=lambda setting: setting.name)
def test_guidance_in_two_calls_has_a_state_for_each(setting):
    """Equal conditions in two calls are what one condition is; in a mixed state they would not be."""
    pipe = tiny.tiny_qwen()
    same = {"negative_prompt": ["a cat", "a dog"], "true_cfg_scale": 2.0}
    with setting.applied(pipe):
        once = generate(pipe, {"true_cfg_scale": 1.0})
        twice = generate(pipe, same)
    assert torch.allclose(twice, once, atol=1e-4)


@given(st.integers(1, 60), st.data())
def test_computed_steps_are_as_many_as_asked_and_spread(total, data):
    computed = data.draw(st.integers(1, total))
    first = data.draw(st.integers(1, computed))
    steps = computed_steps(total, computed, first)
    assert len(steps) == computed and set(range(first)) <= steps <= set(range(total))
    assert computed == first or total - 1 in steps
    later = sorted(steps)[first - 1 :]
    gaps = [b - a for a, b in pairwise(later)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_impossible_step_caching_is_refused():
    with pytest.raises(ValueError, match="computes 9 of 8 steps"):
        computed_steps(8, 9, 2)
    with pytest.raises(ValueError, match="order 2 is not"):
        StepCache(torch.nn.Linear(1, 1), lambda clock, latents: True, 2)


class Drifting(torch.nn.Module):
    """A denoiser whose prediction is linear in the step, another line for each call of a step."""

    def forward(self, sample, timestep, slope, return_dict=False):
        return (sample + slope * (10 - timestep),)


def test_step_caching_repeats_or_extrapolates_each_condition():
    steps = computed_steps(10, 6, 2)
    for order in (0, 1):
        cache = StepCache(Drifting(), lambda clock, latents: clock.step in steps, order)
        for generation in range(2):
            for step in range(10):
                for slope in (1.0, -3.0):
                    timestep = torch.tensor(10.0 - step)
                    out = cache.forward(torch.ones(2), timestep, slope, return_dict=False)[0]
                    computed = max(s for s in steps if s <= step)
                    expected = 1 + slope * (step if order else computed)
                    assert torch.equal(out, torch.full((2,), expected)), (generation, step)
        assert cache.ran == 2 * 2 * 6
    with pytest.raises(ValueError, match="return_dict=False"):
        for step in range(4):
            cache.forward(torch.ones(2), torch.tensor(10.0 - step), 1.0, return_dict=True)


def test_the_rule_of_seacache_counts_what_is_signal():
    latents = torch.randn(2, 4, 6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(filtered(latents, 0.5, 0.0), latents, atol=1e-5)
    # In noise the signal is expected where pictures are strong, at low frequencies.
    smooth, rough = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    rough[..., ::2] = -1
    kept = [filtered(each, 0.1, 0.9).abs().mean() for each in (smooth, rough)]
    assert kept[0] > 10 * kept[1]


def test_seacache_skips_more_the_higher_its_threshold():
    pipe = tiny.tiny_sd()
    ran = []
    for threshold in (1e-9, 0.5, 1e9):
        with sea_cached(pipe, threshold=threshold, most=0) as cache:
            generate(pipe, {})
        ran.append(cache.ran)
    # The first step and the last one are always computed.
    assert ran[0] == STEPS >= ran[1] >= ran[2] == 2
    with sea_cached(pipe, threshold=1e9, most=2) as cache:
        generate(pipe, {})
    assert cache.ran == 3  # 0, 3 and 6


def test_computing_every_step_is_the_original():
    pipe = tiny.tiny_sd()
    before = generate(pipe, {})
    with Setting("all", "step_cache", {"total": 8, "computed": 8}).applied(pipe) as applied:
        assert torch.equal(generate(pipe, applied.call), before)


@pytest.mark.parametrize("builder", [tiny.tiny_sd2, tiny.tiny_sd3])
def test_the_multistep_scheduler_ends_at_the_same_picture(builder):
    """With many steps both solve the same equation, if what is predicted is bounded (no noise)."""
    pipe = builder()
    before = tiny.generate(pipe, steps=80)
    pipe.scheduler = scheduler_like(pipe.scheduler, "DPMSolverMultistepScheduler")
    after = tiny.generate(pipe, steps=80)
    assert (after - before).abs().mean() < 0.12 * before.std()


def test_a_scheduler_is_changed_for_one_of_the_same_noise():
    heun = scheduler_like(tiny.tiny_sd().scheduler, "HeunDiscreteScheduler")
    assert type(heun).__name__ == "HeunDiscreteScheduler"
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = scheduler_like(own, "UniPCMultistepScheduler")
    assert flow.config.use_flow_sigmas and flow.config.prediction_type == "flow_prediction"
    again = scheduler_like(flow, "DPMSolverMultistepScheduler")
    assert again.config.use_flow_sigmas and flow.config.flow_shift == again.config.flow_shift == 3.0
    back = scheduler_like(again, "FlowMatchHeunDiscreteScheduler")
    assert type(back).__name__ == "FlowMatchHeunDiscreteScheduler" and back.config.shift == 3.0


def test_a_scheduler_takes_options_of_its_own():
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert scheduler_like(own, "FlowMatchEulerDiscreteScheduler,shift=5").config.shift == 5
    other = scheduler_like(own, "UniPCMultistepScheduler,flow_shift=1.5,solver_order=3").config
    assert (other.flow_shift, other.solver_order, other.use_flow_sigmas) == (1.5, 3, True)
    for words, why in [
        ("shift", "'shift' is no option"),
        ("shift=x", "'shift=x' is no option"),
        ("speed=2", "has no option 'speed'; choose one of .*shift"),
    ]:
        with pytest.raises(ValueError, match=why):
            scheduler_like(own, f"FlowMatchEulerDiscreteScheduler,{words}")


@pytest.mark.parametrize(
    ("builder", "name", "why"),
    [
        (tiny.tiny_sd, "UNet2DConditionModel", "no scheduler 'UNet2DConditionModel'"),
        (tiny.tiny_sd, "MagicScheduler", "no scheduler 'MagicScheduler'"),
        (tiny.tiny_sd, "FlowMatchEulerDiscreteScheduler", "is for flow matching, and .* is not"),
        (tiny.tiny_sd3, "PNDMScheduler", "is not for flow matching, and .* is;"),
    ],
)
def test_a_scheduler_for_other_noise_is_refused(builder, name, why):
    with pytest.raises(ValueError, match=why):
        scheduler_like(builder().scheduler, name)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("fewer_steps", {"step": 8}, "missing a required argument: 'steps'"),
        (
            "fewer_steps",
            {"steps": 8, "solver": "multistep"},
            "unexpected keyword argument 'solver'",
        ),
        ("step_cache", {"total": 8}, "missing a required argument: 'computed'"),
        ("stack", {}, "missing a required argument: 'of'"),
        ("unreduced", {"ratio": 0.5}, "it has none, not ratio"),
    ],
)
def test_options_of_another_kind_are_refused_at_once(kind, options, message):
    with pytest.raises(ValueError, match=f"options of 'x', kind '{kind}': .*{message}"):
        Setting("x", kind, options)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="unknown kind 'magic'"):
        Setting("x", "magic")
    for name in ("", "a/b", "a b", "..", "é"):
        with pytest.raises(ValueError, match="may hold letters"):
            Setting(name)


def test_a_stack_holds_one_setting_of_tofu():
    tokens = {"name": "t", "kind": "tofu", "options": {"ratio": 0.5}}
    inner = {"name": "i", "kind": "stack", "options": {"of": [{**tokens, "name": "s"}]}}
    with pytest.raises(ValueError, match=r'2 settings of tofu, s and t: .* kind "both"'):
        Setting("x", "stack", {"of": [inner, tokens]})


def bench(pipe=None):
    call = {"num_inference_steps": 4, "output_type": "latent"}
    return Bench(pipe or tiny.tiny_sd(), ["a cat"], 0, call)


def test_flops_are_those_of_the_denoiser_alone_and_tell_settings_apart():
    measured = bench()
    whole = measured.flops(Setting("unreduced"))
    assert whole == measured.flops(Setting("unreduced"))
    half = measured.flops(Setting("half", "fewer_steps", {"steps": 2}))
    assert half * 2 == whole
    cached = Setting("c", "step_cache", {"total": 4, "computed": 2, "first": 1})
    assert measured.flops(cached) == half
    reduced = measured.flops(Setting("t", "tofu", {"ratio": 0.5, "method": "tome"}))
    assert 0.5 * whole < reduced < 0.95 * whole
    assert counted_flops(measured.pipe, lambda: measured.pipe.text_encoder) == 0


def test_a_row_holds_what_was_timed_and_is_kept(tmp_path, monkeypatch):
    measured, out = bench(), tmp_path / "speed.json"
    settings = [Setting("unreduced"), Setting("t", "tofu", {"ratio": 0.5, "method": "tome"})]
    rows = measure(measured, settings, 2, out, {"device": "test"})
    assert [row["setting"]["name"] for row in rows] == ["t"]
    row = rows[0]
    assert row["calls"] == 4 and row["rounds"] == 2
    assert 0 < row["step_ms"]["low"] <= row["step_ms"]["value"] <= row["step_ms"]["high"]
    assert row["speed"]["value"] > 0 and row["flops_ratio"] > 1.05
    monkeypatch.setattr(Bench, "compare", None)  # it must not be measured again
    assert measure(measured, settings, 2, out, {"device": "test"}) == rows
    with pytest.raises(ValueError, match="measured otherwise"):
        measure(measured, settings, 2, out, {"device": "another"})


def test_compiled_pipelines_are_timed_on_copies(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    measured = bench()
    measured.compiled = True
    row = measured.compare(Setting("t", "tofu", {"ratio": 0.5, "method": "tome"}), 1)
    assert row["compiled"] and len(compiled) == 2
    assert measured.pipe.unet not in compiled
    assert not any("_tofu" in module.__dict__ for module in measured.pipe.unet.modules())
