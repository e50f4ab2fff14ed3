"""eval.studies.encoders: every setting at the same FLOPs saved, by counted calls; rows and their tables."""

import json

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from eval.report import tables_encoders
from eval.statistics import of_mean, of_rank_correlation
from eval.studies.encoders import study, subjects
from tests.tiny_encoders import arguments, build
from tofu_diffusers import EncoderReduction


class Vectors(nn.Module):
    """The first output of a model alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **given):
        return self.model(**given)[0]


@pytest.fixture(scope="module")
def subject():
    model = build("vit")
    pixels = arguments("vit", model)["pixel_values"]
    model = Vectors(model).eval()
    inputs = [{"pixel_values": pixels + 0.1 * i} for i in range(2)]
    whole = torch.cat([model(**given) for given in inputs]).detach()

    def score(out):
        return {"accuracy": (out.argmax(1) == whole.argmax(1)).float(), "R@1": (out - whole)[:, 0]}

    tuning = [{"pixel_values": each[None]} for each in pixels]
    return subjects.Subject("vit", model, "0" * 16, inputs, tuning, score)


def test_every_setting_is_measured_and_what_is_done_is_not(subject, tmp_path, monkeypatch):
    names = [name for name, *_ in study.settings(subject, tmp_path / "all.safetensors")]
    assert {*names} == {*tables_encoders.NAMES} and len(names) == len({*names})
    chosen = ("policy-tome", {"method": "tome", "merge": "mean"}, True)
    monkeypatch.setattr(study, "settings", lambda *_: iter([chosen]))
    found = [*study.rows(subject, set(), tmp_path / "probes.safetensors", (0.3,), rounds=1)]
    found = [json.loads(json.dumps(row)) for row in found]
    whole, row = found
    assert [whole["id"], row["id"]] == ["vit/unreduced", "vit/policy-tome-30"]
    assert whole["flops_saved"] == 0 and whole["metrics"]["accuracy"]["value"] == 1
    assert row["flops_saved"] >= 0.3 and row["speed"]["value"] > 0
    assert len(row["scores"]["accuracy"]) == row["n"] == 4
    assert {"device", "threads", "versions", "commit"} <= {*row}
    config = EncoderReduction(**row["setting"]["options"])
    assert study.saving(subject, config) == pytest.approx(row["flops_saved"], abs=1e-4)
    # The ratio is the least that saves so much.
    assert study.saving(subject, config.replace(ratio=config.ratio - 0.01)) < 0.3
    done = {whole["id"], row["id"]}
    assert not [*study.rows(subject, done, tmp_path / "probes.safetensors", (0.3,))]


def test_texts_of_as_many_tokens_are_called_together():
    rows = [[1, 2], [1], [3, 4], [2], [1, 2, 3], [5, 6]]
    groups = subjects.by_length(rows, batch=2)
    assert groups == [[1, 3], [0, 2], [5], [4]]


def test_what_is_found_first():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.2, 0.3, 0.1]])
    right = torch.tensor([0, 2, 2])
    assert subjects.found_first(scores, right, 1).tolist() == [1, 0, 0]
    assert subjects.found_first(scores, right, 2).tolist() == [1, 1, 0]


def test_pairs_are_sentences_of_many_tokens():
    lines = subjects.PAIRS.read_text(encoding="utf-8").splitlines()
    found = [line.split(" | ") for line in lines if not line.startswith("#")]
    assert len(found) == 60 and all(len(pair) == 2 for pair in found)
    assert min(len(text.split()) for pair in found for text in pair) >= 10 - 1


def test_a_rank_correlation_is_spearmans_with_an_interval():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(40, generator=draw)
    b = a + torch.randn(40, generator=draw)
    found = of_rank_correlation(a, b)
    assert found.value == pytest.approx(spearmanr(a, b).statistic)
    entry = found.entry()
    assert -1 <= entry["low"] < entry["value"] < entry["high"] <= 1 and entry["n"] == 40
    with pytest.raises(ValueError, match="3 items or more, not 2"):
        of_rank_correlation(a[:2], b[:2])


def test_the_tables_say_what_the_rows_say(subject, tmp_path, monkeypatch):
    whole = study.row_of(subject, "unreduced", 0.0, None, study.provenance())
    path = tmp_path / "encoders.jsonl"
    made = [whole]
    for name in tables_encoders.NAMES:
        for saved in tables_encoders.SAVED:
            scores = [0, 1, 1, int(name != "tome-mean")]
            metrics = {"accuracy": of_mean(scores).entry()}
            speed = {"value": 1.5, "low": 1.25, "high": 2.0}
            row = {**whole, "id": f"vit/{name}-{saved}", "speed": speed, "metrics": metrics}
            made.append({**row, "scores": {"accuracy": scores}})
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr(tables_encoders, "ENCODERS", path)
    table = tables_encoders.encoders_table("vit")
    assert "Unreduced: accuracy 1.000" in table and "n = 4" in table
    (line,) = [each for each in table.splitlines() if each.startswith("| ToMe, mean | ")]
    assert line.count("0.500 (") == 3 and line.count("; 1.50x (1.25 to 2.00) <!-- row: ") == 3
    ahead = tables_encoders.ahead_of("vit")
    assert "| ToFu by depth, 20 % <!-- row: encoders.jsonl#vit/tofu-depth-20 -->" in ahead
    assert ahead.count("\n") == 1 + len(tables_encoders.CLAIMED) * 3


def test_a_subject_of_numbers_in_pairs_is_ranked(subject):
    scores = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    found = subject.metrics({"similarity": scores})["similarity"]["value"]
    assert found == pytest.approx(spearmanr(*scores.T).statistic)
