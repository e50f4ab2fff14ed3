"""eval.quick: its arithmetic, its rows, and that the README's tables are those of the committed results."""

import json

import numpy as np
import pytest

from eval import quick
from pipelines.emoji import MODELS
from tests import tiny


def test_psnr_of_known_differences():
    black, grey = np.zeros((2, 4, 4, 3)), np.full((2, 4, 4, 3), 0.1)
    assert quick.psnr(grey, black) == pytest.approx([20.0, 20.0])
    assert quick.psnr(black, black) == pytest.approx([120.0, 120.0])


def test_every_setting_gets_a_row(monkeypatch):
    monkeypatch.setattr(quick, "load_pipeline", lambda model: tiny.tiny_sd())
    monkeypatch.setattr(
        quick, "SETTINGS", {name: quick.SETTINGS[name] for name in ("default profile", "tome")}
    )
    bench = quick.Bench("tiny", steps=10, guidance=4.0, seed=0, size=2)
    rows = quick.measure(bench, ratio=0.5, rounds=1, say=lambda text: None)
    by_name = {row["name"]: row for row in rows}
    assert list(by_name)[:2] == ["default profile", "tome"]
    for name in ("default profile", "tome"):
        assert by_name[name]["flops_ratio"] > 1 and by_name[name]["time_ratio"] > 0
        assert len(by_name[name]["psnr_db"]) == 2
    fewer = [row for row in rows if "instead of 10" in row["name"]]
    assert fewer and all(row["flops_ratio"] > 1 for row in fewer)
    # Reuse of each token's own update beats merging, also on random weights.
    assert np.mean(by_name["default profile"]["psnr_db"]) > np.mean(by_name["tome"]["psnr_db"])


def test_the_steps_of_a_transformer_are_timed_too(monkeypatch):
    monkeypatch.setattr(quick, "load_pipeline", lambda model: tiny.tiny_sd3(sample_size=8))
    bench = quick.Bench("tiny", steps=3, guidance=4.0, seed=0, size=2)
    pictures, spent = bench.run()
    assert len(pictures) == 2
    assert len(bench.times_ms) == 3 and sum(bench.times_ms) == spent > 0


def test_the_readme_shows_the_committed_results():
    assert quick.tables() in quick.README.read_text(encoding="utf-8")
    for model, path in quick.RESULTS.items():
        if model == "unet" or path.exists():
            result = json.loads(path.read_text())
            assert result["setting"]["model"] == model
            assert result["setting"]["n"] == len(result["rows"][0]["psnr_db"])


def test_every_embedded_model_has_a_place_for_its_result():
    assert set(quick.RESULTS) == set(MODELS)
