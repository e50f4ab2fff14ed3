"""eval.bench.stacking: each alone and both together do what they say, and rows add up."""

import json

import pytest
import torch

from eval.__main__ import main
from eval.bench import stacking
from eval.bench.models import SUITES
from eval.bench.stacking import STEPS, partners, stacked
from eval.jsonl import read

CPU = torch.device("cpu")
FLUX, UNET = SUITES["tiny"]


def built(case):
    return case, case.build(CPU, torch.float32), case.inputs(CPU, torch.float32)


def test_each_denoiser_has_the_partners_that_serve_it(monkeypatch, capsys):
    monkeypatch.setattr(stacking.importlib.util, "find_spec", lambda name: name)
    assert partners(FLUX, CPU) == ["first_block_cache", "int8"]
    assert partners(UNET, torch.device("cuda")) == ["deepcache", "compile", "int8"]
    assert not capsys.readouterr().out
    monkeypatch.setattr(stacking.importlib.util, "find_spec", lambda name: None)
    assert partners(FLUX, CPU) == ["first_block_cache"] and partners(UNET, CPU) == []
    assert partners(UNET, torch.device("cuda")) == ["compile"]
    assert "SD-tiny-64x64: no deepcache, as DeepCache is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(("case", "partner"), [(FLUX, "first_block_cache"), (UNET, "deepcache")])
def test_a_cache_reuses_at_every_second_step(case, partner):
    row = stacked(*built(case), partner, 1)
    assert row["computed_steps"] == {"partner": STEPS // 2, "both": STEPS // 2}


def test_a_threshold_that_fits_none_is_an_error(monkeypatch):
    monkeypatch.setattr(stacking, "THRESHOLDS", (1e-9, 1e9))
    with pytest.raises(RuntimeError, match=r"no threshold of .* reuses at every second step"):
        stacked(*built(FLUX), "first_block_cache", 1)


def test_a_row_is_the_quotients_of_turns(monkeypatch):
    case, model, inputs = built(FLUX)
    monkeypatch.setattr(stacking, "fitting_threshold", lambda *case: 0.5)
    monkeypatch.setattr(stacking, "computed_steps", lambda *lane: 6)
    times = iter([*[0.0] * 4, *[8.0, 4.0, 2.0, 1.0], *[16.0, 8.0, 4.0, 1.0]])
    generate = stacking.Lane.generate

    def told(self):
        prediction, _ = generate(self)
        return prediction, next(times)

    monkeypatch.setattr(stacking.Lane, "generate", told)
    row = stacked(case, model, inputs, "first_block_cache", 2)
    assert {name: each["value"] for name, each in row["speed"].items()} == {
        "tofu": 2.0,
        "partner": 4.0,
        "both": 12.0,
    }
    assert row["share_of_product"]["value"] == 1.5 and row["plain_ms"] == 12.0


def test_what_changes_nothing_is_an_error(monkeypatch):
    case, model, inputs = built(FLUX)
    monkeypatch.setattr(stacking, "TOFU", stacking.Cell("tofu", 0.0, "block", "dropped", "tome"))
    with pytest.raises(RuntimeError, match="does not differ from plain"):
        stacked(case, model, inputs, "first_block_cache", 1)


def test_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stacking, "partners", lambda case, device: ["deepcache"] * (case is UNET))
    out = tmp_path / "rows.jsonl"
    words = ["stacking", "--suite", "tiny", "--rounds", "1", "--out", str(out)]
    main(words)
    (row,) = read(out)
    assert row["id"] == "SD-tiny-64x64/deepcache" and row["tofu"] == stacking.TOFU.options()
    whole = out.read_bytes()
    out.write_bytes(whole + json.dumps(row).encode()[:40])
    main(words)
    assert out.read_bytes() == whole
    assert stacking.measure("tiny", tmp_path / "other.jsonl", 1, until=0.0) is None
    with pytest.raises(SystemExit):
        main([*words, "--rounds", "0"])
    assert "rounds 0 is below 1" in capsys.readouterr().err
