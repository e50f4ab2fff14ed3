"""The whole of eval by one command, on a tiny pipeline: what is there at the end, and after a stop."""

import json
import shutil
from types import SimpleNamespace

import pytest

from eval import sweep
from eval.__main__ import main
from eval.generate import run
from eval.generate.prompts import load_prompts
from eval.generate.settings import Setting
from eval.metrics import score
from eval.studies.stages import Trial
from eval.sweep import baselines, others, skip_settings, tofu_settings
from tests import tiny

PROMPTS = len(load_prompts("emoji"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.tiny_sd(channels=(32, 32)).save_pretrained(path)
    return path


@pytest.fixture
def without_page(monkeypatch):
    """Its plots take longer than a tiny sweep."""
    monkeypatch.setattr(sweep.page, "main", lambda args: None)


def command(folder, out, *more):
    sizes = ["--height", "64", "--width", "96", "--steps", "5", "--guidance", "2"]
    return [
        "--pipeline",
        str(folder),
        "-n",
        "3",
        "--batch-size",
        "2",
        *sizes,
        "--out",
        str(out),
        *more,
    ]


def test_a_sweep_from_one_command_and_again_after_a_stop(folder, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    words = [
        "sweep",
        *command(folder, out, "--ratios", "0.5", "--methods", "default", "--speedups", "2"),
        *("--steps", "3", "--rounds", "1"),
    ]

    class Stop(Exception):
        pass

    made, inner = [], run.generate

    def stopping(*args, **kwargs):
        made.append(args[1].name)
        if len(made) == 4:
            raise Stop
        return inner(*args, **kwargs)

    monkeypatch.setattr(run, "generate", stopping)
    with pytest.raises(Stop):
        main(words)
    assert not (out / "results.json").exists()
    monkeypatch.setattr(run, "generate", inner)
    assert main(words) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    names = [row["setting"]["name"] for row in rows]
    assert names[:3] == ["unreduced", "default-0.5", "random-0.5"]
    assert {"speedup-2", "tomesd-0.5", "pab-2", "deepcache-2"} <= set(names)
    kinds = {row["setting"]["kind"] for row in rows}
    assert kinds == {"unreduced", "tofu", "tomesd", "pab", "deepcache", "fewer_steps", "step_cache"}
    for row in rows:
        assert row["n"] == 3 and len(row["weights"]) == 16 and row["commit"]
        assert {"psnr_db", "ssim", "feature_distance", "fd-effnetlite0"} <= set(row["metrics"])
        assert "alignment" not in " ".join(
            row["metrics"]
        )  # no scorer knows this pipeline's prompts
        whole = row["setting"]["name"] == "unreduced"
        assert (row["flops_ratio"] == 1) == whole or row["setting"]["kind"] == "pab"
        assert (row["speed"] is None) == whole
    assert sorted(p.name for p in (out / "default-0.5" / "kept").iterdir()) == [
        "00000.png",
        "00001.png",
    ]
    assert not (out / "speedup-2" / "kept").exists()
    page = (out / "report.html").read_text()
    assert all(name in page for name in names)
    results, first = (out / "results.json").read_bytes(), (out / "speed.json").read_bytes()
    assert main(words) == 0  # nothing is made or measured again
    assert (out / "results.json").read_bytes() == results
    assert (out / "speed.json").read_bytes() == first


def test_the_steps_run_alone(folder, tmp_path, capsys):
    half = Setting("half", "tofu", {"ratio": 0.5, "method": "tome"}).to_dict()
    assert main(["generate", *command(folder, tmp_path / "unreduced")]) == 0
    assert (
        main(["generate", *command(folder, tmp_path / "half", "--setting", json.dumps(half))]) == 0
    )
    assert main(["score", "--run", str(tmp_path / "half")]) == 0
    assert "psnr_db" in capsys.readouterr().out
    speed = ["--setting", json.dumps(half), "--rounds", "1"]
    assert main(["speed", *command(folder, tmp_path / "speed.json", *speed)]) == 0
    assert "ms a step" in capsys.readouterr().out


def test_baselines_are_matched_in_whole_steps():
    settings = baselines(20, [1.25, 2.0, 2.04, 30.0])
    steps = [s.options["steps"] for s in settings if s.kind == "fewer_steps"]
    assert steps == [16, 16, 10, 10, 1, 1]
    cached = [s.options for s in settings if s.kind == "step_cache"]
    assert [c["computed"] for c in cached] == [16, 16, 10, 10, 1, 1]
    assert cached[-1]["first"] == 1
    assert len({s.name for s in settings}) == len(settings)
    assert baselines(20, [1.0]) == []


def test_every_ratio_has_its_floor_and_zero_is_the_reference():
    settings = tofu_settings(["default", "tome", "tome"], [0.0, 0.5, 0.25, 0.5])
    assert [s.name for s in settings] == [
        *("default-0.25", "tome-0.25", "random-0.25"),
        *("default-0.5", "tome-0.5", "random-0.5"),
    ]
    assert settings[0].options == {"ratio": 0.25}
    assert settings[1].options == {"ratio": 0.25, "method": "tome"}
    settings = skip_settings([2.0, 1.0, 1.5, 2.0])
    assert [s.name for s in settings] == ["speedup-1.5", "speedup-2"]
    assert settings[0].options == {"speedup": 1.5}


def test_other_packages_are_asked_for_what_they_can():
    def names(pipe, ratios=(0.5, 0.9)):
        return [setting.name for setting in others(pipe, ratios)]

    assert names(tiny.tiny_sd()) == ["pab-2", "tomesd-0.5", "deepcache-2", "deepcache-3"]
    assert names(tiny.tiny_sd3()) == ["pab-2", "taylorseer-2", "taylorseer-3"]
    first_block = ["first-block-0.1", "first-block-0.2"]
    assert names(tiny.tiny_flux()) == ["pab-2", "taylorseer-2", "taylorseer-3", *first_block]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratios", "1.5"], "ratio 1.5 is outside"),
        (["--speedups", "0.5"], "speedup 0.5 is below 1"),
        (["--methods", "magic"], "unknown method 'magic'; choose from default"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--pipeline", "/nowhere/model"], "/nowhere/model"),
        (["--rounds", "-1"], "--rounds -1 is below 0"),
        (["--steps", "0"], "--steps 0 is below 1"),
        (["-n", "1"], f"1 prompts asked for of {PROMPTS}; choose 2 to {PROMPTS}"),
        (
            ["--setting", '{"name": "a", "kind": "deepcache"}'],
            "missing a required argument: 'interval'",
        ),
    ],
)
def test_mistakes_end_early(folder, tmp_path, capsys, words, message):
    out = tmp_path / "sweep"
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", *command(folder, out), *words])
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_savings_are_counted_anew_where_anything_changed(folder, tmp_path, without_page):
    out = tmp_path / "sweep"

    def half(ratio):
        return {"name": "half", "kind": "tofu", "options": {"ratio": ratio, "method": "tome"}}

    def swept(ratio):
        given = ["--rounds", "0", "--setting", json.dumps(half(ratio))]
        assert main(["sweep", *command(folder, out), *given]) == 0
        return json.loads((out / "results.json").read_text())["rows"][1]["flops_ratio"]

    # Not of this model, but counted before it is refused.
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", *command(folder, out, "--setting", json.dumps(half(0.5))), "--height", "60"])
    more = swept(0.5)
    shutil.rmtree(out / "half")
    assert swept(0.25) < more
    shutil.rmtree(out / "half")
    assert swept(0.5) == more


def test_one_process_writes_what_all_of_them_count(folder, tmp_path, monkeypatch):
    loaded = run.load(str(folder), "float32")
    call = {"num_inference_steps": 2, "height": 64, "width": 96}
    each = sweep.Sweep(tmp_path / "sweep", loaded, ["a", "b"], 0, 2, call, 0)
    half = Setting("half", "fewer_steps", {"steps": 1})
    for main_process in (False, True):
        state = SimpleNamespace(is_main_process=main_process)
        monkeypatch.setattr(run, "processes", lambda state=state: state)
        assert each.flops([half]) == {"half": 2.0}
        assert (tmp_path / "sweep" / "flops.json").exists() == main_process


def test_times_are_of_the_process_that_takes_them(
    folder, tmp_path, monkeypatch, capsys, without_page
):
    out, half = tmp_path / "sweep", {"name": "half", "kind": "fewer_steps", "options": {"steps": 3}}
    words = ["sweep", *command(folder, out, "--setting", json.dumps(half))]
    assert main([*words, "--rounds", "0"]) == 0
    inner = sweep.provenance
    monkeypatch.setattr(sweep, "provenance", lambda device: {**inner(device), "threads": 64})
    assert main([*words, "--rounds", "1"]) == 0
    about = json.loads((out / "speed.json").read_text())["about"]
    assert about["threads"] == 64 and about["call"]["height"] == 64 and about["n"] == 2
    monkeypatch.setattr(sweep, "provenance", inner)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--rounds", "1"])
    assert "holds times measured otherwise" in capsys.readouterr().err


class Brightness:
    """In the place of a CLIP model."""

    source = None

    def __init__(self, source):
        self.identity = {"name": "clip_score"}
        Brightness.source = source

    def __call__(self, images, prompts):
        return images.float().mean((1, 2, 3))


def test_a_sweep_scores_as_it_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "ClipAlignment", Brightness)
    half = {"name": "half", "kind": "fewer_steps", "options": {"steps": 3}}
    more = ["--rounds", "0", "--clip", "a model", "--resize", "bicubic"]
    assert main(["sweep", *command(folder, tmp_path, "--setting", json.dumps(half)), *more]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert Brightness.source == "a model"
    assert all("clip_score" in row["metrics"] for row in rows)
    assert rows[1]["call"]["width"] == 96
    scored = json.loads((tmp_path / "scores" / "half.json").read_text())
    assert scored["inputs"]["extractor"]["resize"] == "bicubic"
    assert "clip_score" in (tmp_path / "report.html").read_text()


def test_no_command_and_an_unknown_one_are_refused(capsys):
    for words in ([], ["magic"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    assert "sweep" in capsys.readouterr().err


def test_a_sweep_over_named_settings_makes_these_and_no_others(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(score, "ClipAlignment", Brightness)
    out = tmp_path / "sweep"
    half = {"name": "half", "kind": "tofu", "options": {"ratio": 0.5, "method": "tome"}}
    fewer = {"name": "fewer", "kind": "fewer_steps", "options": {"steps": 3}}
    given = [json.dumps(half), json.dumps(fewer)]
    start = ["sweep", *command(folder, out, "--rounds", "0", "--clip", "a model")]
    assert main([*start, "--setting", *given]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["setting"] for row in rows[1:]] == [half, fewer]
    assert rows[0]["setting"]["name"] == "unreduced"
    assert all(row["speed"] is None for row in rows)
    # So does the stage that has them.
    trials = [Trial(Setting(**each), steps) for each, steps in ((half, 5), (fewer, 5), (half, 9))]
    monkeypatch.setitem(sweep.STAGES, "distances", lambda steps: trials)
    words = [*start, "--stage", "distances", "--against", "half"]
    assert main(words) == 0
    again = json.loads((out / "results.json").read_text())["rows"]
    assert [{**row, "against": {}} for row in again] == rows
    # Both ways the same resamples are compared.
    whole, same, other = (row["against"].get("half") for row in again)
    assert same is None
    there, back = (each["clip_score-change"]["value"] for each in (again[1]["metrics"], whole))
    assert (1 + there) * (1 + back) == pytest.approx(1)
    assert other["clip_score-change"]["value"] != back
    with pytest.raises(SystemExit):
        main([*words[:-1], "third"])
    assert (
        "no setting is called 'third'; choose of unreduced, half, fewer" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main([*words, "--steps", "7"])
    assert "stage distances has no setting of 7 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--setting", given[0]])
    assert "leave one out" in capsys.readouterr().err
