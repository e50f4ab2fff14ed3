"""tune: what it finds is what it measured, wherever it was stopped, and the pipeline is as before."""

import copy
import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image

from tests import tiny
from tests.tiny_pipelines import PIPELINES
from tofu_diffusers import StepSkipping, TokenReduction, Tuned, apply_tofu, remove_tofu, tune
from tofu_diffusers.steps.sampler import Sampling
from tofu_diffusers.tuned import Measured
from tofu_diffusers.tuning import search
from tofu_diffusers.tuning import tune as module
from tofu_diffusers.tuning.fit import Fit
from tofu_diffusers.tuning.ledger import written_whole
from tofu_diffusers.tuning.references import (
    BROKEN_DB,
    EQUAL_DB,
    Example,
    Workload,
    latents_db,
    psnr_db,
)
from tofu_diffusers.tuning.trajectory import told_of_steps

PROMPTS = ["a cat", "a dog", "a car"]
CALL = {"num_inference_steps": 10, "height": 64, "width": 64}


def tuned_tiny(pipe, prompts=PROMPTS, **options):
    return tune(pipe, prompts, **{"speedup": 2.0, "progress": False, **CALL, **options})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A pipeline, what was found on it, and the folder where it was measured."""
    folder = tmp_path_factory.mktemp("search")
    pipe = tiny.small_sd()
    return pipe, tuned_tiny(pipe, folder=folder), folder


def test_the_pipeline_and_the_global_generator_are_left_as_they_were():
    pipe = tiny.small_sd()
    pipe.set_progress_bar_config(desc="mine")
    before = tiny.generate(pipe, steps=4)
    state = torch.random.get_rng_state()
    tuned_tiny(pipe, speedup=2.0, minutes=1e-9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(tiny.generate(pipe, steps=4), before)


def test_each_speedup_is_reached_and_compared_with_the_default_and_fewer_steps(found):
    _, tuned, _ = found
    assert [*tuned.choices] == [2.0]
    assert [row.kind for row in tuned.rows] == ["default", "tuned", "fewer steps"]
    for row in tuned.rows:
        assert row.flops >= row.speedup - 1e-6
        # One of three prompts is kept apart.
        assert len(row.held_out_db) == len(row.pixels_db) == 1
    text = str(tuned)
    assert "2x" in text and "5 steps" in text and "2 searched on, 1 kept apart" in text


def test_the_choice_is_the_best_of_all_that_were_tried(found):
    _, tuned, folder = found
    lines = (folder / "scores.jsonl").read_text().splitlines()
    by_setting: dict[str, dict[str, float]] = {}
    for line in map(json.loads, lines):
        name, _, place = line["key"].rpartition("/")
        if "held out" not in line["key"] and line["flops"] >= float(name.split("/")[0]) - 1e-6:
            by_setting.setdefault(name, {})[place] = line["latents_db"]
    for row in tuned.rows:
        if row.kind == "tuned":
            means = {
                name: sum(each.values()) / 2
                for name, each in by_setting.items()
                if name.startswith(f"{row.speedup:g}/") and len(each) == 2
            }
            assert sum(row.searched_db) / 2 == pytest.approx(max(means.values()))


def test_what_was_measured_is_what_the_setting_does(found):
    """Again by hand: the same latents, and the same steps."""
    pipe, tuned, _ = found
    row = next(row for row in tuned.rows if row.kind == "default" and row.speedup == 2.0)
    made = []
    for speedup in (None, 2.0):
        if speedup:
            handle = apply_tofu(pipe, speedup=speedup)
        generator = torch.Generator().manual_seed(2)  # of the third prompt
        made.append(pipe(PROMPTS[2], generator=generator, output_type="latent", **CALL).images)
    assert handle.summary().steps[0].plan == row.plan
    remove_tofu(pipe)
    assert latents_db(made[1], made[0]) == pytest.approx(row.held_out_db[0], abs=1e-3)


def test_it_is_saved_and_applied_from_its_folder(found, tmp_path):
    pipe, tuned, _ = found
    tuned.save(tmp_path)
    assert Tuned.load(tmp_path) == tuned
    for given in (tuned, tmp_path, str(tmp_path)):
        with apply_tofu(pipe, given, speedup=2.0) as handle:
            pipe("a fox", **CALL)
            row = next(
                row for row in tuned.rows if row.speedup == 2.0 and row.kind != "fewer steps"
            )
            assert handle.summary().speedup >= row.speedup - 1e-6
            assert [type(each) for each in handle.configs] == [type(e) for e in tuned.choices[2.0]]
    with apply_tofu(pipe, tuned, speedup=3.0) as handle:
        pipe("a fox", **CALL)
        assert handle.summary().speedup >= 3.0 - 1e-6


@pytest.mark.parametrize("kept", [0.0, 0.7, 1.0])
def test_it_goes_on_where_it_was_stopped(found, tmp_path, kept):
    """Nothing is generated twice, and the same is found."""
    pipe, tuned, folder = found
    lines = (folder / "scores.jsonl").read_text().splitlines(keepends=True)
    whole = int(kept * len(lines))
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    # A line that was being written is cut off.
    text = "".join(lines[:whole]) + (lines[whole][:9] if whole < len(lines) else "")
    (tmp_path / "scores.jsonl").write_text(text)
    if whole < len(lines):
        for path in (*tmp_path.glob("fitted-*"), tmp_path / "reference-1.safetensors"):
            path.unlink()
    again = tuned_tiny(pipe, folder=tmp_path)
    assert again.rows == tuned.rows and again.choices == tuned.choices
    assert (tmp_path / "scores.jsonl").read_text() == "".join(lines)


def test_a_folder_of_another_search_or_model_is_refused(found):
    pipe, _, folder = found
    with pytest.raises(ValueError, match=r"holds another search: its prompts searched on is"):
        tuned_tiny(pipe, folder=folder, seed=5)
    other = tiny.tiny_sd(seed=9)
    with pytest.raises(ValueError, match="search on another model"):
        tuned_tiny(other, folder=folder)


def test_the_default_stays_where_the_search_is_worse_on_prompts_kept_apart(found, monkeypatch):
    pipe, _, folder = found
    own = search.Search._compared

    def worse(self, speedup, best):
        rows = own(self, speedup, best)
        return [replace(row, held_out_db=(-99.0,)) if row.kind == "tuned" else row for row in rows]

    monkeypatch.setattr(search.Search, "_compared", worse)
    tuned = tuned_tiny(pipe, folder=folder)
    assert tuned.overfitted == (2.0,)
    assert tuned.choices[2.0] == (StepSkipping(speedup=2.0),)
    assert "2x: the search's best lost on them what it won (overfitted)" in str(tuned)


def test_other_denoisers_and_several_speedups_are_refused_in_words(found):
    _, tuned, _ = found
    with pytest.raises(
        ValueError, match=r"tuned on UNet2DConditionModel, and the pipeline has SD3"
    ):
        apply_tofu(tiny.tiny_sd3(), tuned, speedup=2.0)
    pipe = tiny.small_sd()
    both = replace(tuned, choices={1.5: tuned.choices[2.0], **tuned.choices})
    with pytest.raises(ValueError, match=r"tuned for speedup 1.5, 2; say which"):
        apply_tofu(pipe, both)
    with pytest.raises(ValueError, match="tuned settings stand alone"):
        apply_tofu(pipe, tuned, StepSkipping(speedup=2.0))
    with pytest.raises(FileNotFoundError, match=r"no tuned.json in nowhere"):
        apply_tofu(pipe, "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speedup": 1.0}, "speedup 1.0 is no number above 1"),
        ({"speedup": {2.0}}, "give one or a list of them"),
        ({"speedup": ()}, "no speedup"),
        ({"minutes": 0}, "more than 0"),
        ({"held_out": []}, "held_out is empty"),
        ({"behind_db": -1}, "behind_db is -1; give 0 or more"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tuned_tiny(tiny.small_sd(), **changes)


def test_a_speedup_out_of_reach_is_refused_with_what_was_reached_and_others_stay():
    said = r"speedup 3\.5 in 6 steps, the highest had 3\.00x"
    with pytest.raises(ValueError, match=said):
        tuned_tiny(tiny.small_sd(), "a cat", speedup=3.5, num_inference_steps=6)
    with pytest.warns(UserWarning, match=said):
        tuned = tuned_tiny(tiny.small_sd(), "a cat", speedup=(2.0, 3.5), num_inference_steps=6)
    assert [*tuned.choices] == [2.0] and {row.speedup for row in tuned.rows} == {2.0}
    assert "left out, speedup 3.5" in str(tuned)


def test_what_a_search_sets_itself_cannot_be_given():
    for name in ("generator", "output_type"):
        with pytest.raises(ValueError, match=f"{name} cannot be given: a search sets it"):
            tuned_tiny(tiny.small_sd(), **{name: None})


def test_tokens_that_cannot_be_reduced_are_left_out_and_said(monkeypatch):
    """As with fused projections, whose keys and values are not projected by modules of their own."""
    pipe = tiny.tiny_sd3()
    pipe.transformer.fuse_qkv_projections()
    call = tiny.CALLS[type(pipe)]
    tuned = tuned_tiny(pipe, **call)
    reasons = [why for name, why in tuned.about.items() if name.startswith("left out")]
    assert len(reasons) == 2 and all("fused" in why for why in reasons)


def test_what_other_processes_left_out_is_said_too_and_bars_end_full(monkeypatch, capsys):
    def gathered(mine):
        return [mine] if mine else [mine, {"theirs": "a reason"}]

    monkeypatch.setattr(search, "gathered", gathered)
    tuned = tuned_tiny(tiny.small_sd(), minutes=1e-9, progress=True)
    assert tuned.about["left out, theirs"] == "a reason"
    told = capsys.readouterr().err
    assert all(f"{name}: 100%" in told for name in ("references", "search", "fit", "held out"))


def test_no_prompts_too_many_no_pipeline_and_tofu_are_refused():
    pipe = tiny.small_sd()
    with pytest.raises(ValueError, match="0 prompts to search on"):
        tune(pipe, [])
    with pytest.raises(ValueError, match="17 prompts to search on; give 1 to 16"):
        tune(pipe, ["a cat"] * 17)
    # As lists they would be keys, and rows.
    for given in (None, {"prompt": "a cat"}, torch.zeros(2, 3)):
        with pytest.raises(TypeError, match=r"a list, or one text, not .*; give \[prompt\]"):
            tune(pipe, given)
    with pytest.raises(TypeError, match="no pipeline with a scheduler"):
        tune(pipe.unet, "a cat")
    with apply_tofu(pipe, ratio=0.5), pytest.raises(ValueError, match="has tofu"):
        tune(pipe, "a cat")


def test_it_calls_what_it_is_given_and_takes_one_prompt_in_few_steps():
    """Fewer than ten steps have no trajectory; the rules are still compared."""
    pipe = tiny.small_sd()
    calls = []

    def generate(prompt, **options):
        calls.append(options["output_type"])
        return pipe(prompt, guidance_scale=3.0, **options)

    tuned = tune(
        pipe, "a cat", speedup=2.0, generate=generate, num_inference_steps=6, height=64, width=64,
        progress=False,
    )  # fmt: skip
    assert {*calls} == {"latent", "pt"}
    assert tuned.about["prompts"] == "1 searched on, 1 kept apart"
    assert all("trajectory" not in row.name for row in tuned.rows)


@pytest.mark.parametrize("make", [tiny.tiny_wan, tiny.tiny_ltx2])
def test_video_in_several_parts_is_judged_by_its_latents(make):
    """That with sound, too, which is stepped by a copy of the scheduler."""
    pipe = make()
    call = {**tiny.CALLS[type(pipe)], "num_inference_steps": 10}
    tuned = tune(pipe, PROMPTS[:2], speedup=2.0, minutes=1e-9, progress=False, **call)
    assert all(row.held_out_db and row.pixels_db for row in tuned.rows)


def test_a_batch_of_texts_of_their_own_lengths():
    """Lumina 2, whose images begin where the row's text ends."""
    pipe = PIPELINES["Lumina2Transformer2DModel"]()
    call = {**tiny.CALLS[type(pipe)], "num_inference_steps": 6}
    prompts = ["a cat", "two dogs in the snow"]
    tuned = tune(pipe, prompts, speedup=1.5, minutes=1e-9, progress=False, **call)
    assert all(row.held_out_db and row.pixels_db for row in tuned.rows)
    with apply_tofu(pipe, tuned) as handle:
        assert torch.isfinite(tiny.generate(pipe, prompts, steps=6)).all()
        (steps,) = handle.summary().steps
        assert steps.computed == 4


