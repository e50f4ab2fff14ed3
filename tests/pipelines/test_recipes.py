"""Each recipe runs on a saved tiny pipeline, and says what is wrong with anything else."""

import io
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from PIL import Image, ImageChops
from sentencepiece import SentencePieceTrainer

from pipelines import (
    cogvideox,
    flux,
    flux2,
    hunyuan_video15,
    ltx2,
    pixart,
    sd3,
    sd15,
    sdxl,
    wan,
    z_image,
)
from pipelines.recipe import Recipe, run
from tests.tiny import (
    tiny_cogvideox,
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan_video15,
    tiny_ltx2,
    tiny_pixart,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_wan,
    tiny_z_image,
)
from tofu_diffusers import FAMILIES

RECIPES = {
    "sd15": (sd15.RECIPE, tiny_sd),
    "sdxl": (sdxl.RECIPE, tiny_sdxl),
    "sd3": (sd3.RECIPE, tiny_sd3),
    "flux": (flux.RECIPE, tiny_flux),
    "pixart": (pixart.RECIPE, tiny_pixart),
    "wan": (wan.RECIPE, tiny_wan),
    "z_image": (z_image.RECIPE, tiny_z_image),
    "cogvideox": (cogvideox.RECIPE, tiny_cogvideox),
    "flux2": (flux2.RECIPE, tiny_flux2),
    "hunyuan_video15": (hunyuan_video15.RECIPE, tiny_hunyuan_video15),
    "ltx2": (ltx2.RECIPE, tiny_ltx2),
}
every_recipe = pytest.mark.parametrize(("recipe", "build"), RECIPES.values(), ids=RECIPES)


