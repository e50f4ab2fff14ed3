"""eval.studies.emoji.hires: the second pass begins with the pictures of the first, and rows say what of."""

import json

import numpy as np
import pytest

from eval.bench.pipeline import UNREDUCED
from eval.generate import run
from eval.generate.settings import Setting
from eval.studies.emoji import hires as study
from eval.studies.stages import Trial, tofu

FEW = [
    Trial(Setting("steps-2", "fewer_steps", {"steps": 2}), 4),
    Trial(tofu("tofu-0.5", method="tofu", ratio=0.5), 4),
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(study, "FIRST_STEPS", 4)


@pytest.mark.parametrize("model", study.SECOND)
def test_the_second_pass_redraws_the_first(model):
    made = study.Redrawn(run.load(model), ["a cat", "a red apple"], 128, 2)
    redrawn, saving = made.pictures(Trial(UNREDUCED, 4))
    assert redrawn.shape == (2, 3, 128, 128) and saving == 1
    first = np.stack([np.asarray(each) for each in made.first]).transpose(0, 3, 1, 2)
    # Closer to its own first picture than to the other.
    apart = np.abs(redrawn.numpy()[:, None].astype(float) - first[None]).mean((2, 3, 4))
    assert apart[0, 0] < apart[0, 1] and apart[1, 1] < apart[1, 0]


def test_rows_say_both_sides_and_are_added_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "trials", lambda model: FEW)
    out = tmp_path / "rows.jsonl"
    command = ["--model", "unet", "-n", "2", "--side", "32", "--out", str(out)]
    study.main(command)
    study.main(command)
    fewer, half = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert fewer["id"] == "unet-4steps-n2-from32px/steps-2" and fewer["sides"] == [32, 128]
    assert fewer["flops_ratio"] == 2.0 and 1.5 < half["flops_ratio"] < 1.7


@pytest.mark.parametrize("model", study.SECOND)
def test_counts_of_steps_run_exactly_half(model):
    names = [each.setting for each in study.trials(model)]
    counts = [each.options["steps"] for each in names if each.kind == "fewer_steps"]
    assert counts == [22, 20, 18, 16, 14, 12, 10, 8]
    assert len({each.name for each in names}) == len(names)