def workload(pipe, **options):
    options = {"num_inference_steps": 6, "height": 64, "width": 64, **options}
    return Workload(pipe, pipe.scheduler, [pipe.unet], options)


@pytest.mark.parametrize("watched", ["steps", "fit"])
def test_a_watched_generation_is_the_one_that_the_pipeline_makes(watched):
    """Pipelines read from the arguments of `scheduler.step` what they may give it, such as eta."""
    pipe = tiny.small_sd()
    made = workload(pipe, eta=1.0).generated(Example("a cat", 3))
    call = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    wanted = pipe("a cat", eta=1.0, generator=generator, **call).images
    assert torch.equal(made.latents, wanted) and made.draws_noise
    plain = workload(pipe).generated(Example("a cat", 3))
    assert not plain.draws_noise and not torch.equal(plain.latents, wanted)
    assert (plain.steps, plain.calls) == (6, 6)
    if watched == "fit":
        seen = []
        own = pipe.scheduler.step
        with Fit((0, 2), 6).watching(pipe.scheduler, [wanted] * 6):
            seen += inspect.signature(pipe.scheduler.step).parameters
        assert seen == [*inspect.signature(own).parameters]


def test_a_copy_of_a_watched_scheduler_steps_by_itself():
    """Pipelines of video and sound copy theirs for the sound."""
    pipe = tiny.small_sd()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(4)
    noise, seen = torch.ones(1, 4, 8, 8), []
    first = pipe.scheduler.timesteps[0]
    with (
        told_of_steps(pipe.scheduler, lambda *args: seen.append(1)),
        told_of_steps(pipe.scheduler, lambda *args: seen.append(2)),
    ):
        twin = copy.deepcopy(pipe.scheduler)
        twin.step(noise, first, noise)
        assert not seen and (twin.step_index, pipe.scheduler.step_index) == (1, None)
        assert copy.deepcopy(vars(pipe.scheduler))["step"] is pipe.scheduler.step
        pipe.scheduler.step(noise, first, noise)
    assert seen == [1, 2] and pipe.scheduler.step_index == 1


