"""eval.generate.run: a run is the same however it is made, and stopped anywhere it goes on.

With what it is made of: its manifest and its prompts.
"""

import argparse
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from tqdm import tqdm

from eval.files import write_whole
from eval.generate import run as module
from eval.generate.manifest import Manifest, differences, image_path
from eval.generate.prompts import MOST_CHARACTERS, first, load_prompts
from eval.generate.run import Loaded, add_arguments, generate, load, main
from eval.generate.settings import Setting
from eval.provenance import commit, provenance
from pipelines.emoji import weights_hash
from pipelines.emoji.captions import COLOURS
from tests import tiny

# With random weights it does not matter how little is left to save.
pytestmark = pytest.mark.filterwarnings("ignore:.*little is left to save")

PROMPTS = ["a red apple", "two dogs", "a tree", "a blue car", "a cat"]
CALL = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 48, "width": 64}
UNREDUCED = Setting("unreduced")
# With caches that outlive a step: they must not outlive a batch.
TOFU = Setting(
    "half", "tofu", {"ratio": 0.5, "unmerge": "taylor", "warmup_steps": 1, "cooldown_steps": 0}
)


@pytest.fixture(autouse=True)
def no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's thread might hold its lock at the moment of a fork."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """accelerate looks at a process once; what this test makes it see must not last."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.small_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Loaded:
    return load(str(saved), device="cpu")


@pytest.fixture(scope="module")
def unbroken(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "half"
    make(loaded, out)
    return out


def make(source: str | Loaded, out: Path, **changes: Any) -> Manifest:
    """Five images in batches of two: the last batch is smaller."""
    options = {"setting": TOFU, "prompts": PROMPTS, "seed": 7, "batch_size": 2, "call": CALL}
    return generate(source, out=out, device="cpu", **(options | changes))


def images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}


