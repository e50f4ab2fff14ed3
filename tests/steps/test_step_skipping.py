"""Skipping steps: at some the denoiser does not run, and its prediction comes from its past."""

import functools
import math
import warnings
from itertools import groupby, pairwise

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tofu_diffusers import (
    SKIP_RULES,
    StepSkipping,
    TokenReduction,
    apply_tofu,
    profile,
    remove_tofu,
)
from tofu_diffusers.steps.fitted import FittedForecasts
from tofu_diffusers.steps.forecast import Forecaster, corrector_weights, forecast_weights
from tofu_diffusers.steps.rules import Steps, computed_steps
from tofu_diffusers.steps.rules import skipped_steps as skipped_by_rule
from tofu_diffusers.steps.sampler import Sampling, step_sizes
from tofu_diffusers.steps.trajectory import CORRECTED_SHARE, Trajectory, reach_of

STEPS = 8
# Computes 5 of 8 steps.
SPEEDUP = 1.6
BUILDERS = [
    tiny.tiny_sd,
    tiny.tiny_sd3,
    tiny.tiny_flux,
    tiny.tiny_pixart,
    tiny.tiny_wan,
    tiny.tiny_ddpm,
]


# Of a smooth path whose second half bends more.
PATH = torch.stack([torch.linspace(1, 0, 9).double() ** k for k in (0, 1, 2, 5)], 1)
TRAJECTORY = Trajectory(torch.linspace(1, 0.1, 9).tolist(), PATH.tolist())


def skipped_steps(rule, total, speedup, first, last):
    """The steps that a rule skips in a generation of which nothing is known but the count."""
    free = range(first, last)
    levels = Sampling.evenly(total).angles
    computed = computed_steps(total, speedup, free)
    return skipped_by_rule(rule, Steps(free, computed, levels, None, TRAJECTORY))


class ByHand:
    """The denoisers of a pipeline with their forwards replaced: what skipping should do, written out.

    Counts the scheduler's steps itself, and keeps every prediction. Computed steps run whatever forwards
    the denoisers had.
    """

    def __init__(self, pipe, skipped, extrapolates, products=None):
        self.step, self.skipped, self.extrapolates = 0, skipped, extrapolates
        self.products = products
        self.ran = 0
        self.call = 0
        self.sums = None
        self.past = {}
        self.scheduler, self.models = pipe.scheduler, tiny.denoisers(pipe)
        self.before = [
            (each, name, each.__dict__.get(name))
            for each, name in [(pipe.scheduler, "step"), *((m, "forward") for m in self.models)]
        ]
        advance = pipe.scheduler.step

        def count(*args, **kwargs):
            self.step, self.call = self.step + 1, 0
            return advance(*args, **kwargs)

        pipe.scheduler.step = count
        for model in self.models:
            model.forward = self.forward_of(model.forward)

    def forward_of(self, inner):
        def forward(*args, **kwargs):
            past = self.past.setdefault(self.call, [])
            self.call += 1
            if self.step not in self.skipped:
                out = inner(*args, **kwargs)
                past.append((self.step, out[0]))
                self.ran += 1
                return out if self.sums is None else self.given(self.sums(past, self.step), kwargs)
            if self.sums is not None:
                return self.given(self.sums(past, self.step), kwargs)
            (before, older), (last, newer) = past[-2:]
            slope = (newer - older) / (last - before) if self.extrapolates else 0
            ahead = self.step - last
            if self.products is not None:
                steps = np.array([self.step])
                ahead = float(reach_of(self.products, before, last, steps)[0])
            return self.given(newer + ahead * slope, kwargs)

        return forward

    @staticmethod
    def given(prediction, kwargs):
        if kwargs.get("return_dict", True):
            return type("Output", (), {"sample": prediction})
        return (prediction,)

    def remove(self):
        for each, name, value in self.before:
            if value is None:
                delattr(each, name)
            else:
                setattr(each, name, value)


# Of eight steps with two of warm-up, by hand: (order, rule, computed steps, skipped steps).
BY_HAND = [(1, "late", 5, {2, 4, 6}), (0, "late", 5, {2, 4, 6}), (1, "even", 6, {2, 5})]