def test_nothing_is_fitted_under_a_sampler_that_draws_noise():
    tuned = tuned_tiny(tiny.small_sd(), eta=1.0, minutes=1e-9)
    assert not any("fitted" in row.name for row in tuned.rows)


def test_forecasts_are_fitted_to_the_steps_that_image_to_image_executes(tmp_path):
    pipe = StableDiffusionImg2ImgPipeline(**tiny.small_sd().components)
    given = {"image": Image.new("RGB", (64, 64), "red"), "strength": 0.6}
    call = {
        "num_inference_steps": 20,
        "generate": lambda *args, **more: pipe(*args, **given, **more),
    }
    tune(pipe, "a cat", speedup=2.0, folder=tmp_path, minutes=1e-9, progress=False, **call)
    found = [json.loads(path.read_text()) for path in tmp_path.glob("fitted-*.json")]
    assert found and all(len(each["levels"]) == 12 for each in found)
    config = StepSkipping(speedup=2.0, rule="even", warmup_steps=1, fitted=found[0])
    with apply_tofu(pipe, config) as handle:
        pipe("a cat", num_inference_steps=20, **given)
        assert "fitted to these 12 steps" in str(handle.summary())
        (steps,) = handle.summary().steps
        assert (steps.steps, steps.computed) == (12, len(found[0]["computed"]))
        # With another strength as many steps are others; they go by the rule.
        with pytest.warns(
            UserWarning, match="fitted to 12 steps of .* and these are 12 of .* strength"
        ):
            pipe("a cat", num_inference_steps=40, **{**given, "strength": 0.3})
        assert "rule even" in str(handle.summary())


