"""Pictures of NaN and of one colour are counted and named, and are not taken for equal ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from eval.__main__ import main
from eval.bench.pipeline import UNREDUCED
from eval.generate.failed import NAN, ONE_COLOUR, failed, failure, png
from eval.generate.manifest import Manifest, image_path
from eval.generate.run import Loaded, generate
from eval.generate.settings import Setting
from eval.studies import study
from eval.studies.stages import STAGES, Trial
from tests import tiny

PROMPTS = ["a dog", "a cat", "a fish"]
CALL = {"num_inference_steps": 3, "height": 64, "width": 64}
SHORT = Setting("short", "fewer_steps", {"steps": 2})


def of_nan():
    """As float16 does where it overflows."""
    pipe = tiny.small_sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    return pipe


def of_one_nan():
    """Only the second of a batch."""
    pipe = tiny.small_sd()
    decode = pipe.vae.decode

    def decoded(latents, **options):
        (pictures,) = decode(latents, **options)
        pictures[1:2, :, :5] = float("nan")
        return (pictures,)

    pipe.vae.decode = decoded
    return pipe


def checked():
    """With a safety checker that blacks everything out."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    text, vision = tower | {"vocab_size": 514}, tower | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checker = StableDiffusionSafetyChecker(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        )
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
    seen = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = {"safety_checker": checker, "feature_extractor": seen}
    return StableDiffusionPipeline(**{**tiny.small_sd().components, **parts})


def loaded(pipe):
    pipe.set_progress_bar_config(disable=True)
    return Loaded(pipe, "tiny", "0" * 16, "float32", torch.device("cpu"))


def make(pipe, out, setting=UNREDUCED):
    given = {"batch_size": 2, "call": CALL, "device": "cpu"}
    return generate(loaded(pipe), setting, PROMPTS, out, **given)


def score(folder, *more):
    words = ["--run", folder / "short", "--reference", folder / "unreduced", *more]
    assert main(["score", *map(str, words)]) == 0
    return json.loads((folder / "scores" / "short.json").read_text())


def test_what_is_a_picture():
    rng = np.random.default_rng(0)
    whole = rng.random((6, 5, 3), np.float32)
    assert failure(whole) is None and failure((whole * 255).astype(np.uint8)) is None
    spotted = whole.copy()
    spotted[3, 2, 1] = np.nan
    assert failure(spotted) == NAN
    for colour in ((0, 0, 0), (1, 0, 0.5)):
        plain = np.full((6, 5, 3), colour, np.float32)
        assert failure(plain) == failure(np.uint8(plain * 255)) == ONE_COLOUR
        plain[5, 4] += 0.001  # not seen in bytes
        assert failure(plain) == ONE_COLOUR
        plain[5, 4, 2] = 0.25
        assert failure(plain) is None
    assert failure(np.zeros((6, 5, 1))) == ONE_COLOUR


def test_a_file_says_that_it_was_of_nan(tmp_path):
    spotted = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8))
    (tmp_path / "images").mkdir()
    pictures = (spotted, NAN), (spotted, None), (Image.new("L", (6, 5)), ONE_COLOUR)
    for index, (picture, reason) in enumerate(pictures):
        image_path(tmp_path, index).write_bytes(png(picture, reason))
    assert failed(tmp_path, 3) == {"00000.png": NAN, "00002.png": ONE_COLOUR}
    spotted.save(tmp_path / "plain.png")
    assert (tmp_path / "plain.png").read_bytes() == png(spotted, None)