@pytest.fixture
def on_cpu(monkeypatch):
    """Keep the tiny models where their half precision is not in question."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def command(model: Path, out: Path, *more: str) -> list[str]:
    argv = ["--model", str(model), "--prompt", "a cat", "--steps", "2", "--out", str(out)]
    return [*argv, "--height", "128", "--width", "96", "--ratio", "0.25", *more]


def refusal(capsys: pytest.CaptureFixture[str], recipe: Recipe, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run(recipe, argv)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def refused_unloaded(capsys: pytest.CaptureFixture[str], recipe: Recipe, *argv: str) -> str:
    """The refusal of a command whose model cannot be had either: nobody asked for it yet."""
    message = refusal(capsys, recipe, "--model", "nobody/no-such-model", *argv)
    assert "cannot load" not in message
    return message


@every_recipe
def test_generates_and_reports(recipe, build, tmp_path, capsys, on_cpu):
    build().save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / ("video.gif" if recipe.video else "image.png")
    frames = 1 + recipe.video.step if recipe.video else 1
    argv = command(tmp_path / "model", out, *(["--frames", str(frames)] if recipe.video else []))
    assert run(recipe, argv) == 0
    with Image.open(out) as picture:
        assert picture.size == (96, 128)
        assert getattr(picture, "n_frames", 1) == frames
    printed = capsys.readouterr().out
    assert "ratio 0.25" in printed
    assert "FLOPs" in printed
    assert f"{out}: {f'{frames} frames of ' if recipe.video else ''}96 x 128 pixels" in printed

    chosen = ["--method", "tome", "--merge", "prune", "--scope", "span", "--unmerge", "temporal"]
    assert run(recipe, [*argv, *chosen, "--keys-values", "cached"]) == 0
    printed = capsys.readouterr().out
    for word in ("tome", "prune", "span", "temporal", "cached"):
        assert word in printed


@every_recipe
def test_a_speedup_skips_steps(recipe, build, tmp_path, capsys, on_cpu):
    build().save_pretrained(tmp_path / "model")
    out = tmp_path / ("video.gif" if recipe.video else "image.png")
    argv = ["--model", str(tmp_path / "model"), "--prompt", "a cat", "--steps", "8"]
    argv += ["--height", "128", "--width", "96", "--out", str(out), "--speedup", "1.6"]
    frames = ["--frames", str(1 + recipe.video.step)] if recipe.video else []
    assert run(recipe, [*argv, *frames]) == 0
    with Image.open(out) as picture:
        assert picture.size == (96, 128)
    printed = capsys.readouterr().out
    assert "computed 5 of 8 steps" in printed and "StepSkipping: speedup 1.6" in printed
    assert "37.5 % saved (1.60x)" in printed


def test_half_of_the_tokens_go_unless_told_otherwise(tmp_path, capsys, on_cpu):
    tiny_sd().save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--steps", "2", "--out", str(tmp_path / "a.png")]
    assert run(sd15.RECIPE, argv) == 0
    assert "TokenReduction: ratio 0.5" in capsys.readouterr().out


def test_the_seed_makes_the_picture(tmp_path, on_cpu):
    tiny_pixart().save_pretrained(tmp_path / "model")
    pictures = []
    for seed in ("0", "0", "1"):
        assert (
            run(pixart.RECIPE, command(tmp_path / "model", tmp_path / "a.png", "--seed", seed)) == 0
        )
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_pixart_reads_a_tokenizer_of_sentencepiece(tmp_path, on_cpu):
    """As its repositories have it: without the tokenizer.json that saving a pipeline writes."""
    model = tmp_path / "model"
    tiny_pixart().save_pretrained(model)
    (model / "tokenizer" / "tokenizer.json").unlink()
    pieces = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat", "two dogs in the snow", "a red apple on a plate"] * 9),
        model_writer=pieces,
        vocab_size=24,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (model / "tokenizer" / "spiece.model").write_bytes(pieces.getvalue())
    assert run(pixart.RECIPE, command(model, tmp_path / "image.png")) == 0
    assert (tmp_path / "image.png").exists()


def test_pixart_alpha_computes_the_size_asked_for(tmp_path, capsys, on_cpu):
    """Not the nearest size of its training, which it would scale down in the end."""
    PixArtAlphaPipeline(**tiny_pixart().components).save_pretrained(tmp_path / "model")
    assert (
        run(pixart.RECIPE, command(tmp_path / "model", tmp_path / "image.jpg", "--scope", "block"))
        == 0
    )
    with Image.open(tmp_path / "image.jpg") as picture:
        assert picture.size == (96, 128)
    rows = re.findall(r"^transformer_blocks\..*", capsys.readouterr().out, flags=re.MULTILINE)
    assert {int(row.split()[5]) for row in rows} == {128 // 16 * 96 // 16}


def test_wan_with_two_denoisers(tmp_path, capsys, on_cpu):
    tiny_wan(two=True).save_pretrained(tmp_path / "model")
    out = tmp_path / "video.webp"
    argv = command(tmp_path / "model", out, "--frames", "5", "--method", "tome", "--steps", "4")
    assert run(wan.RECIPE, argv) == 0
    with Image.open(out) as video:
        assert (video.size, video.n_frames) == ((96, 128), 5)
    rows = re.findall(r"^\S*blocks\.0.*", capsys.readouterr().out, flags=re.MULTILINE)
    calls = [int(row.split()[4]) for row in rows]
    assert len(calls) == 2, "one first block for each denoiser"
    assert sum(calls) == 4 * 2, "steps and conditions"
    assert min(calls) > 0


def test_wan_writes_an_mp4(tmp_path, monkeypatch, on_cpu):
    """Whether or not the packages are here: what the file is made of, and at what pace."""
    written = []
    monkeypatch.setattr("pipelines.recipe.find_spec", lambda name: name)
    monkeypatch.setattr(
        "pipelines.recipe.export_to_video",
        lambda frames, path, fps: written.append(([frame.size for frame in frames], path, fps)),
    )
    tiny_wan().save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / "video.mp4"
    assert run(wan.RECIPE, command(tmp_path / "model", out, "--frames", "5")) == 0
    assert written == [([(96, 128)] * 5, str(out), 16)]
    assert out.parent.is_dir()


def test_an_mp4_needs_packages(capsys, monkeypatch):
    monkeypatch.setattr(
        "pipelines.recipe.find_spec", lambda name: None if name == "imageio_ffmpeg" else name
    )
    message = refused_unloaded(capsys, wan.RECIPE, "--out", "cat.mp4")
    assert "pip install imageio-ffmpeg`" in message
    assert ".gif" in message


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_offload_changes_nothing_but_the_place(name, tmp_path, monkeypatch):
    """The CPU stands in for the GPU: the hooks are accelerate's own."""
    recipe, build = RECIPES[name]
    build().save_pretrained(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        argv = command(tmp_path / "model", tmp_path / "plain.png", "--method", "tome")
        assert run(recipe, argv) == 0
    offload, offloaded = DiffusionPipeline.enable_model_cpu_offload, []

    def to_cpu(pipe, **_):  # diffusers calls it again after each generation
        offload(pipe, device="cpu")
        offloaded.append(pipe)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", to_cpu)
    argv = command(tmp_path / "model", tmp_path / "offloaded.png", "--method", "tome")
    assert run(replace(recipe, gpu_dtype=torch.float32), [*argv, "--offload"]) == 0
    assert len(offloaded) == 2
    plain, moved = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "offloaded"))
    # Moved weights are aligned otherwise in memory than mapped ones, and may round otherwise.
    assert max(high for _, high in ImageChops.difference(plain, moved).getextrema()) <= 1