def test_a_fit_brings_the_latents_nearer(tmp_path):
    """Under a solver of the second order too, whose past it must not disturb."""
    pipe = tiny.small_sd()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    steps, computed, example = 10, (0, 1, 3, 5, 7, 9), Example("a cat", 3)
    known = workload(pipe, num_inference_steps=steps)
    reference = known.reference(example, False, tmp_path / "reference.safetensors")
    fit, sampling = Fit(computed, steps), Sampling.of(pipe.scheduler)

    def error(forecasts):
        with apply_tofu(
            pipe, StepSkipping(speedup=1.6, fitted=forecasts, rule="even", warmup_steps=1)
        ):
            return latents_db(known.generated(example).latents, reference.made.latents)

    repeated = error(fit.forecasts(sampling))
    still = StepSkipping(speedup=1.6, fitted=fit.forecasts(sampling), rule="even", warmup_steps=1)
    with apply_tofu(pipe, still), fit.watching(pipe.scheduler, reference.behind):
        known.run(example)
    assert error(fit.forecasts(sampling)) > repeated + 3
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("prompt", [{"prompt": "a cat"}, ["a cat"]])
def test_prompts_may_be_whatever_is_called_with_them(prompt):
    pipe = tiny.small_sd()

    def generate(given, **options):
        return pipe(**given, **options) if isinstance(given, dict) else pipe(given, **options)

    tuned = tuned_tiny(
        pipe, prompts=[prompt, prompt], generate=generate, minutes=1e-9, num_inference_steps=6
    )
    assert tuned.rows


