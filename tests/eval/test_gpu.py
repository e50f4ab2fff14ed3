"""eval.bench.gpu: every part runs without a GPU, goes on where it stopped, and ends when its time is up."""

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from eval.bench import denoisers, gpu, growth, stacking
from eval.bench.models import SUITES
from eval.bench.rows import read_rows
from eval.jsonl import read

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """One denoiser and two kinds of rows."""
    monkeypatch.setitem(SUITES, "tiny", SUITES["tiny"][:1])
    monkeypatch.setattr(denoisers, "MORE_CELLS", denoisers.FIRST_CELLS[2:3])
    monkeypatch.setattr(denoisers, "FIRST_CELLS", denoisers.FIRST_CELLS[:2])
    monkeypatch.setattr(stacking, "partners", lambda case, device: ["first_block_cache"])
    monkeypatch.setattr(growth, "TRIAL_SIZES", (64,))
    monkeypatch.setattr(growth, "clock", lambda call: [growth.once(call)])


def call(out, *more):
    return gpu.main(["--suite", "tiny", "--rounds", "1", "--out", str(out), *more])


def test_every_part_runs_once(small, tmp_path, capsys):
    assert call(tmp_path, "--commit", "abc") == 0
    done = json.loads((tmp_path / "parts.json").read_text())
    assert list(done) == list(gpu.PARTS)
    assert " passed" in done["parity"] and "passed" in (tmp_path / "parity.log").read_text()
    rows = read_rows(tmp_path / "suite.csv")
    assert len(rows) == 3 and {row["commit"] for row in rows} == {"abc"}
    kernels = (tmp_path / "kernels.csv").read_text()
    assert kernels.startswith(",".join(growth.FIELDS))
    assert all(f"{name},reference,64" in kernels for name in ("match", "energy", "unmerge copy"))
    (stacked,) = read(tmp_path / "stacking.jsonl")
    assert stacked["id"] == "FLUX-tiny-96x96/first_block_cache" and stacked["commit"] == "abc"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert call(tmp_path) == 0
    assert capsys.readouterr().out.count("done before") == len(gpu.PARTS)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_is_begun_after_the_time(tmp_path, capsys):
    assert call(tmp_path, "--minutes", "1e-12") == 0
    assert "not done: parity, sync, head, kernels, stacking, suite" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_part_out_of_time_goes_on_in_the_next_call(small, tmp_path, monkeypatch, capsys):
    job = gpu.Job(tmp_path, "tiny", until=0.0, rounds=1, commit=None)
    assert gpu.head(job) is None
    monkeypatch.setattr(gpu, "PARTS", {"head": lambda _: gpu.head(job)})
    assert call(tmp_path) == 0
    assert "head: to be continued" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "PARTS", {"head": gpu.head})
    assert call(tmp_path) == 0
    assert len(read_rows(tmp_path / "suite.csv")) == 2


def test_a_failed_part_does_not_stop_the_others_and_is_tried_again(tmp_path, monkeypatch, capsys):
    calls = []

    def wrong(job):
        calls.append("wrong")
        raise RuntimeError("no kernel image")

    parts = {
        "parity": lambda job: "1 failed, 3 passed",
        "sync": wrong,
        "head": lambda job: "fine",
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    for _ in range(2):
        assert call(tmp_path) == 1
    assert len(calls) == 2
    assert json.loads((tmp_path / "parts.json").read_text()) == {"head": "fine"}
    assert "sync: failed: RuntimeError: no kernel image" in capsys.readouterr().out


def test_only_a_clean_run_of_tests_passes():
    assert gpu.passed("12 passed in 3.0s")
    for line in ("1 failed, 3 passed", "no tests ran", "1 error", "3 passed, 1 error", "no output"):
        assert not gpu.passed(line)


def test_packages_of_a_folder_are_installed_without_a_network(tmp_path, monkeypatch):
    wheels, out, started = tmp_path / "wheels", tmp_path / "out", []
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried-1.0.dist-info"
        wheel.writestr("carried.py", "HERE = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")

    class Replaced(Exception):
        """os.execve does not return."""

    def execve(program, command, environment):
        started.append((command, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(Replaced):
        call(out, "--wheels", str(wheels))
    ((command, environment),) = started
    site = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    assert (site / "carried.py").exists()
    assert command[-6:] == ["--suite", "tiny", "--rounds", "1", "--out", str(out)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is needed"),
        (["--out", "x", "--minutes", "0"], "must be above 0"),
        (["--out", "x", "--rounds", "0"], "must be above 0"),
        (["--out", "x", "--wheels", "nowhere"], "holds no .whl file"),
        (["--out", "x", "--suite", "huge"], "invalid choice"),
    ],
)
def test_wrong_arguments_end_with_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        gpu.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_make_gpu_calls_it():
    def make(*arguments):
        return subprocess.run(
            ["make", "-n", "gpu", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    assert 'python3 -m eval.bench.gpu --out "there" --wheels "w"' in make(
        "OUT=there", "WHEELS=w", "PYTHON=python3"
    )
    assert "--wheels" not in make("OUT=there")
