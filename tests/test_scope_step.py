"""Scope "step": at some steps the denoiser does not run, and its prediction comes from its past."""

from itertools import groupby

import diffusers
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from tofu_diffusers import TokenReduction, apply_tofu, default_config, remove_tofu
from tofu_diffusers.steps.clock import moves
from tofu_diffusers.steps.forecast import Predictions
from tofu_diffusers.steps.schedule import left_out

STEPS = 8
BUILDERS = [
    tiny.tiny_sd,
    tiny.tiny_sd3,
    tiny.tiny_flux,
    tiny.tiny_pixart,
    tiny.tiny_wan,
    tiny.tiny_ddpm,
]


class ByHand:
    """The denoisers of a pipeline with their forwards replaced: what scope "step" should do, written out.

    Counts the scheduler's steps itself, and keeps every prediction.
    """

    def __init__(self, pipe, skipped, extrapolates):
        self.step, self.skipped, self.extrapolates = 0, skipped, extrapolates
        self.ran = 0
        self.call = 0
        self.past = {}
        self.scheduler, self.models = pipe.scheduler, tiny.denoisers(pipe)
        advance = type(pipe.scheduler).step

        def count(*args, **kwargs):
            self.step, self.call = self.step + 1, 0
            return advance(pipe.scheduler, *args, **kwargs)

        pipe.scheduler.step = count
        for model in self.models:
            model.forward = self.forward_of(model)

    def forward_of(self, model):
        def forward(*args, **kwargs):
            past = self.past.setdefault(self.call, [])
            self.call += 1
            if self.step not in self.skipped:
                out = type(model).forward(model, *args, **kwargs)
                past.append((self.step, out[0]))
                self.ran += 1
                return out
            (before, older), (last, newer) = past[-2:]
            slope = (newer - older) / (last - before) if self.extrapolates else 0
            prediction = newer + (self.step - last) * slope
            if kwargs.get("return_dict", True):
                return type("Output", (), {"sample": prediction})
            return (prediction,)

        return forward

    def remove(self):
        del self.scheduler.step
        for model in self.models:
            del model.forward


@pytest.mark.parametrize("unmerge", ["taylor", "temporal"])
@pytest.mark.parametrize("build", BUILDERS)
def test_is_the_loop_written_out_by_hand(build, unmerge):
    pipe = build()
    whole = tiny.generate(pipe, steps=STEPS)
    skipped = left_out(range(2, STEPS), 0.5)
    oracle = ByHand(pipe, skipped, unmerge == "taylor")
    expected = tiny.generate(pipe, steps=STEPS)
    oracle.remove()
    assert len(skipped) == 3 and oracle.ran % (STEPS - 3) == 0
    with apply_tofu(pipe, ratio=0.5, scope="step", unmerge=unmerge, warmup_steps=2):
        calls = []
        hooks = [
            next(model.children()).register_forward_hook(lambda *_: calls.append(1))
            for model in tiny.denoisers(pipe)
        ]
        first = tiny.generate(pipe, steps=STEPS)
        for hook in hooks:
            hook.remove()
        again = tiny.generate(pipe, steps=STEPS)
    assert len(calls) == oracle.ran
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(first, again) and not torch.equal(first, whole)
    assert torch.equal(tiny.generate(pipe, steps=STEPS), whole)


@pytest.mark.parametrize("build", BUILDERS)
def test_ratio_zero_is_the_original(build):
    pipe = build()
    whole = tiny.generate(pipe, steps=4)
    with apply_tofu(pipe, ratio=0.0, scope="step"):
        assert torch.equal(tiny.generate(pipe, steps=4), whole)


def test_is_the_default_and_other_options_ask_for_tokens():
    for family in ("unet", "sd3", "flux", "wan"):
        assert default_config(family, {"ratio": 0.5}).scope == "step"
        assert default_config(family, {"ratio": 0.5, "unmerge": "temporal"}).scope == "step"
        assert default_config(family, {"scope": "step", "warmup_steps": 5}).warmup_steps == 5
        for options in ({"scope": "block"}, {"keys_values": "cached"}, {"unmerge": "blend"}):
            config = default_config(family, options)
            assert config.scope == "block" and config.method == "importance"
            assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "tome"},
        {"method": "all", "scope": "block"},
        {"method_options": {"source": "change"}},
        {"merge": "mean"},
        {"unmerge": "copy"},
        {"unmerge": "blend"},
        {"keys_values": "fresh"},
        {"schedule": "linear"},
        {"share": "resolution"},
        {"resolutions": (0,)},
        {"min_tokens": 64},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_does_nothing_there_is_refused(options):
    named = next(iter(options))
    with pytest.raises(ValueError, match=named.removesuffix("_options")):
        TokenReduction(**{"scope": "step", **options})
    pipe = tiny.tiny_sd()
    before = tiny.generate(pipe, steps=2)
    with pytest.raises(ValueError, match=named.removesuffix("_options")):
        apply_tofu(pipe, TokenReduction(scope="step"), **options)
    assert torch.equal(tiny.generate(pipe, steps=2), before)