@pytest.mark.parametrize(
    ("passes", "why"),
    [(False, "did not pass"), (None, "3 steps are refused ("), (6, "refused (just 6)")],
)
def test_fewer_steps_are_left_out_where_they_cannot_be_asked_for(passes, why):
    pipe = tiny.small_sd()

    def generate(prompt, generator, output_type, return_dict, **options):
        given = {"generator": generator, "output_type": output_type, "return_dict": return_dict}
        if passes is None:
            given |= options
        elif options.get("num_inference_steps", 6) != 6 and passes == 6:
            raise ValueError("just 6")
        return pipe(prompt, num_inference_steps=6, height=64, width=64, **given)

    tuned = tune(pipe, "a cat", speedup=2.0, generate=generate, minutes=1e-9, progress=False)
    assert [row.kind for row in tuned.rows] == ["default", "tuned"]
    assert why in tuned.about["left out, fewer steps"]


def test_a_prompt_that_makes_another_picture_each_time_is_refused():
    pipe, seeds = tiny.small_sd(), iter(range(99))

    def generate(prompt, generator, **options):
        return pipe(prompt, generator=generator.manual_seed(next(seeds)), **options)

    with pytest.raises(ValueError, match="twice with one seed, has other latents"):
        tuned_tiny(pipe, generate=generate)


