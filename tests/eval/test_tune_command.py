"""eval tune: one command, whatever it finds can be applied, and the page shows it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

from eval.__main__ import main
from eval.generate.prompts import load_prompts
from eval.report import tune_page
from eval.studies.emoji import tuned as study
from tests import tiny
from tofu_diffusers import Tuned, apply_tofu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny pipeline, tuned from the command line."""
    folder = tmp_path_factory.mktemp("tune")
    tiny.small_sd().save_pretrained(folder / "model")
    command = ["tune", "--pipeline", str(folder / "model"), "--speedup", "2", "--minutes", "1e-9"]
    command += ["-n", "2", "--held-out", "2", "--steps", "10", "--height", "64", "--width", "64"]
    assert main([*command, "--out", str(folder / "out")]) == 0
    return folder


def test_what_it_finds_is_applied_from_its_folder(folder):
    pipe = DiffusionPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    with apply_tofu(pipe, folder / "out", speedup=2.0) as handle:
        pipe("a cat", num_inference_steps=10, height=64, width=64)
        assert handle.summary().speedup >= 2.0 - 1e-6


def test_the_page_has_each_row_its_steps_and_the_pictures(folder):
    page = (folder / "out" / "report.html").read_text()
    tuned = Tuned.load(folder / "out")
    assert "<h1>model: tuned</h1>" in page and "pipeline: StableDiffusionPipeline" in page
    for row in tuned.rows:
        assert f"<td>{row.name}</td>" in page
        # As many cells as steps, filled where they were computed.
        cells = "".join('<i class="on"></i>' if sign == "#" else "<i></i>" for sign in row.plan)
        assert cells in page
    # The front; and of two prompts the unreduced picture, the default, the tuned one and fewer steps.
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 1 + 2 * 4
    assert "http" not in page.replace("http-equiv", "")
    for prompt in load_prompts("emoji")[2:4]:
        assert f"<p>{prompt}</p>" in page


def test_the_page_of_a_video_shows_a_frame_and_that_of_sound_no_picture(folder):
    pipe = tiny.tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    call = {**tiny.CALLS[type(pipe)], "num_inference_steps": 4}
    about = {"pipeline": "WanPipeline"}
    tuned = replace(Tuned.load(folder / "out"), denoisers=("WanTransformer3DModel",), about=about)
    ((prompt, row),) = tune_page.pictures(pipe, tuned, ["a cat"], 0, call)
    assert prompt == "a cat" and [caption for caption, _ in row][-1] == "5 steps"
    rows = tuple(replace(each, pixels_db=()) for each in tuned.rows)
    sound = replace(tuned, rows=rows)
    assert tune_page.pictures(pipe, sound, ["a cat"], 0, call) == []
    assert "Pictures" not in tune_page.page(sound, [], {"model": "mine"})


def test_fewer_steps_are_drawn_with_as_many_as_were_asked_for(folder, monkeypatch):
    """Under a sampler of two calls a step its plan has more."""
    tuned, asked = Tuned.load(folder / "out"), []
    rows = [replace(row, plan="#" * 9) if row.name == "5 steps" else row for row in tuned.rows]

    def one_batch(pipe, prompts, seed, given):
        asked.append(given["num_inference_steps"])
        return (torch.zeros(1, 3, 8, 8),)

    monkeypatch.setattr(tune_page, "one_batch", one_batch)
    ((_, row),) = tune_page.pictures(
        tiny.small_sd(), replace(tuned, rows=tuple(rows)), ["a cat"], 0, {"num_inference_steps": 10}
    )
    assert asked == [10, 10, 10, 5] and row[-1][0] == "5 steps"
    # Where the default stays, the tuned picture would be its own.
    stays = replace(tuned, about={**tuned.about, "overfitted": [2.0]})
    ((_, row),) = tune_page.pictures(
        tiny.small_sd(), stays, ["a cat"], 0, {"num_inference_steps": 10}
    )
    assert [caption for caption, _ in row] == ["unreduced", "2x, default", "5 steps"]


def test_bad_arguments_are_refused_before_anything_is_made(folder, capsys):
    out, few = folder / "none", folder / "few.txt"
    few.write_text("a cat\na dog\n")
    command = ["tune", "--pipeline", str(folder / "model"), "--out", str(out)]
    for changes, words in (
        (["--held-out", "0"], "--held-out 0 is below 1"),
        (["--speedup", "1"], "no number above 1"),
        (["-n", "17"], "17 prompts to search on"),
        (
            ["--prompts", str(few)],
            "-n 4 prompts to search on and --held-out 4 to compare on are more",
        ),
    ):
        with pytest.raises(SystemExit):
            main([*command, *changes])
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_the_study_has_a_row_for_each_kind_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load_pipeline", lambda _: tiny.small_sd())
    monkeypatch.setattr(study, "CHECKED", 1)
    out = tmp_path / "rows.jsonl"
    command = ["--model", "unet", "--steps", "10", "--speedup", "2", "--searched", "1", "-n", "2"]
    command += ["--report-side", "32", "64", "--minutes", "1e-9", "--out", str(out)]
    study.main(command)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = ["steps-2", "default-2", "tuned-2"]
    assert [row["id"].split("/")[1] for row in rows] == [*kinds, *kinds]
    assert [row["call"]["width"] for row in rows] == [32, 32, 32, 64, 64, 64]
    assert all(len(row["psnr_db"]) == 2 and row["flops_ratio"] == 2 for row in rows)
    assert {"profile", "own trajectory"} < {*rows[-1]["searched"]}
    study.main(command)
    assert len(out.read_text().splitlines()) == 6