@pytest.mark.parametrize(("order", "rule", "computed", "skipped"), BY_HAND)
@pytest.mark.parametrize("build", BUILDERS)
def test_is_the_loop_written_out_by_hand(build, order, rule, computed, skipped):
    pipe = build()
    whole = tiny.generate(pipe, steps=STEPS)
    oracle = ByHand(pipe, skipped, order == 1)
    expected = tiny.generate(pipe, steps=STEPS)
    oracle.remove()
    assert oracle.ran % computed == 0
    options = {"warmup_steps": 2, "rule": rule, "order": order, "corrector": False}
    with apply_tofu(pipe, speedup=STEPS / computed, **options):
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
def test_forecasts_are_fitted_to_a_trajectory_that_is_given(build):
    pipe = build()
    # Two steps on, the path has turned back half the way.
    levels = [1 - i / 10 for i in range(11)]
    trajectory = Trajectory(levels, [(1.0, i % 4 / 4, (i + 1) % 4 / 8) for i in range(11)])
    options = {"warmup_steps": 2, "rule": "late", "corrector": False, "trajectory": trajectory}
    with apply_tofu(pipe, speedup=STEPS / 5, **options):
        made = tiny.generate(pipe, steps=STEPS)
        products = trajectory.at(Sampling.of(pipe.scheduler).angles)
    oracle = ByHand(pipe, {2, 4, 6}, True, products)
    expected = tiny.generate(pipe, steps=STEPS)
    oracle.remove()
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", BUILDERS)
def test_speedup_one_skips_nothing_and_is_the_original(build):
    pipe = build()
    whole = tiny.generate(pipe, steps=4)
    with apply_tofu(pipe, speedup=1) as handle, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(tiny.generate(pipe, steps=4), whole)
        for _, generation in handle._generations:
            assert not any(step.skipped for step in generation.steps())


def test_a_speedup_takes_what_is_open_from_the_profile_of_the_family():
    for family in ("unet", "sd3", "flux", "wan"):
        options = profile(family)["speedup"]["options"]
        open_ = StepSkipping(speedup=2.0)
        assert not open_.is_resolved and open_.resolved(options) == StepSkipping(2.0, **options)
        assert StepSkipping(order=0).resolved(options) == StepSkipping(order=0, **options)
        given = StepSkipping(warmup_steps=5, rule="even")
        assert given.is_resolved and given.resolved(options) == given
        assert StepSkipping(warmup_steps=5).resolved(options).rule == options["rule"]


def test_the_corrector_is_on_and_the_forecast_linear_unless_told():
    config = StepSkipping(speedup=1.5, warmup_steps=3)
    assert (config.corrector, config.order) == (True, 1)
    assert StepSkipping.from_json(config.to_json()) == config
    # There must be one to repeat.
    assert [StepSkipping(warmup_steps=n).steps_needed for n in (0, 1, 5)] == [1, 1, 5]


# ---- rules -----------------------------------------------------------------------------------------

TOTALS = st.integers(1, 120)
EDGES = st.integers(0, 12)


@pytest.mark.parametrize("rule", SKIP_RULES)
@given(TOTALS, st.floats(1, 50), EDGES, EDGES)
def test_rules_compute_as_many_steps_as_the_speedup_leaves(rule, total, speedup, warmup, cooldown):
    last = max(warmup, total - cooldown)
    skipped = skipped_steps(rule, total, speedup, warmup, last) if warmup <= total else set()
    assert skipped <= set(range(warmup, total - cooldown))
    # All outside, and one more that the forecasts are brought back at.
    must = min(total, warmup + cooldown + 1)
    wanted = {math.floor(total / speedup), math.floor(total / speedup + 1e-6)}
    assert total - len(skipped) in {max(must, computed) for computed in wanted}


@pytest.mark.parametrize("rule", SKIP_RULES)
@given(TOTALS, st.data())
def test_a_speedup_worked_out_from_a_count_computes_that_count(rule, total, data):
    warmup = data.draw(st.integers(0, total - 1))
    computed = data.draw(st.integers(warmup + 1, total))
    assert total - len(skipped_steps(rule, total, total / computed, warmup, total)) == computed