@pytest.mark.parametrize(
    ("build", "expected", "way"),
    [
        (of_nan, dict.fromkeys(("00000.png", "00001.png", "00002.png"), NAN), "--dtype float32"),
        (of_one_nan, {"00001.png": NAN}, "overflowed"),
        (checked, dict.fromkeys(("00000.png", "00001.png", "00002.png"), ONE_COLOUR), "checker"),
    ],
)
def test_failed_pictures_are_named_when_made_and_when_scored(
    tmp_path, capsys, build, expected, way
):
    pipe = build()
    told = rf"(?s)unreduced: {len(expected)} of 3 pictures failed\n.*'a cat': .*{way}"
    with pytest.warns(UserWarning, match=told):
        made = make(pipe, tmp_path / "unreduced")
    assert made.failed == expected == Manifest.load(tmp_path / "unreduced").failed
    assert not list(Path(tmp_path / "unreduced").glob(".*"))
    with pytest.warns(UserWarning, match="pictures failed"):  # again, with nothing to make
        assert make(pipe, tmp_path / "unreduced") == made
    make(tiny.small_sd(), tmp_path / "short", SHORT)
    with pytest.raises(SystemExit, match="2"):
        score(tmp_path)
    said = capsys.readouterr().err
    assert f"unreduced: {len(expected)} of 3 pictures failed" in said and "'a cat'" in said
    assert f"0 may; to score them like others: --allow-failed {len(expected)}" in said
    assert not (tmp_path / "scores").exists()
    found = score(tmp_path, "--allow-failed", len(expected))
    assert found["failed"] == {"run": {}, "reference": expected}
    assert f"failed: {len(expected)} pictures of the reference" in capsys.readouterr().out


def test_a_picture_that_is_made_again_is_judged_again(tmp_path):
    with pytest.warns(UserWarning, match="1 of 3 pictures failed"):
        make(of_one_nan(), tmp_path)
    image_path(tmp_path, 1).unlink()
    assert not make(tiny.small_sd(), tmp_path).failed
    assert not Manifest.load(tmp_path).failed


def test_manifests_of_before_have_none(tmp_path):
    make(tiny.small_sd(), tmp_path)
    data = Manifest.load(tmp_path).to_dict()
    assert data.pop("failed") == {}
    assert Manifest.from_dict(data) == Manifest.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*pictures failed")
def test_a_sweep_stops_or_says_so_in_every_row(tmp_path, capsys):
    of_nan().save_pretrained(tmp_path / "model")
    out = tmp_path / "sweep"
    words = ["sweep", "--pipeline", tmp_path / "model", "-n", 2, "--steps", 3, "--height", 64]
    words += ["--width", 64, "--rounds", 0, "--out", out, "--setting", json.dumps(SHORT.to_dict())]
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, words)])
    assert "unreduced: 2 of 2 pictures failed" in capsys.readouterr().err
    assert not (out / "short").exists()
    assert main([*map(str, words), "--allow-failed", "2"]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == [{"run": 2, "reference": 2}] * 2
    page = (out / "report.html").read_text()
    for which in ("run", "reference"):
        # Of each row: its cell, what that sorts by, and its Markdown.
        assert page.count(f"2 pictures of the {which} failed (NaN or one colour)") == 3 * 2
    assert "120.0 dB, failed: NaN" in page and "the reference, failed: NaN" in page


def test_a_study_has_no_rows_of_them(tmp_path, monkeypatch, capsys):
    words = [
        "study",
        "--stage",
        "typed",
        "-n",
        "2",
        "--steps",
        "4",
        "--out",
        str(tmp_path / "rows"),
    ]
    words += ["--height", "64", "--width", "64"]
    pipe = of_nan()
    monkeypatch.setattr(study.run, "load", lambda *_, **__: loaded(pipe))
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "unreduced: 2 of 2 pictures failed" in capsys.readouterr().err
    pipe = tiny.small_sd()
    settings = (SHORT, Setting("same"))
    monkeypatch.setitem(STAGES, "typed", lambda steps: [Trial(each, steps) for each in settings])
    inner = study.one_batch

    def spoilt(pipe, prompts, seed, call):
        output = inner(pipe, prompts, seed, call)
        if call["num_inference_steps"] == SHORT.options["steps"]:
            output.images[1] = float("nan")
        return output

    monkeypatch.setattr(study, "one_batch", spoilt)
    with (
        pytest.warns(UserWarning, match="(?s)short: 1 of 2 pictures failed.*it gets no row"),
        pytest.raises(SystemExit, match="2"),
    ):
        main(words)
    assert (
        "1 of 2 settings got no row, as pictures of theirs failed: short" in capsys.readouterr().err
    )
    assert [row["setting"]["name"] for row in study.read(tmp_path / "rows")] == ["same"]