@pytest.mark.parametrize("returned", ["pictures", "nothing"])
def test_what_is_called_instead_of_the_pipeline_may_return_less(returned):
    pipe = tiny.small_sd()

    def generate(prompt, **options):
        pictures, _ = pipe(prompt, **options)
        return pictures if returned == "pictures" else None

    tuned = tuned_tiny(pipe, generate=generate, minutes=1e-9, num_inference_steps=4)
    pictured = 1 if returned == "pictures" else 0
    assert [len(row.pixels_db) for row in tuned.rows] == [pictured] * 3


def test_fewer_steps_are_counted_by_calls():
    """Heun's calls are one less than twice the steps."""
    pipe = tiny.small_sd()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    tuned = tuned_tiny(pipe, minutes=1e-9)
    row = tuned.rows[-1]
    assert row.kind == "fewer steps"
    steps = row.num_inference_steps
    assert row.name == f"{steps} steps" and len(row.plan) == 2 * steps - 1
    assert row.flops == pytest.approx((2 * 10 - 1) / (2 * steps - 1))
    assert tuned.rows[0].num_inference_steps is None


def test_options_are_told_apart_by_what_they_hold():
    picture = torch.zeros(3, 64, 64)
    other = picture.clone()
    other[1, 30, 30] = 1
    assert module.described(picture) == module.described(picture.clone()) != module.described(other)
    assert module.described({"a": [picture]}) != module.described({"a": [other]})
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "red"))
    assert (
        module.described(first)
        == module.described(second)
        != module.described(Image.new("RGB", (8, 8), "blue"))
    )
    assert " at 0x" not in module.described(lambda: 1)
    assert module.described(torch.zeros(2, dtype=torch.bfloat16))


def test_the_same_prompts_kept_apart_otherwise_are_another_search(tmp_path):
    pipe = tiny.small_sd()
    options = {"folder": tmp_path, "minutes": 1e-9, "num_inference_steps": 6}
    tuned_tiny(pipe, prompts=["a", "b"], held_out=["c"], **options)
    with pytest.raises(ValueError, match="another search: its prompts searched on"):
        tuned_tiny(pipe, prompts=["a"], held_out=["b", "c"], **options)


def test_a_compiled_denoiser_is_refused():
    pipe = tiny.small_sd()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match="tune first, then compile"):
        tuned_tiny(pipe)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '{"type": "Tuned", "version": 1}',
        '{"type": "Tuned", "version": 1, "data": {"choices": [], "rows": [], "denoisers": [], "about": {}}}',
        '{"type": "Tuned", "version": 1, "data": {"choices": [{"speedup": 2, "configs": [{"type": "X"}]}]}}',
        '{"type": "Tuned", "version": 9, "data": {}}',
    ],
)
def test_files_that_hold_nothing_tuned_are_refused_in_words(tmp_path, text):
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(ValueError, match=r"tuned.json holds .* tune again") as refused:
        Tuned.load(tmp_path)
    assert ("update tofu_diffusers" in str(refused.value)) == ('"version": 9' in text)


ROW = asdict(Measured("default", "profile", 2.0, 2.0, "#.", (1.0,), (1.0,), (1.0,)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"denoisers": "UNet2DConditionModel"}, "denoisers must be a list"),
        ({"about": 5}, "about an object"),
        ({"choices": [{"speedup": 2.0, "configs": []}]}, "a speed-up without configurations"),
        ({"about": {"overfitted": [None]}}, "NoneType"),
        ({"rows": [{"kind": "default"}]}, "speedup"),
        ({"rows": [{**ROW, "flops": "x"}]}, "could not convert string to float: 'x'"),
        ({"rows": [{**ROW, "pixels_db": [None]}]}, "NoneType"),
        (
            {"rows": [{**ROW, "kind": "x"}]},
            "a row of kind 'x'; there are default, tuned, fewer steps",
        ),
    ],
)
def test_damaged_parts_of_a_tuned_file_are_named(found, tmp_path, change, said):
    path = found[1].save(tmp_path)
    state = json.loads(path.read_text())
    state["data"] |= change
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"tuned.json holds no tuned settings .*{said}"):
        Tuned.load(tmp_path)