def test_a_configuration_survives_json():
    config = TokenReduction(scope="step", ratio=0.4, warmup_steps=3)
    assert (config.method, config.unmerge_at(0.0)) == ("all", "taylor")
    assert TokenReduction.from_json(config.to_json()) == config
    assert TokenReduction().method == "tofu"


@given(st.integers(0, 6), st.integers(0, 60), st.floats(0, 0.999))
def test_rests_are_even_and_the_longer_ones_late(first, count, ratio):
    steps = range(first, first + count)
    skipped = left_out(steps, ratio)
    assert skipped <= set(steps) and len(skipped) == max(0, min(round(ratio * count), count - 1))
    assert not count or steps[-1] not in skipped
    # Skipped steps before each computed one.
    rests, rest = [], 0
    for step in steps:
        rest += step in skipped
        if step not in skipped:
            rests.append(rest)
            rest = 0
    assert rests == sorted(rests) and (not rests or rests[-1] - rests[0] <= 1)
    assert [key for key, _ in groupby(rests)] == sorted(set(rests))


def test_the_summary_counts_the_steps_left_out():
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5, scope="step", warmup_steps=2) as handle:
        nominal = handle.summary()
        assert nominal.nominal and nominal.flops_saved == pytest.approx(0.45)
        tiny.generate(pipe, steps=STEPS)
        summary = handle.summary()
        assert summary.flops_saved == pytest.approx(3 / STEPS)
        (row,) = summary.rows
        assert (row.scope, row.calls) == ("step", STEPS)
        assert row.tokens_kept == row.tokens_in * (1 - 3 / STEPS)
        latents = pipe.unet.config.in_channels * pipe.unet.config.sample_size**2
        # Of each of two rows: the last prediction, its slope, and when it was made.
        assert summary.cache_bytes == 2 * (2 * latents * 4 + 4)
        (share,) = handle.computed()[0].unique().tolist()
        assert share == pytest.approx(1 - 3 / STEPS)


def test_more_memory_than_allowed_is_refused_with_both_numbers():
    pipe = tiny.tiny_sd()
    before = tiny.generate(pipe, steps=2)
    apply_tofu(pipe, ratio=0.5, scope="step", memory_limit=1e-9)
    with pytest.raises(MemoryError, match=r"caches need .* GiB, above memory_limit 1e-09 GiB"):
        tiny.generate(pipe, steps=STEPS)
    remove_tofu(pipe)
    assert torch.equal(tiny.generate(pipe, steps=2), before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bare_model_returns_what_it_always_returns(dtype):
    model = tiny.denoisers(tiny.tiny_sd3())[0].to(dtype)
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tiny.model_inputs(model).items()
    }
    with apply_tofu(model, ratio=0.5, scope="step") as handle:
        outs = []
        for step in range(4):
            handle.step(step, 4)
            outs.append(model(**inputs))
    # The third of four is left out; of still inputs the prediction does not change.
    assert {type(out) for out in outs} == {type(model(**inputs))}
    assert outs[2].sample.dtype == dtype and torch.equal(outs[2].sample, outs[1].sample)


@torch.no_grad()
def test_another_size_within_a_generation_runs_the_denoiser():
    model = tiny.denoisers(tiny.tiny_sd())[0]
    inputs = tiny.model_inputs(model)
    wide = {**inputs, "sample": torch.cat([inputs["sample"]] * 2, dim=-1)}
    with apply_tofu(model, ratio=0.5, scope="step") as handle:
        for step in range(2):
            handle.step(step, 4)
            model(**inputs)
        handle.step(2, 4)
        out = model(**wide).sample
    assert torch.equal(out, model(**wide).sample)


# ---- corrected -------------------------------------------------------------------------------------


def scheduler(kind, **options):
    made = getattr(diffusers, f"{kind}Scheduler")(**options)
    made.set_timesteps(25)
    return made


def response(made, index):
    """What a prediction of one at one step, of zero at all others, leaves in the end."""
    made.set_timesteps(25)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for i, t in enumerate(made.timesteps):
        x = made.step(torch.full_like(x, float(i == index)), t, x, return_dict=False)[0]
    return x.item()


TRAILING = {"timestep_spacing": "trailing"}
LINEAR = [
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": True, **TRAILING}, 1e-3),
    ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction", **TRAILING}, 0.1),
    ("EulerDiscrete", TRAILING, 1e-3),
    ("EulerDiscrete", {"prediction_type": "v_prediction", **TRAILING}, 0.1),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, 1e-3),
]


@pytest.mark.parametrize(("kind", "options", "within"), LINEAR)
def test_moves_are_what_a_step_adds_of_its_prediction(kind, options, within):
    made = scheduler(kind, **options)
    found = moves(made)
    assert len(found) == 25
    last = response(made, 23)
    for index in (2, 10, 16, 20):
        # As far as a step is what its first order says; 0.1 of angles, whose sines they are.
        assert response(made, index) / last == pytest.approx(found[index] / found[23], rel=within)


