"""Each recipe runs on a saved tiny pipeline, and says what is wrong with anything else."""

from types import ModuleType

import pytest
from PIL import Image

from pipelines import sd3, sd15, sdxl
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl

RECIPES = {"sd15": (sd15, tiny_sd), "sdxl": (sdxl, tiny_sdxl), "sd3": (sd3, tiny_sd3)}
every_recipe = pytest.mark.parametrize(("recipe", "build"), RECIPES.values(), ids=RECIPES)


@pytest.fixture
def on_cpu(monkeypatch):
    """Keep the tiny models where their half precision is not in question."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def refused(recipe: ModuleType, *argv: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        recipe.main(argv)
    assert exit_info.value.code == 2


@every_recipe
def test_generates_and_reports(recipe, build, tmp_path, capsys, on_cpu):
    build().save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / "image.png"
    argv = ["--model", str(tmp_path / "model"), "--prompt", "a cat", "--steps", "2"]
    argv += ["--height", "128", "--width", "96", "--ratio", "0.25", "--out", str(out)]
    assert recipe.main(argv) == 0
    assert Image.open(out).size == (96, 128)
    printed = capsys.readouterr().out
    assert "ratio 0.25" in printed
    assert "FLOPs" in printed
    assert str(out) in printed

    whole = out.read_bytes()  # the default profile computes the first two steps whole
    chosen = ["--method", "tome", "--fold", "prune", "--scope", "span", "--restore", "temporal"]
    assert recipe.main([*argv, *chosen, "--context", "cached"]) == 0
    printed = capsys.readouterr().out
    for word in ("tome", "prune", "span", "temporal", "cached"):
        assert word in printed
    assert recipe.main([*argv, "--seed", "1"]) == 0
    assert out.read_bytes() != whole


def test_a_folder_that_is_no_pipeline(tmp_path, capsys):
    refused(sd15, "--model", str(tmp_path))
    assert "holds no model_index.json" in capsys.readouterr().err


def test_a_name_that_cannot_be_had(capsys):
    refused(sd15, "--model", "nobody/no-such-model")
    assert "cannot load nobody/no-such-model" in capsys.readouterr().err


def test_the_pipeline_of_another_recipe(tmp_path, capsys):
    tiny_sd().save_pretrained(tmp_path)
    refused(sdxl, "--model", str(tmp_path))
    assert "it holds a StableDiffusionPipeline" in capsys.readouterr().err


def test_bad_options(tmp_path, capsys, on_cpu):
    tiny_sd().save_pretrained(tmp_path)
    refused(sd15, "--model", str(tmp_path), "--ratio", "1.5")
    assert "1.5" in capsys.readouterr().err
    refused(sd15, "--model", str(tmp_path), "--method", "tomme")
    assert "tome" in capsys.readouterr().err