def test_a_folder_that_holds_something_else_says_what_to_give(found, tmp_path):
    pipe = tiny.small_sd()
    path = found[1].save(tmp_path / "tuned")
    with pytest.raises(FileNotFoundError, match=f"give its folder, {str(path.parent)!r}"):
        apply_tofu(pipe, path)
    TokenReduction(ratio=0.5).save(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"give TokenReduction\.load\("):
        apply_tofu(pipe, str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="in an empty path"):
        apply_tofu(pipe, "")


def test_another_class_of_pipelines_around_such_a_denoiser_is_warned_of(found):
    pipe, tuned = found[0], found[1]
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.warns(UserWarning, match="put on a StableDiffusionImg2ImgPipeline"):
        apply_tofu(other, tuned, speedup=2.0).remove()


@pytest.mark.parametrize("name", ["search.json", "scores.jsonl", "reference-0.safetensors"])
def test_a_damaged_search_is_named(tmp_path, name):
    (tmp_path / name).write_text("{\n")
    with pytest.raises(ValueError, match=rf"{name} is damaged .* delete it"):
        tune(tiny.small_sd(), PROMPTS, folder=tmp_path, num_inference_steps=10, progress=False)


@pytest.mark.filterwarnings(
    "error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning"
)
def test_a_temporary_folder_goes_with_the_search_however_it_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = []

    def generate(prompt, **options):
        held.append([*tmp_path.iterdir()])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned_tiny(tiny.small_sd(), generate=generate)
    assert len(held[0]) == 1 and not [*tmp_path.iterdir()]


def test_two_may_write_one_file(tmp_path, monkeypatch):
    """What one process has begun, another neither takes nor overwrites."""
    path = tmp_path / "file.json"
    with written_whole(path) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with written_whole(path) as other:
            other.write_text("other")
        assert path.read_text() == "other" and mine.exists()
    assert path.read_text() == "mine" and [*tmp_path.iterdir()] == [path]


def test_a_speedup_that_is_none_is_refused(found):
    pipe, tuned, _ = found
    for speedup in (0, -1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="below 1 or no number"):
            apply_tofu(pipe, tuned, speedup=speedup)


def test_decibels():
    wanted = torch.ones(2, 3)
    assert latents_db(wanted * 1.1, wanted) == pytest.approx(20.0, abs=1e-4)
    assert latents_db(wanted, wanted) == EQUAL_DB
    assert latents_db(wanted * torch.nan, wanted) == BROKEN_DB
    assert latents_db(wanted[:1], wanted) == BROKEN_DB
    assert psnr_db(wanted * 0.9, wanted) == pytest.approx(20.0, abs=1e-4)


SPREAD = """
import sys
import torch
from torch import distributed
from tests.tuning.test_tune import PROMPTS, tuned_tiny
from tests import tiny
from tests.tiny_pipelines import PIPELINES
distributed.init_process_group("gloo")
tuned = tuned_tiny(tiny.small_sd(), folder=sys.argv[1], minutes=1e-9)
if distributed.get_rank() == 0:
    tuned.save(sys.argv[1])
distributed.destroy_process_group()
"""


def test_processes_share_the_work_and_find_the_same(tmp_path):
    script = tmp_path / "spread.py"
    script.write_text(SPREAD)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], check=True, env=environment, timeout=300)
    spread, alone = Tuned.load(tmp_path), tuned_tiny(tiny.small_sd(), minutes=1e-9)
    for mine, other in zip(spread.rows, alone.rows, strict=True):
        assert mine.name == other.name
        assert mine.held_out_db == pytest.approx(other.held_out_db, abs=1e-3)