@pytest.mark.parametrize("rule", ["late", "even"])
@given(TOTALS, st.floats(1, 50), EDGES, EDGES)
def test_the_last_step_before_the_cooldown_is_computed(rule, total, speedup, warmup, cooldown):
    skipped = skipped_steps(rule, total, speedup, warmup, max(warmup, total - cooldown))
    assert total - cooldown - 1 not in skipped


@given(TOTALS, st.floats(1, 50), EDGES, EDGES)
def test_even_distances_differ_by_at_most_one(total, speedup, warmup, cooldown):
    """The warm-up's last step counted, and the first of the cool-down not."""
    last = max(warmup, total - cooldown)
    skipped = skipped_steps("even", total, speedup, warmup, last)
    computed = [warmup - 1, *(step for step in range(warmup, last) if step not in skipped)]
    distances = {after - before for before, after in pairwise(computed)}
    assert not distances or max(distances) - min(distances) <= 1


@given(st.integers(0, 6), st.integers(0, 60), st.floats(1, 50))
def test_late_skips_are_even_and_the_longer_ones_late(first, count, speedup):
    steps = range(first, first + count)
    skipped = skipped_steps("late", first + count, speedup, first, first + count)
    assert skipped <= set(steps)
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


@pytest.mark.parametrize("rule", SKIP_RULES)
def test_a_pipeline_computes_the_steps_that_the_rule_leaves(rule):
    pipe = tiny.small_sd()
    config = StepSkipping(
        speedup=2.0, warmup_steps=3, cooldown_steps=2, rule=rule, trajectory=TRAJECTORY
    )
    with apply_tofu(pipe, config) as handle:
        ran = []
        pipe.unet.conv_in.register_forward_pre_hook(
            lambda module, args: ran.append(handle.inspect()[0].index)
        )
        tiny.generate(pipe, steps=14)
        (count,) = handle.summary().steps
        assert (count.steps, count.computed) == (14, 7)
        assert [i for i, sign in enumerate(count.plan) if sign == "#"] == ran
        # Asking warns of nothing: the generation reached its speed-up.
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert handle.summary().speedup == pytest.approx(2.0)
    if rule != "trajectory":
        assert set(range(14)) - {*ran} == skipped_steps(rule, 14, 2.0, 3, 12)
    assert ran[:3] == [0, 1, 2] and ran[-2:] == [12, 13] and len(ran) == 7