def test_offload_without_a_gpu(capsys, on_cpu):
    assert "torch sees none here" in refused_unloaded(capsys, flux.RECIPE, "--offload")


def test_a_gpu_that_is_too_small(tmp_path, capsys, monkeypatch, on_cpu):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    tiny_sd().save_pretrained(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "to", full)
    assert "add --offload" in refusal(capsys, sd15.RECIPE, "--model", str(tmp_path))


@pytest.mark.parametrize("name", RECIPES)
def test_help_is_a_command_with_its_options(name, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, f"pipelines.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module(f"pipelines.{name}", run_name="__main__")
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    recipe, _ = RECIPES[name]
    assert f"python -m pipelines.{name} --prompt" in printed
    assert recipe.model in "".join(printed.split())
    for option in (
        "--ratio",
        "--speedup",
        "--method",
        "--merge",
        "--unmerge",
        "--scope",
        "--keys-values",
    ):
        assert option in printed
    for option in ("--height", "--steps", "--offload", "--out"):
        assert option in printed
    assert ("--frames" in printed) == (recipe.video is not None)


def test_a_folder_that_is_no_pipeline(tmp_path, capsys):
    assert "holds no model_index.json" in refusal(capsys, sd15.RECIPE, "--model", str(tmp_path))


def test_a_name_that_cannot_be_had(capsys):
    message = refusal(capsys, sd15.RECIPE, "--model", "nobody/no-such-model")
    assert "cannot load nobody/no-such-model" in message


@every_recipe
def test_the_pipeline_of_another_recipe(recipe, build, tmp_path, capsys):
    """The index is enough to tell: nothing else of the folder is there."""
    index = {"_class_name": "StableDiffusionInpaintPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = refusal(capsys, recipe, "--model", str(tmp_path))
    assert "it holds a StableDiffusionInpaintPipeline" in message
    for pipeline in recipe.pipelines:
        assert pipeline.__name__ in message


@every_recipe
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ratio", "1.5"], "ratio 1.5 is outside"),
        (["--speedup", "0.5"], "speedup 0.5 is below 1"),
        (["--speedup", "2", "--ratio", "0.5"], "--ratio: not allowed with argument --speedup"),
        (["--speedup", "2", "--keys-values", "fresh"], "--keys-values is of token reduction"),
        (["--method", "tomme"], "did you mean 'tome'"),
        (["--ratio", "0.9", "--method", "tome"], "exceeds 0.75"),
        (
            ["--scope", "span"],
            "use scope 'block', or keys_values 'cached'",
        ),  # the profile's is fresh
        (["--height", "100"], "choose 96 or 1"),
        (["--width", "0"], "0 is below"),
        (["--steps", "0"], "0 is below 1"),
        (["--steps", "many"], "invalid number value: 'many'"),
        (["--out", "tofu.txt"], "ends in .txt; choose"),
        (["--out", "tofu"], "ends in no type; choose"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_before_anything_is_loaded(recipe, build, argv, words, capsys):
    if "span" in argv and "fresh" in FAMILIES[recipe.family].keys_values_refused:
        argv = [*argv, "--keys-values", "fresh"]
    assert words in refused_unloaded(capsys, recipe, *argv)


def test_a_number_of_frames_that_wan_cannot_make(capsys):
    assert "choose 77 or 81" in refused_unloaded(capsys, wan.RECIPE, "--frames", "80")


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    for out in (tmp_path / "file" / "new" / "tofu.png", tmp_path / "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        message = refused_unloaded(capsys, sd15.RECIPE, "--out", str(out))
        assert f"--out {out} cannot be written" in message


def test_a_refusal_touches_nothing(tmp_path, capsys):
    old = tmp_path / "old.png"
    old.write_text("here first")
    for out in (old, tmp_path / "new" / "tofu.png"):
        refusal(capsys, sd15.RECIPE, "--model", str(tmp_path / "none"), "--out", str(out))
        refused_unloaded(capsys, sd15.RECIPE, "--ratio", "1.5", "--out", str(out))
    assert old.read_text() == "here first"
    assert list(tmp_path.iterdir()) == [old]