def snapshot(out: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def forked(work: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """A process of its own that needs no imports again; pytest runs with one thread."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "pipeline": {"name": "tiny", "class": "StableDiffusionPipeline", "weights": "0" * 16},
        "setting": TOFU.to_dict(),
        "call": CALL,
        "prompts": tuple(PROMPTS),
        "seeds": tuple(range(5)),
        "batch_size": 2,
        "dtype": "float32",
        **provenance(),
    }
    return Manifest(**(values | changes))


# A run


def test_each_image_is_that_of_its_prompt_and_seed(saved, unbroken):
    assert sorted(images(unbroken)) == [f"{index:05d}.png" for index in range(5)]
    stored = Manifest.load(unbroken)
    assert stored.prompts == tuple(PROMPTS) and stored.seeds == (7, 8, 9, 10, 11)
    assert stored.call == CALL and stored.setting == TOFU.to_dict() and len(stored) == 5
    pipe = DiffusionPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    with TOFU.applied(pipe):
        for batch in ([0, 1], [2, 3], [4]):
            expected = pipe(
                [PROMPTS[index] for index in batch],
                generator=[torch.Generator().manual_seed(7 + index) for index in batch],
                **CALL,
            ).images
            for index, image in zip(batch, expected, strict=True):
                with Image.open(image_path(unbroken, index)) as found:
                    assert found.size == (64, 48)
                    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


def test_an_image_depends_on_its_batch_by_rounding_only(loaded, tmp_path):
    make(loaded, tmp_path / "alone", batch_size=1, setting=UNREDUCED)
    make(loaded, tmp_path / "together", batch_size=5, setting=UNREDUCED)
    for index in range(5):
        with (
            Image.open(image_path(tmp_path / "alone", index)) as alone,
            Image.open(image_path(tmp_path / "together", index)) as together,
        ):
            np.testing.assert_allclose(np.asarray(alone, int), np.asarray(together, int), atol=2)


def test_a_setting_replaces_arguments_of_the_call(loaded, tmp_path):
    fewer = Setting("fewer", "fewer_steps", {"steps": 3})
    stored = make(loaded, tmp_path / "fewer", setting=fewer, prompts=PROMPTS[:2])
    make(loaded, tmp_path / "three", setting=UNREDUCED, prompts=PROMPTS[:2],
         call=CALL | {"num_inference_steps": 3})  # fmt: skip
    assert images(tmp_path / "fewer") == images(tmp_path / "three")
    assert stored.call["num_inference_steps"] == 5  # as asked for; the setting says the rest


# Stopped and continued


def test_a_batch_that_lacks_an_image_is_made_again_whole(loaded, unbroken, tmp_path):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    image_path(out, 3).unlink()
    Image.new("RGB", (64, 48)).save(image_path(out, 2))  # of the same batch
    (out / "images" / ".00003.png.tmp").write_bytes(b"half")
    (out / ".manifest.json.tmp").write_bytes(b"half")
    before = snapshot(out)
    make(loaded, out)
    assert images(out) == images(unbroken)
    after = snapshot(out)
    for index in (0, 1, 4):
        assert after[str(image_path(out, index))] == before[str(image_path(out, index))]
    assert not [name for name in after if name.endswith(".tmp")]


def test_nothing_of_a_setting_or_generator_is_carried_from_batch_to_batch(loaded, tmp_path):
    merged = Setting("merged", "tomesd", {"ratio": 0.5})  # draws from the global generator
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make(loaded, tmp_path, setting=merged)
    assert torch.equal(torch.get_rng_state(), before)
    whole = images(tmp_path)
    image_path(tmp_path, 2).unlink()
    torch.manual_seed(2)
    make(loaded, tmp_path, setting=merged)
    assert images(tmp_path) == whole


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_an_unreadable_image_is_named_and_made_again(loaded, unbroken, tmp_path, damage):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    path = image_path(out, 4)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: {"empty": 0, "cut": len(data) // 2, "flipped": len(data)}[damage]])
    with pytest.warns(UserWarning, match=r"00004\.png cannot be read .* made again"):
        make(loaded, out)
    assert images(out) == images(unbroken)


def test_every_kind_of_damage_is_noticed(unbroken, tmp_path):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    whole, rng = image_path(out, 0).read_bytes(), random.Random(0)
    for turn in range(80):
        data = bytearray(whole)
        place = rng.randrange(len(data) - 12)  # the last 12 bytes hold no pixels
        if turn % 2:
            data[place] ^= 1 << rng.randrange(8)
        else:
            del data[place:]
        image_path(out, 0).write_bytes(data)
        with pytest.warns(UserWarning, match=r"00000\.png cannot be read"):
            module._remove_unreadable(out, manifest())
        assert not image_path(out, 0).exists()


def _killed(source: Loaded, out: Path, moment: int) -> None:
    """Runs until the moment-th time that something is written, flushed or renamed."""
    left, replace = moment, os.replace

    def pass_moment() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        if left == 1:  # only half of it reached the file
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        pass_moment()

    def rename(*paths: Any) -> None:
        pass_moment()
        replace(*paths)
        pass_moment()

    os.fsync, os.replace = fsync, rename
    make(source, out)


def test_killed_at_any_moment_it_goes_on(loaded, unbroken, tmp_path):
    out, rng, kills = tmp_path / "run", random.Random(1), 0
    # First before anything, amid the manifest and just before the first image; then anywhere.
    moments = iter([1, 2, 3, 4])
    while True:
        process = forked(_killed, loaded, out, next(moments, None) or rng.randrange(1, 8))
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        kills += 1
        assert kills < 40
        for path in (out / "images").glob("[0-9]*"):
            assert path.read_bytes() == images(unbroken)[path.name]
    assert kills > 6
    assert images(out) == images(unbroken)
    assert Manifest.load(out) == Manifest.load(unbroken)


@pytest.mark.parametrize("count", [3, 4])
def test_more_prompts_are_made_behind_those_that_are_there(loaded, unbroken, tmp_path, count):
    out = tmp_path / "run"
    make(loaded, out, prompts=PROMPTS[:count])
    before = snapshot(out)
    make(loaded, out)
    assert images(out) == images(unbroken)
    assert Manifest.load(out) == Manifest.load(unbroken)
    # Whole batches stay as they are; one that had fewer images is made again.
    kept = {name for name, then in snapshot(out).items() if before.get(name) == then}
    assert len(kept) == count // 2 * 2


def test_a_full_disk_leaves_what_was_written(loaded, unbroken, tmp_path, monkeypatch):
    out, calls = tmp_path / "run", iter(range(100))

    def fsync(_: int) -> None:
        if next(calls) == 4:  # the manifest, three images, and no more
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"no space left to write .*00003\.png.*same command"):
            make(loaded, out)
    assert images(out) == {name: data for name, data in images(unbroken).items() if name < "00003"}
    make(loaded, out)
    assert images(out) == images(unbroken)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": PROMPTS[:4]}, ["prompts: 5 here, 4 asked for", "seeds: 5 here, 4 asked for"]),
        (
            {"prompts": [*PROMPTS[:3], "a pig", "a cow"]},
            ["prompts[3] (and 1 more): 'a blue car' here, 'a pig' asked for"],
        ),
        ({"seed": 8}, ["seeds[0] (and 4 more): 7 here, 8 asked for"]),
        (
            {"setting": Setting("half", "tofu", TOFU.options | {"ratio": 0.4})},
            ["setting.options.ratio: 0.5 here, 0.4 asked for"],
        ),
        (
            {"call": CALL | {"num_inference_steps": 3, "eta": 0.5}},
            [
                "call.num_inference_steps: 5 here, 3 asked for",
                "call.eta: nothing here, 0.5 asked for",
            ],
        ),
        ({"batch_size": 3}, ["batch_size: 2 here, 3 asked for"]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_and_nothing_touched(loaded, unbroken, changes, told):
    before = snapshot(unbroken)
    with pytest.raises(ValueError, match="holds another run") as error:
        make(loaded, unbroken, **changes)
    assert str(error.value).split("\n")[1:-1] == ["  " + line for line in told]
    assert "choose another folder" in str(error.value)
    assert snapshot(unbroken) == before


def test_other_weights_precision_or_sampler_are_another_run(loaded, unbroken):
    other = tiny.small_sd()
    other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
    spaced = tiny.small_sd()
    spaced.scheduler = DDIMScheduler.from_config(
        spaced.scheduler.config, timestep_spacing="trailing"
    )
    for change, told in (
        ({"weights": "f" * 16}, f"pipeline.weights: '{loaded.weights}' here, '{'f' * 16}' asked"),
        ({"dtype": "float16"}, "dtype: 'float32' here, 'float16' asked for"),
        ({"pipe": other}, "scheduler.class: 'DDIMScheduler' here, 'EulerDiscreteScheduler' asked"),
        ({"pipe": spaced}, "timestep_spacing: 'leading' here, 'trailing' asked for"),
    ):
        with pytest.raises(ValueError, match="holds another run") as error:
            make(dataclasses.replace(loaded, **change), unbroken)
        assert told in str(error.value)


def test_other_versions_are_noted_once_and_only_if_they_made_an_image(
    loaded, unbroken, tmp_path, monkeypatch, recwarn
):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    here = provenance()
    newer = here | {"threads": 64, "versions": here["versions"] | {"torch": "9.9"}}
    monkeypatch.setattr(module, "provenance", lambda device: newer)
    make(loaded, out)
    assert not recwarn.list and Manifest.load(out) == Manifest.load(unbroken)
    for _ in range(2):
        image_path(out, 0).unlink()
        told = r"versions\.torch: '.*' here, '9.9' asked for.*continued_with"
        with pytest.warns(UserWarning, match=f"(?s){told}"):
            returned = make(loaded, out)
        assert returned == Manifest.load(out)
        assert returned.continued_with == (newer,) and returned.provenance == here


def test_a_run_refused_before_its_first_image_leaves_the_folder_free(loaded, tmp_path):
    with pytest.raises(ValueError, match="63"):
        make(loaded, tmp_path, call={**CALL, "height": 63})
    make(loaded, tmp_path)
    assert len(images(tmp_path)) == 5


def test_a_folder_of_something_else_is_refused(loaded, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 1 entries such as thesis\.tex, but no manifest"):
        make(loaded, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Several processes


def _one_of_two(source: str, out: Path, rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",  # not by this machine's name, which may not resolve
    }
    PartialState._reset_state()
    write = module.write_whole

    def noted(path: Path, data: bytes) -> None:
        write(path, data)
        with (out.parent / f"by-{rank}").open("a") as file:
            file.write(f"{path.name}\n")

    module.write_whole = noted
    stored = make(source, out)
    assert sorted(images(out)) == [f"{index:05d}.png" for index in range(5)]
    assert stored == Manifest.load(out)
    PartialState().destroy_process_group()


def test_two_processes_make_what_one_makes(saved, unbroken, tmp_path):
    out = tmp_path / "run"
    for lost in (range(5), (0, 4)):  # a new run; then one that lacks the first and the last batch
        for index in lost:
            image_path(out, index).unlink(missing_ok=True)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        workers = [forked(_one_of_two, str(saved), out, rank, port) for rank in range(2)]
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert images(out) == images(unbroken)
    # Batches go round; those that were still there are nobody's.
    names = {rank: (tmp_path / f"by-{rank}").read_text().split() for rank in range(2)}
    assert names[0] == [f"{index:05d}.png" for index in (0, 1, 4, 0, 1)]
    assert names[1] == [f"{index:05d}.png" for index in (2, 3, 4)]


# Progress


def test_the_bar_counts_what_was_there_but_not_in_the_rate(
    loaded, unbroken, tmp_path, monkeypatch, capsys
):
    bars: list[Any] = []

    class Kept(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.begun = self.format_dict
            bars.append(self)

        def close(self) -> None:
            self.ended = self.format_dict
            super().close()

    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    image_path(out, 3).unlink()
    monkeypatch.setattr(module, "tqdm", Kept)
    make(loaded, out)
    (bar,) = bars
    assert bar.begun["n"] == bar.begun["initial"] == 3  # those of the complete batches
    assert bar.ended["n"] == bar.ended["total"] == 5
    printed = capsys.readouterr().err
    assert "half: " in printed and "3/5" in printed and "5/5" in printed and "images/s" in printed
    assert "it/s" not in printed  # as the bar of the pipeline itself has it


# Pipelines


def test_a_folder_is_named_and_hashed(saved, loaded, tmp_path):
    assert loaded.name == "tiny" and loaded.dtype == "float32"
    copied = Path(shutil.copytree(saved, tmp_path / "tiny"))
    assert load(str(copied), device="cpu").identity() == loaded.identity()
    other = load(str(copied), device="cpu", scheduler="HeunDiscreteScheduler")
    assert other.identity()["scheduler"]["class"] == other.scheduler == "HeunDiscreteScheduler"
    half = load(str(copied), "bfloat16", "cpu")
    assert half.dtype == "bfloat16" and half.pipe.unet.dtype == torch.bfloat16
    weights = next((copied / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load(str(copied), device="cpu").weights != loaded.weights


def test_an_embedded_pipeline_goes_by_its_name():
    embedded = load("unet", device="cpu")
    assert (embedded.name, embedded.weights) == ("unet", weights_hash("unet"))
    assert embedded.identity()["scheduler"]["class"] == "DDIMScheduler"


def test_a_hub_name_goes_by_its_snapshot(saved, loaded, tmp_path, monkeypatch):
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(saved, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", tmp_path, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load("someone/tiny", device="cpu")
    assert (found.name, found.weights) == ("someone/tiny", revision[:16])
    with pytest.raises(ValueError, match=r"(?s)no pipeline 'someone/other'.*mmdit, unet.*local"):
        load("someone/other", device="cpu")


def test_what_cannot_generate_is_refused_before_it_does(loaded, tmp_path):
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        load(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="unknown dtype 'int8'; choose one of float32"):
        load("unet", "int8", "cpu")
    classes = dataclasses.replace(loaded, pipe=tiny.tiny_ddpm())
    for source, changes, told in (
        (loaded, {"call": {"step": 3}}, "StableDiffusionPipeline takes no step; it takes height"),
        (loaded, {"call": {"output_type": "pt"}}, "output_type cannot be given"),
        (classes, {"setting": UNREDUCED}, "DDPMPipeline takes no prompt"),
        (loaded, {"batch_size": 0}, "batch_size 0 is not"),
        (loaded, {"prompts": []}, "prompts must be one"),
        (loaded, {"seed": -1}, "seed -1 is not"),
        (loaded, {"call": {"eta": torch.ones(1)}}, "call cannot be kept as JSON"),
    ):
        with pytest.raises(ValueError, match=told):
            make(source, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


# The command


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*arguments])


def test_the_command_makes_a_run(saved, tmp_path, capsys, monkeypatch, fresh_state):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    out, setting = tmp_path / "run", tmp_path / "setting.json"
    setting.write_text(json.dumps(TOFU.to_dict()))
    arguments = (
        f"--pipeline {saved} --n 3 --out {out} --setting {setting} --steps 3 --guidance 2 "
        "--height 48 --width 64 --batch-size 2 --seed 5"
    )
    assert main(parsed(*arguments.split())) == 0
    assert "3 images of tiny, half" in capsys.readouterr().out
    stored = Manifest.load(out)
    assert stored.prompts == tuple(load_prompts("emoji")[:3]) and stored.seeds == (5, 6, 7)
    assert stored.call == {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "height": 48,
        "width": 64,
    }
    assert stored.setting == TOFU.to_dict() and stored.dtype == "float32" and len(images(out)) == 3
    for wrong in ('{"kind": "tofu"}', '{"name": "x", "kind": "magic"}', '{"name"', "nowhere.json"):
        with pytest.raises(ValueError, match="--setting cannot be read"):
            main(parsed("--out", str(out), "--setting", wrong))


# The manifest


@pytest.mark.parametrize(
    ("words", "guidance"),
    [
        ([], 3.0),
        (["--pipeline", "./mine"], 7.5),
        (["--pipeline", "./mine", "--guidance", "2"], 2.0),
    ],
)
def test_guidance_that_is_not_given_is_the_pipelines_own(words, guidance, tmp_path):
    parser = argparse.ArgumentParser()
    module.add_run_arguments(parser)
    args = parser.parse_args([*words, "--out", str(tmp_path), "--steps", "5", "--width", "64"])
    expected = {"num_inference_steps": 5, "guidance_scale": guidance, "width": 64}
    assert module.call_of(args, tiny.small_sd()) == expected


def test_a_manifest_is_the_same_in_json(tmp_path):
    whole = manifest(call=CALL | {"crops": (0, 1)}, continued_with=(provenance(),))
    whole.save(tmp_path)
    assert Manifest.load(tmp_path) == whole
    assert Manifest.from_dict(whole.to_dict()) == whole
    assert json.loads((tmp_path / "manifest.json").read_text()) == whole.to_dict()
    assert whole.call["crops"] == [0, 1] and whole.to_dict()["format"] == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": ("a",)}, "1 prompts but 5 seeds"),
        ({"prompts": ("a", "b", "", "d", "e")}, "none of them empty"),
        ({"seeds": (0, 1, 2, 3, 2**64)}, "seed 18446744073709551616 is not a whole number"),
        ({"seeds": (0, 1, 2, 3, True)}, "seed True is not"),
        ({"batch_size": 2.0}, "batch_size 2.0 is not"),
        ({"pipeline": {"name": "tiny"}}, "pipeline lacks class, weights"),
        ({"setting": "half"}, "setting lacks name, kind, options; it is 'half'"),
        (
            {"pipeline": {"name": "a", "class": "b", "weights": "XYZ"}},
            "weights is 'XYZ', not 16 lower-case hex digits",
        ),
        ({"call": {"guidance_scale": float("nan")}}, "call cannot be kept as JSON"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_impossible_manifests_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        manifest(**changes)


def test_unreadable_manifests_say_why(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder: it holds no manifest\.json"):
        Manifest.load(tmp_path)
    whole = manifest().to_dict()
    for text, told in (
        ("{", "Expecting property name"),
        ("[1]", r"format \[1\] is not 1"),
        (json.dumps(whole | {"format": 2}), "format 2 is not 1"),
        (json.dumps({k: v for k, v in whole.items() if k != "seeds"}), "it lacks seeds"),
        (json.dumps(whole | {"colour": "red"}), "it has colour"),
        (json.dumps(whole | {"prompts": 3}), "int"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=rf"cannot read .*manifest\.json: .*{told}"):
            Manifest.load(tmp_path)


def test_differences_of_a_value_with_itself_are_none():
    assert differences(manifest().to_dict(), manifest().to_dict()) == []
    assert differences({"a": None}, {}) == ["a: None here, nothing asked for"]


def test_a_failed_write_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


def test_the_commit_of_a_checkout(tmp_path):
    assert commit(tmp_path) == "unknown"
    if shutil.which("git") is None:
        pytest.skip("git is not installed, so there is no checkout to look at")

    def git(*command: str) -> str:
        run = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *command]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40 and commit(tmp_path) == head
    (tmp_path / "picture").write_text("what a run leaves is no change of the code")
    assert commit(tmp_path) == head
    (tmp_path / "inner" / "file").write_text("two")
    assert commit(tmp_path) == head + "+dirty"
    assert commit(tmp_path / "inner") == "unknown"


# Prompts


def test_the_built_in_prompts_are_a_fair_mix_from_the_start():
    prompts = load_prompts("emoji")
    assert len(prompts) >= 256 and prompts[0] == "a red apple"

    def shares(some: list[str]) -> list[float]:
        faces = sum("face" in prompt for prompt in some)
        coloured = sum(bool({*COLOURS} & {*prompt.split()}) for prompt in some)
        return [faces / len(some), coloured / len(some)]

    assert shares(prompts[:32]) == pytest.approx(shares(prompts), abs=0.06)
    assert len({*COLOURS} & {*" ".join(prompts[:32]).split()}) >= 5


def test_the_captions_are_as_many_as_distances_of_sets_need():
    prompts = load_prompts("emoji-captions")
    assert len(prompts) == 2560 and not {*prompts[:32]} & {*load_prompts("emoji")[:32]}


def test_a_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    prompts = ["a red apple", "#1 fan", "crème brûlée", "👩‍🚀 in space", "a\u2003b"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n  \n".join(prompts).encode() + b"\n\n")
    assert load_prompts(path) == load_prompts(str(path)) == prompts
    assert first(prompts, None) == prompts and first(prompts, 2) == prompts[:2]
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=f"{wrong} prompts asked for of 5; choose 1 to 5"):
            first(prompts, wrong)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"a\nb\n\na \n", "line 4 repeats line 1; keep one"),
        (b"a\nb\tc\n", "line 2 holds the control character U\\+0009; replace"),
        ("a\u2028b".encode(), "line 1 holds the control character U\\+2028"),
        (b"a\n\nb\xe9\n", "line 3 is not UTF-8 \\(byte 0xE9\\); save"),
        ("a red apple".encode("utf-16"), "line 1 is not UTF-8"),
        (b"a" * (MOST_CHARACTERS + 1), f"has {MOST_CHARACTERS + 1} characters, more than"),
        (b"\n \n", "holds no prompts; write one a line"),
        (b"a\n" * 9, "(?s)line 2 .*line 6 [^\n]*\n  and 3 more$"),
    ],
    ids=["twice", "tab", "separator", "latin-1", "utf-16", "long", "empty", "many"],
)
def test_odd_lines_are_named(tmp_path, data, told):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=told) as error:
        load_prompts(path)
    assert "prompts.txt" in str(error.value)


def test_what_is_neither_a_set_nor_a_file_is_refused(tmp_path):
    for source in ("emojis", tmp_path):
        with pytest.raises(
            ValueError, match=r"neither a file nor a built-in set \(emoji, emoji-captions\)"
        ):
            load_prompts(source)