def test_a_speedup_that_cannot_be_reached_is_warned_of_with_both_numbers():
    pipe = tiny.small_sd()
    with apply_tofu(pipe, speedup=3.0, warmup_steps=4, cooldown_steps=1) as handle:
        with pytest.warns(UserWarning, match=r"speedup 3 is not reached: 6 of 8 .* \(1\.33x\)"):
            tiny.generate(pipe, steps=STEPS)
        (count,) = handle.summary().steps
        assert (count.steps, count.computed) == (8, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            tiny.generate(pipe, steps=3 * 6)


# ---- what is told and refused -----------------------------------------------------------------------


def test_the_summary_counts_the_skipped_steps():
    pipe = tiny.small_sd()
    with apply_tofu(pipe, speedup=SPEEDUP, warmup_steps=2) as handle:
        nominal = handle.summary()
        assert nominal.nominal and nominal.flops_saved == pytest.approx(0.4)
        (count,) = nominal.steps
        assert (count.denoiser, count.steps, count.computed) == ("UNet2DConditionModel", 25, 15)
        tiny.generate(pipe, steps=STEPS)
        summary = handle.summary()
        assert summary.flops_saved == pytest.approx(3 / STEPS)
        assert summary.speedup == pytest.approx(SPEEDUP)
        (count,) = summary.steps
        assert (count.steps, count.computed, count.plan.count("#")) == (STEPS, 5, 5)
        assert summary.rows == () and handle.stats() == []
        assert "computed 5 of 8 steps" in str(summary) and "(1.60x)" in str(summary)
        latents = pipe.unet.config.in_channels * pipe.unet.config.sample_size**2
        # Of two rows the last prediction and its slope, and when it was made.
        assert summary.cache_bytes == 2 * (2 * latents * 4) + 4
        assert handle.computed() == {}


def test_more_memory_than_allowed_is_refused_with_both_numbers():
    pipe = tiny.small_sd()
    before = tiny.generate(pipe, steps=2)
    apply_tofu(pipe, speedup=2.0, memory_limit=1e-9)
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
    with apply_tofu(model, speedup=4 / 3, warmup_steps=2, rule="late") as handle:
        outs = []
        for step in range(4):
            handle.step(step, 4)
            outs.append(model(**inputs))
        skipped = [step.skipped for step in handle.inspect()[0].steps]
    # Of still inputs the prediction does not change.
    assert skipped == [False, False, True, False]
    assert {type(out) for out in outs} == {type(model(**inputs))}
    assert outs[2].sample.dtype == dtype and torch.equal(outs[2].sample, outs[1].sample)


@torch.no_grad()
def test_another_size_within_a_generation_runs_the_denoiser():
    model = tiny.denoisers(tiny.small_sd())[0]
    inputs = tiny.model_inputs(model)
    wide = {**inputs, "sample": torch.cat([inputs["sample"]] * 2, dim=-1)}
    with apply_tofu(model, speedup=4 / 3, warmup_steps=2, rule="late") as handle:
        for step in range(2):
            handle.step(step, 4)
            model(**inputs)
        handle.step(2, 4)
        assert handle._generations[0][1].runtime.call.skip
        out = model(**wide).sample
    assert torch.equal(out, model(**wide).sample)


# ---- the corrector -------------------------------------------------------------------------------------


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
    found = step_sizes(made)
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
    assert step_sizes(made) is None


def test_moves_of_flow_matching_are_alike_for_other_solvers():
    own = scheduler("FlowMatchEulerDiscrete", shift=3.0)
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    for kind in ("UniPCMultistep", "DPMSolverMultistep"):
        ratio = [
            a / b
            for a, b in zip(step_sizes(scheduler(kind, **options)), step_sizes(own), strict=True)
        ]
        # Their timesteps are spaced a little otherwise.
        assert max(ratio[:-2]) / min(ratio[:-2]) < 1.2


STEP_LISTS = st.lists(st.floats(0.1, 3.0), min_size=6, max_size=16)


@pytest.mark.parametrize("rule", SKIP_RULES)
@given(STEP_LISTS, st.integers(0, 2**31), st.floats(1, 5), st.sampled_from([1, 2]))
def test_a_rest_is_made_up_for_by_what_lies_between_the_steps_around_it(
    rule, sizes, seed, speedup, calls
):
    """Half of it: the sum of moves times predictions ends halfway between what was forecast at a rest and
    what lies between the steps around it; but for a last rest.
    """
    count = len(sizes)
    torch.manual_seed(seed)
    computed = torch.randn(calls, count, 2, 3, dtype=torch.float64)
    skipped = skipped_steps(rule, count, speedup, 2, count)
    weights = forecast_weights(count, [i for i in range(count) if i not in skipped], order=1)
    past = Forecaster()
    past.begin(weights, corrector_weights(sizes, weights))
    total, expected = torch.zeros(calls, 2, 3), torch.zeros(calls, 2, 3)
    for step, move in enumerate(sizes):
        for call in range(calls):
            at = torch.tensor(float(step))
            if step in skipped:
                given = past.forecast(str(call), at)[0]
                before = max(set(range(step)) - skipped)
                # Nothing computed later, or the last step alone, makes up for it.
                after = min(set(range(step, count)) - skipped, default=count)
                wanted = given
                if after < count - 1:
                    share = (step - before) / (after - before)
                    between = torch.lerp(computed[call, before], computed[call, after], share)
                    wanted = torch.lerp(given, between, CORRECTED_SHARE)
            else:
                wanted = computed[call, step]
                given = past.record(str(call), (wanted,), at)[0]
            total[call] += move * given
            expected[call] += move * wanted
    torch.testing.assert_close(total, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_sd3])