@pytest.mark.parametrize(
    "made",
    [
        scheduler("EulerAncestralDiscrete"),
        scheduler("DDPM"),
        scheduler("LCM", original_inference_steps=50),
        scheduler("HeunDiscrete"),
        scheduler("FlowMatchHeunDiscrete"),
        scheduler("PNDM"),
        scheduler("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
        scheduler("FlowMatchEulerDiscrete", stochastic_sampling=True),
        scheduler("EDMEuler"),
        scheduler("SASolver"),
        scheduler("DDIM", prediction_type="sample"),
    ],
    ids=lambda made: type(made).__name__,
)
def test_steps_of_another_kind_have_no_moves(made):
    assert moves(made) is None


def test_moves_of_flow_matching_are_alike_for_other_solvers():
    own = scheduler("FlowMatchEulerDiscrete", shift=3.0)
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    for kind in ("UniPCMultistep", "DPMSolverMultistep"):
        ratio = [a / b for a, b in zip(moves(scheduler(kind, **options)), moves(own), strict=True)]
        # Their timesteps are spaced a little otherwise.
        assert max(ratio[:-2]) / min(ratio[:-2]) < 1.2


STEP_LISTS = st.lists(st.floats(0.1, 3.0), min_size=6, max_size=16)


@given(STEP_LISTS, st.integers(0, 2**31), st.floats(0, 0.8), st.sampled_from([1, 2]))
def test_a_rest_is_made_up_for_by_what_lies_between_the_steps_around_it(sizes, seed, ratio, calls):
    """The sum of moves times predictions ends as if rests had been interpolated, but for a last rest."""
    count = len(sizes)
    torch.manual_seed(seed)
    computed = torch.randn(calls, count, 2, 3, dtype=torch.float64)
    skipped = left_out(range(2, count), ratio)
    past = Predictions("corrected")
    past.begin(sizes)
    total, expected = torch.zeros(calls, 2, 3), torch.zeros(calls, 2, 3)
    for step, move in enumerate(sizes):
        for call in range(calls):
            at = torch.tensor(float(step))
            if step in skipped:
                given = past.unmerged(str(call), at, return_dict=False)[0]
                before = max(set(range(step)) - skipped)
                after = min(set(range(step, count)) - skipped)
                share = (step - before) / (after - before)
                wanted = torch.lerp(computed[call, before], computed[call, after], share)
                if after == count - 1:
                    wanted = given
            else:
                wanted = computed[call, step]
                given = past.record(str(call), (wanted,), at)[0]
            total[call] += move * given
            expected[call] += move * wanted
    torch.testing.assert_close(total, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_sd3, tiny.tiny_wan])
def test_corrected_differs_from_taylor_where_a_rest_is_followed_by_another_step(build):
    pipe = build()
    made = {}
    for unmerge in ("taylor", "corrected"):
        with apply_tofu(pipe, ratio=0.5, scope="step", unmerge=unmerge, warmup_steps=2) as handle:
            made[unmerge] = tiny.generate(pipe, steps=STEPS)
            assert torch.equal(tiny.generate(pipe, steps=STEPS), made[unmerge])
            made[f"{unmerge} bytes"] = handle.summary().cache_bytes
        with apply_tofu(pipe, ratio=0.2, scope="step", unmerge=unmerge, warmup_steps=STEPS - 2):
            made[f"{unmerge} last"] = tiny.generate(pipe, steps=STEPS)
        with apply_tofu(pipe, ratio=0.0, scope="step", unmerge=unmerge):
            made[f"{unmerge} none"] = tiny.generate(pipe, steps=STEPS)
    assert not torch.equal(made["taylor"], made["corrected"])
    assert made["taylor bytes"] == made["corrected bytes"]
    assert torch.equal(made["taylor last"], made["corrected last"])
    assert torch.equal(made["corrected none"], tiny.generate(pipe, steps=STEPS))


def test_corrected_is_taylor_where_steps_have_no_moves():
    pipe = tiny.tiny_ddpm()
    made = []
    for unmerge in ("taylor", "corrected"):
        with apply_tofu(pipe, ratio=0.5, scope="step", unmerge=unmerge, warmup_steps=2):
            made.append(tiny.generate(pipe, steps=STEPS))
    assert torch.equal(*made)


def test_of_some_of_the_steps_the_moves_are_theirs():
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny.tiny_sd().components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with apply_tofu(pipe, ratio=0.5, scope="step", unmerge="taylor", corrector=True) as handle:
        tiny.generate(pipe, steps=16, image=image, strength=0.5)
        ((_, session),) = handle._sessions
        assert session.predictions.moves == moves(pipe.scheduler)[8:]
        assert len(session.predictions.weights) == 8


def test_corrected_alone_is_the_default_profile():
    config = TokenReduction(scope="step", unmerge="taylor", corrector=True)
    assert TokenReduction.from_json(config.to_json()) == config
    assert default_config("unet", {"unmerge": "taylor", "corrector": True}).scope == "step"