def test_it_differs_from_taylor_where_a_rest_is_followed_by_another_step(build):
    pipe = build()
    made = {}
    for name, corrector in (("taylor", False), ("corrected", True)):
        options = {"rule": "late", "order": 1, "corrector": corrector}
        with apply_tofu(pipe, speedup=SPEEDUP, warmup_steps=2, **options) as handle:
            made[name] = tiny.generate(pipe, steps=STEPS)
            assert torch.equal(tiny.generate(pipe, steps=STEPS), made[name])
            made[f"{name} bytes"] = handle.summary().cache_bytes
        with apply_tofu(pipe, speedup=8 / 7, warmup_steps=STEPS - 2, **options):
            made[f"{name} last"] = tiny.generate(pipe, steps=STEPS)
        with apply_tofu(pipe, speedup=1, **options):
            made[f"{name} none"] = tiny.generate(pipe, steps=STEPS)
    assert not torch.equal(made["taylor"], made["corrected"])
    assert made["taylor bytes"] == made["corrected bytes"]
    assert torch.equal(made["taylor last"], made["corrected last"])
    assert torch.equal(made["corrected none"], tiny.generate(pipe, steps=STEPS))
    assert not torch.equal(made["corrected last"], made["corrected none"])


def test_it_does_nothing_with_solvers_of_higher_order():
    """They would take a corrected prediction for a bend of the path."""
    pipe, made = tiny.tiny_wan(), []
    assert pipe.scheduler.config.solver_order == 2
    for corrector in (False, True):
        with apply_tofu(pipe, speedup=SPEEDUP, corrector=corrector, rule="late"):
            made.append(tiny.generate(pipe, steps=STEPS))
    assert torch.equal(*made)


def test_it_does_nothing_with_order_zero():
    pipe, made = tiny.small_sd(), []
    for corrector in (False, True):
        with apply_tofu(pipe, speedup=SPEEDUP, warmup_steps=2, order=0, corrector=corrector):
            made.append(tiny.generate(pipe, steps=STEPS))
    assert torch.equal(*made)


def test_it_does_nothing_where_steps_have_no_moves():
    pipe = tiny.tiny_ddpm()
    made = []
    for corrector in (False, True):
        with apply_tofu(pipe, speedup=SPEEDUP, warmup_steps=2, corrector=corrector):
            made.append(tiny.generate(pipe, steps=STEPS))
    assert torch.equal(*made)


def test_of_some_of_the_steps_the_moves_are_theirs():
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny.small_sd().components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with apply_tofu(pipe, speedup=SPEEDUP, corrector=True) as handle:
        tiny.generate(pipe, steps=16, image=image, strength=0.5)
        ((_, generation),) = handle._generations
        forecaster, sizes = generation.runtime.caches.forecaster, step_sizes(pipe.scheduler)[8:]
        weights = forecaster.weights.double().numpy()
        assert weights.shape == (8, 8, 2)
        wanted = torch.from_numpy(corrector_weights(sizes, weights)).float()
        torch.testing.assert_close(forecaster.corrections, wanted)


def test_forecasts_carry_on_the_last_change_as_far_as_the_trajectory_says():
    products = TRAJECTORY.at(TRAJECTORY.levels)
    table = forecast_weights(9, [0, 1, 4, 7], 1, products)
    assert np.allclose(-3 * table[4, 5:, 1], reach_of(products, 1, 4, np.arange(5, 9)))
    assert np.allclose(-table[1, 2:, 1], reach_of(products, 0, 1, np.arange(2, 9)))
    line = forecast_weights(9, [0, 1, 4, 7], 1)
    assert np.allclose(line[4, 5:, 1], [-1 / 3, -2 / 3, -1, -4 / 3])
    # Behind the first one, and where none was to be computed: repeated.
    assert not table[[0, 2]].any() and not table[..., 0].any()
    assert not forecast_weights(9, [0, 1, 4, 7], 0, products).any()


# ---- fitted to a pipeline --------------------------------------------------------------------------------


def fitted_by_hand(sampling, computed):
    """Fitted forecasts whose numbers are drawn."""
    levels = sampling.angles
    draw = torch.Generator().manual_seed(0)
    sizes = [len([each for each in computed if each <= step][-3:]) for step in range(len(levels))]
    rows = [[0.0], *((0.1 * torch.randn(n, generator=draw)).tolist() for n in sizes[1:])]
    return FittedForecasts(levels, computed, rows, sampling.kind)


@pytest.mark.parametrize("build", BUILDERS)
def test_fitted_forecasts_are_the_loop_written_out_by_hand(build):
    """Each step is the sum of the last three computed predictions, its own included."""
    pipe, computed = build(), (0, 1, 3, 4, 6)
    tiny.generate(pipe, steps=STEPS)
    fitted = fitted_by_hand(Sampling.of(pipe.scheduler), computed)
    config = StepSkipping(speedup=STEPS / 5, fitted=fitted)
    with apply_tofu(pipe, config) as handle:
        made = tiny.generate(pipe, steps=STEPS)
        assert handle.inspect()[0].steps[0].skipped is False
        plan = [step.skipped for step in handle.inspect()[0].steps]
        assert [i for i, skipped in enumerate(plan) if not skipped] == [*computed]
    oracle = ByHand(pipe, {2, 5, 7}, True)
    oracle.sums = functools.partial(sum_of, fitted)
    expected = tiny.generate(pipe, steps=STEPS)
    oracle.remove()
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def sum_of(fitted, past, step):
    """What the sampler is given, from the computed predictions with their steps."""
    known = [out for _, out in past][::-1][:3]
    row = fitted.weights[step]
    terms = [known[0], *(each - known[0] for each in known[1:])]
    return known[0] + sum(w * each for w, each in zip(row, terms, strict=False))


def test_fitted_forecasts_of_zero_repeat_and_correct_nothing():
    pipe = tiny.small_sd()
    tiny.generate(pipe, steps=STEPS)
    sampling = Sampling.of(pipe.scheduler)
    zeros = [[0.0] * n for n in (1, 2, 2, 3, 3, 3, 3, 3)]
    fitted = FittedForecasts(sampling.angles, (0, 1, 3, 5, 7), zeros, sampling.kind)
    with apply_tofu(pipe, StepSkipping(fitted=fitted)):
        made = tiny.generate(pipe, steps=STEPS)
    with apply_tofu(pipe, speedup=SPEEDUP, warmup_steps=2, rule="late", order=0):
        assert torch.equal(made, tiny.generate(pipe, steps=STEPS))


def test_generations_of_other_steps_go_by_the_rule_and_say_so():
    pipe = tiny.small_sd()
    tiny.generate(pipe, steps=STEPS)
    fitted = fitted_by_hand(Sampling.of(pipe.scheduler), (0, 1, 3, 4, 6))
    options = {"speedup": 1.6, "rule": "even", "warmup_steps": 1}
    with apply_tofu(pipe, StepSkipping(**options)):
        wanted = tiny.generate(pipe, steps=12)
    with apply_tofu(pipe, StepSkipping(**options, fitted=fitted)) as handle:
        with pytest.warns(UserWarning, match=r"fitted to 8 steps of DDIM.* 'even'"):
            made = tiny.generate(pipe, steps=12)
        assert "fitted" not in str(handle.summary())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            tiny.generate(pipe, steps=STEPS)
        assert "fitted to these 8 steps" in str(handle.summary())
    assert torch.equal(made, wanted)
    # At the same noise levels, but of a sampler that takes other steps between them.
    own = pipe.scheduler
    pipe.scheduler = diffusers.DDPMScheduler.from_config(own.config)
    with (
        apply_tofu(pipe, StepSkipping(**options, fitted=fitted)),
        pytest.warns(UserWarning, match="these are 8 of DDPMScheduler"),
    ):
        tiny.generate(pipe, steps=STEPS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"computed": (1, 2)}, "they ascend from 0"),
        ({"computed": (0, 4)}, "they ascend from 0"),
        ({"weights": [[0.0]] * 4}, r"\[1, 1, 1, 1\] weights for 4 steps; .* \[1, 1, 2, 2\]"),
        ({"weights": [[1], [0], [0, 0], [0, 0]]}, "its weight is 0"),
        ({"weights": [[0], [0], [0, math.nan], [0, 0]]}, "NaN"),
    ],
)
def test_what_are_no_fitted_forecasts_is_refused(changes, words):
    given = {"levels": (1.0, 0.7, 0.4, 0.1), "computed": (0, 2), "weights": None, "sampler": ""}
    given |= changes
    given["weights"] = given["weights"] or [[0], [0], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match=words):
        StepSkipping(fitted=given)


def test_fitted_forecasts_are_saved_and_read(tmp_path):
    fitted = fitted_by_hand(Sampling.evenly(4), (0, 2))
    config = StepSkipping(fitted=fitted)
    config.save(tmp_path)
    assert StepSkipping.load(tmp_path) == config
    for other in ({}, {"levels": (1, 0.5), "points": ()}):
        with pytest.raises(ValueError, match="fitted forecasts have levels, computed, weights and"):
            StepSkipping(fitted=other)
    with pytest.raises(TypeError, match="not list"):
        StepSkipping(fitted=[0, 1])


# ---- with fewer tokens in the steps that are computed --------------------------------------------------

TOKENS = {
    "tome": TokenReduction(method="tome", ratio=0.5),
    "profile": TokenReduction(ratio=0.5, **tiny.SHORT),
}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_sd3, tiny.tiny_flux, tiny.tiny_wan])
def test_both_workflows_reduce_tokens_in_the_computed_steps_only(build, tokens):
    pipe = build()
    whole = tiny.generate(pipe, steps=STEPS)
    skipping = StepSkipping(speedup=2.0, warmup_steps=2, rule="late")
    skipped = skipped_steps("late", STEPS, 2.0, 2, STEPS)
    calls = []  # of the denoiser's inside, by step
    with apply_tofu(pipe, TOKENS[tokens], skipping) as handle:
        ((model, generation),) = handle._generations
        hook = next(model.children()).register_forward_hook(
            lambda *_: calls.append(generation.index)
        )
        made = tiny.generate(pipe, steps=STEPS)
        hook.remove()
        history = generation.steps()
        summary, stats = handle.summary(), handle.stats()
        assert torch.equal(tiny.generate(pipe, steps=STEPS), made)
    assert len(skipped) == 4 and {*calls} == set(range(STEPS)) - skipped
    assert [step.skipped for step in history] == [step in skipped for step in range(STEPS)]
    each = len(calls) // 4
    (count,) = summary.steps
    assert (count.denoiser, count.steps, count.computed) == (type(model).__name__, STEPS, 4)
    # Of the four computed steps the profile computes all tokens in two.
    share = 0.5 if tokens == "tome" else 0.75
    for row, sums in zip(summary.rows, stats, strict=True):
        assert row.calls == sums["calls"] == 4 * each
        assert sums["tokens_in"] == row.calls * row.tokens_in
        assert sums["tokens_kept"] / sums["tokens_in"] == pytest.approx(share, abs=0.02)
    assert summary.rows
    text = str(summary)
    assert "TokenReduction: ratio 0.5" in text and "StepSkipping: speedup 2" in text
    assert summary.speedup > 2.0
    assert made.isfinite().all() and not torch.equal(made, whole)
    assert torch.equal(tiny.generate(pipe, steps=STEPS), whole)


@pytest.mark.parametrize("build", [tiny.tiny_sd, tiny.tiny_sd3, tiny.tiny_wan])
def test_both_are_the_loop_by_hand_around_a_reduced_denoiser(build):
    pipe = build()
    apply_tofu(pipe, TOKENS["tome"])
    skipped = skipped_steps("late", STEPS, 2.0, 2, STEPS)
    oracle = ByHand(pipe, skipped, True)
    expected = tiny.generate(pipe, steps=STEPS)
    oracle.remove()
    alone = tiny.generate(pipe, steps=STEPS)
    skipping = StepSkipping(speedup=2.0, warmup_steps=2, rule="late", corrector=False)
    with apply_tofu(pipe, TOKENS["tome"], skipping):
        made = tiny.generate(pipe, steps=STEPS)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made, alone, atol=1e-2)


def test_with_nothing_skipped_or_nothing_removed_both_are_the_other_alone():
    pipe = tiny.small_sd()
    with apply_tofu(pipe, TOKENS["tome"]):
        reduced = tiny.generate(pipe, steps=STEPS)
    with apply_tofu(pipe, TOKENS["tome"], StepSkipping(speedup=1)):
        assert torch.equal(tiny.generate(pipe, steps=STEPS), reduced)
    skipping = StepSkipping(speedup=SPEEDUP)
    with apply_tofu(pipe, skipping):
        fewer = tiny.generate(pipe, steps=STEPS)
    with apply_tofu(pipe, TokenReduction(method="tome", ratio=0.0), skipping):
        assert torch.equal(tiny.generate(pipe, steps=STEPS), fewer)
