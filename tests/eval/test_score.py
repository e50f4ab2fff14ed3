"""eval.metrics: against direct formulas, other code and known values."""

import argparse
import dataclasses
import json
import multiprocessing
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import lpips
from torchmetrics.image import fid
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from eval.generate.manifest import Manifest, image_path
from eval.metrics import extractors as extracting
from eval.metrics import paired, resampling
from eval.metrics import score as scores
from eval.metrics.alignment import ClipAlignment, default_alignment
from eval.metrics.extractors import Extractor, Pictures, features, load_extractor, read_pictures
from eval.metrics.frechet import frechet_distance, kernel_distance
from eval.metrics.paired import Lpips
from eval.metrics.resampling import of_frechet, of_kernel
from eval.metrics.score import compare, score
from eval.report.plots import metric_of
from eval.statistics import difference, of_mean, relative_increase
from pipelines.emoji import load_pipeline, weights_hash
from pipelines.emoji.scorer import EmojiScorer
from tofu_diffusers import apply_tofu

DIMENSIONS = 6


class Net(nn.Module):
    """A tiny random network that counts its pictures and, as all, resizes by itself."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        drawn = torch.randn(DIMENSIONS, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        self.weight, self.seen = nn.Parameter(drawn), 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        pixels = F.interpolate(images / 255, (16, 16), mode="bilinear", antialias=True)
        return F.conv2d(pixels, self.weight).relu().mean((2, 3))


class Brightness:
    """An alignment that is easily checked."""

    identity = {"name": "brightness"}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.asked += prompts
        return images.float().mean((1, 2, 3))


def tiny(resize: str = "bilinear", seed: int = 0) -> Extractor:
    return Extractor("tiny", Net(seed), 16, DIMENSIONS, resize)


def pixels(count: int = 9, size: tuple[int, int] = (15, 22), seed: int = 0) -> np.ndarray:
    """Pictures that differ in more than noise.  uint8 [N, H, W, 3]"""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(40, 200, (count, 3, 3, 3)))
    smooth = F.interpolate(coarse, size, mode="bilinear").permute(0, 2, 3, 1).numpy()
    return (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)


def manifest(setting: str, count: int, weights: str = "0123456789abcdef", **changes) -> Manifest:
    values = {
        "pipeline": {"name": "tiny", "class": "Tiny", "weights": weights},
        "setting": {
            "name": setting,
            "kind": "unreduced" if setting == "unreduced" else "tofu",
            "options": {},
        },
        "call": {},
        "prompts": [f"thing {i}" for i in range(count)],
        "seeds": range(count),
        "batch_size": 4,
        "dtype": "float32",
        "device": "CPU",
        "threads": 1,
        "versions": {},
        "commit": "unknown",
    }
    return Manifest(**values | changes)


def write_run(folder: Path, pictures: np.ndarray, **changes) -> Path:
    (folder / "images").mkdir(parents=True)
    manifest(folder.name, len(pictures), **changes).save(folder)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(image_path(folder, index))
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_run(tmp_path / "unreduced", pixels())


def gaussian(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, d, generator=generator) @ torch.randn(
        d, d, generator=torch.Generator().manual_seed(99)
    )
    return mixed + shift


def direct_frechet(x: Tensor, y: Tensor) -> float:
    a, b = np.cov(x.double().numpy().T), np.cov(y.double().numpy().T)
    shared = scipy.linalg.sqrtm(a @ b).real
    means = (x.double().mean(0) - y.double().mean(0)).square().sum().item()
    return means + np.trace(a + b - 2 * shared)


def direct_kernel(x: Tensor, y: Tensor) -> float:
    """The unbiased squared MMD, pair by pair."""
    x, y = x.double(), y.double()

    def k(a: Tensor, b: Tensor) -> float:
        return ((a @ b / len(a) + 1) ** 3).item()

    within = [
        np.mean([k(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j])
        for rows in (x, y)
    ]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


# Features


def test_the_default_features_are_the_emoji_scorers():
    extractor = load_extractor()
    images = torch.from_numpy(pixels(2, (40, 31))).permute(0, 3, 1, 2)
    found = extractor(images)
    assert torch.equal(found, EmojiScorer.load().image_features(images))
    assert found.shape == (2, 1280) and found.dtype == torch.float32
    assert extractor.names == ("fd-effnetlite0", "kid-effnetlite0")
    bicubic = Extractor("effnetlite0", extractor.net, 224, 1280, "bicubic")
    own_size = torch.from_numpy(pixels(2, (224, 224))).permute(0, 3, 1, 2)
    assert torch.equal(bicubic(own_size), extractor(own_size))
    assert not torch.allclose(bicubic(images), found, atol=0.01)
    with pytest.raises(ValueError, match="tf1 is for inception"):
        load_extractor(resize="tf1")


def test_bicubic_is_done_before_the_network_and_recorded():
    images = torch.from_numpy(pixels()).permute(0, 3, 1, 2)
    resized = F.interpolate(images.float(), (16, 16), mode="bicubic", antialias=True)
    extractor = tiny("bicubic")
    expected = tiny()(resized.round().clamp(0, 255).byte())
    assert torch.equal(extractor(images), expected)
    assert extractor.identity["resize"] == "bicubic"
    assert not torch.allclose(tiny()(images), expected)


def test_an_extractor_takes_bytes_and_gives_what_it_says():
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\], not torch.float32"):
        tiny()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\[2, 6\] for 2 pictures; it should be \[2, 7\]"):
        Extractor("tiny", Net(), 16, 7)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown resize 'area'"):
        tiny("area")


def test_features_are_kept_until_a_picture_or_the_extractor_changes(reference):
    def seen(extractor: Extractor) -> tuple[int, Tensor]:
        found = features(extractor, scores.Run.read(reference).pictures)
        return extractor.net.seen, found

    count, first = seen(tiny())
    assert count == 9
    count, again = seen(tiny())
    assert count == 0 and torch.equal(again, first)
    for other in (tiny("bicubic"), tiny(seed=1)):
        count, changed = seen(other)
        assert count == 9 and not torch.allclose(changed, first)
    seen(tiny())
    Image.fromarray(pixels(seed=1)[3]).save(image_path(reference, 3))
    count, changed = seen(tiny())
    assert count == 9
    assert [i for i in range(9) if not torch.equal(changed[i], first[i])] == [3]


def test_pictures_keep_their_order_and_form_whatever_the_batches(tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    several = [*pixels(3, (12, 20)), *pixels(2, (18, 14))]
    for name, picture in zip("baedc", several, strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    real = read_pictures(folder, tmp_path / "cache")
    order = [several["baedc".index(name)] for name in "abcde"]
    for size in (1, 2, 32):
        flat = [picture for batch in real.batches(size) for picture in batch]
        assert all(
            np.array_equal(picture.permute(1, 2, 0), expected)
            for picture, expected in zip(flat, order, strict=True)
        )
    assert features(tiny(), real).shape == (5, DIMENSIONS)
    Image.new("RGBA", (20, 12)).save(folder / "f.png")
    with pytest.raises(ValueError, match=r"f\.png is RGBA, not RGB; convert it"):
        features(tiny(), read_pictures(folder, tmp_path))
    # What is the user's own is read only.
    assert {path.suffix for path in folder.iterdir()} == {".png"}


def test_pictures_of_an_array_are_those_of_the_files(tmp_path, reference):
    from_files = features(tiny(), scores.Run.read(reference).pictures)
    np.save(tmp_path / "real.npy", pixels())
    np.savez(tmp_path / "real.npz", images=pixels(), names=np.arange(9))
    for name in ("real.npy", "real.npz"):
        real = read_pictures(tmp_path / name, tmp_path / "cache")
        assert torch.equal(features(tiny(), real), from_files)
    np.savez(tmp_path / "odd.npz", a=pixels(), b=pixels())
    with pytest.raises(ValueError, match="has a, b; call the pictures `images`"):
        read_pictures(tmp_path / "odd.npz", tmp_path)
    for count in (0, 1):
        np.save(tmp_path / "few.npy", pixels()[:count])
        with pytest.raises(ValueError, match=f"few.npy holds {count} pictures; .* needs 2"):
            read_pictures(tmp_path / "few.npy", tmp_path)
    with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 3\], not float64 \[2, 3\]"):
        Pictures(np.zeros((2, 3)), tmp_path)
    (tmp_path / "notes.txt").write_text("no pictures")
    for name, words in (("none", "does not exist"), ("notes.txt", "neither a folder of pictures")):
        with pytest.raises(ValueError, match=words):
            read_pictures(tmp_path / name, tmp_path)


class Inception(nn.Module):
    """Stands for the class of torch-fidelity, which tests have not."""

    def __init__(self, name, features_list, feature_extractor_weights_path, antialias) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        if feature_extractor_weights_path is None:
            raise URLError("no network")
        self.scale = nn.Parameter(torch.load(feature_extractor_weights_path)["scale"])
        self.antialias = antialias

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2, 3))[:, None] * self.scale


def test_only_the_published_inception_is_called_fid(tmp_path, monkeypatch):
    path = tmp_path / "inception.pth"
    torch.save({"scale": torch.ones(2048)}, path)
    with pytest.raises(ValueError, match="not the published Inception of FID"):
        load_extractor("inception", path=path)
    digest = extracting.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(extracting, "INCEPTION_SHA256", digest)
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ImportError, match="inception needs torch-fidelity"):
        load_extractor("inception", path=path)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Inception)
    with pytest.raises(OSError, match=r"cannot download .* --features-path"):
        load_extractor("inception")
    extractor = load_extractor("inception", path=path, resize="tf1")
    assert extractor.names == ("fid", "kid") and not extractor.net.antialias
    assert load_extractor("inception", path=path).net.antialias
    assert extractor(torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)).eq(7).all()


# Distances


@pytest.mark.parametrize(("n", "m"), [(200, 150), (5, 8)])
def test_frechet_distance_is_that_of_sqrtm(n, m):
    """With full covariances, and with fewer pictures than dimensions."""
    x, y = gaussian(n, 12, 0), gaussian(m, 12, 1, 0.5)
    value = frechet_distance(x, y)
    assert value == pytest.approx(direct_frechet(x, y), rel=1e-6)
    ones = [torch.ones(k, dtype=torch.float64) for k in (n, m)]
    assert resampling._frechet(x.double(), y.double(), *ones) == pytest.approx(value, rel=1e-6)


def test_frechet_distance_of_known_sets():
    x = gaussian(300, 12, 0)
    assert 0 <= frechet_distance(x, x) < 1e-6
    assert frechet_distance(x + 0.5, x) == pytest.approx(12 * 0.25, rel=1e-5)
    # Means 0 and covariances s^2 C and C: (s - 1)^2 Tr C.
    x -= x.mean(0)
    spread = x.double().var(0).sum().item()
    assert frechet_distance(1.5 * x, x) == pytest.approx(0.25 * spread, rel=1e-5)


def test_distances_are_those_of_torchmetrics_on_the_pictures_in_any_batches():
    extractor = tiny()
    mine, others = pixels(20), pixels(20, seed=1)
    sets = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (mine, others)]
    metric = fid.FrechetInceptionDistance(feature=extractor)
    for images, real in zip(sets, (False, True), strict=True):
        for part in images.split([1, 7, 12]):
            metric.update(part, real=real)
    value = frechet_distance(*(extractor(images) for images in sets))
    assert value == pytest.approx(metric.compute().item(), rel=1e-4)
    assert value > 0


def _process(rank: int, folder: Path, answers) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    x, y = gaussian(30, 5, 0), gaussian(30, 5, 1, 0.5)
    mine, others = (x[:11], y[:17]) if rank == 0 else (x[11:], y[17:])
    answers.put(frechet_distance(mine, others, split=True))
    torch.distributed.barrier()
    if rank == 0:  # alone, as the others may have gone
        answers.put(frechet_distance(x, y))
        answers.put(kernel_distance(x, y))
    torch.distributed.destroy_process_group()


def test_distances_are_the_same_split_over_processes_and_in_one_of_them(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_process, args=(i, tmp_path, answers)) for i in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join(timeout=60)
    x, y = gaussian(30, 5, 0), gaussian(30, 5, 1, 0.5)
    whole = frechet_distance(x, y)
    expected = [whole, whole, whole, kernel_distance(x, y)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_the_direct_one():
    x, y = gaussian(14, 5, 0), gaussian(14, 5, 1, 0.5)
    assert kernel_distance(x, y) == pytest.approx(direct_kernel(x, y), rel=1e-9)
    shuffled = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    assert kernel_distance(x[shuffled], y) == pytest.approx(kernel_distance(x, y), rel=1e-9)


def test_kernel_distance_of_two_sizes_is_seeded_and_about_the_direct_one():
    x, y = gaussian(60, 3, 0), gaussian(90, 3, 1, 1.0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    value = kernel_distance(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert kernel_distance(x, y) == value
    assert value == pytest.approx(direct_kernel(x, y), rel=0.1)


def test_kernel_distance_of_samples_of_one_gaussian_is_zero_on_average():
    values = [
        kernel_distance(torch.randn(40, 4, generator=g), torch.randn(40, 4, generator=g))
        for g in (torch.Generator().manual_seed(seed) for seed in range(40))
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / 40**0.5
    assert max(values) < kernel_distance(torch.randn(40, 4) + 1.5, torch.randn(40, 4))


# Resampling


def test_the_interval_of_a_mean_is_students_for_normal_numbers():
    values = np.random.default_rng(0).normal(30, 4, 200)
    entry = of_mean(values).entry()
    low, high = scipy.stats.t.interval(0.95, 199, values.mean(), scipy.stats.sem(values))
    assert entry["value"] == values.mean() and entry["n"] == 200
    assert entry["low"] == pytest.approx(low, abs=0.1)
    assert entry["high"] == pytest.approx(high, abs=0.1)
    assert of_mean(values) == of_mean(values)
    with pytest.raises(ValueError, match="2 images or more, not 1"):
        of_mean([3.0])


def test_differences_of_two_settings_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.normal(30, 5, 100)  # some prompts are harder than others
    others, mine = hard, hard + rng.normal(1, 0.1, 100)
    change = difference(of_mean(mine), of_mean(others))
    alone = of_mean(mine - others)
    assert change.value == pytest.approx(alone.value)
    assert (change.low, change.high) == pytest.approx(list(alone.entry().values())[1:3])
    paired = scipy.stats.bootstrap(
        (mine, others),
        lambda a, b, axis: np.mean(a, axis) - np.mean(b, axis),
        paired=True,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert (change.low, change.high) == pytest.approx(tuple(paired), abs=0.01)
    assert change.low < change.lower < change.value < change.upper < change.high
    assert change.high - change.low < 0.1  # while that of either mean is about 2


def test_relative_increase_and_what_it_cannot_do():
    others = of_mean(np.random.default_rng(0).uniform(1, 2, 50))
    mine = of_mean(1.04 * np.random.default_rng(0).uniform(1, 2, 50))
    change = relative_increase(mine, others)
    assert list(change.to_dict().values()) == pytest.approx([0.04] * 5 + [50])
    noisy = of_mean(1.04 * np.random.default_rng(1).uniform(1, 2, 50))
    assert relative_increase(noisy, others).upper > 0.08
    with pytest.raises(ValueError, match="50 images against 49"):
        relative_increase(mine, of_mean(np.ones(49)))
    with pytest.raises(ValueError, match="may be -1, not above 0; take the difference"):
        relative_increase(mine, of_mean(-np.ones(50)))


@pytest.mark.parametrize("n", [30, 8])
def test_a_draw_counts_pictures_as_often_as_it_holds_them(n):
    x, y = gaussian(n, 12, 0).double(), gaussian(25, 12, 1, 0.5).double()
    a, b = (torch.from_numpy(counts) for counts in resampling._counts(n, 25, 3, False))
    for i in range(3):
        drawn = [rows.repeat_interleave(c[i].long(), 0) for rows, c in ((x, a), (y, b))]
        assert [len(rows) for rows in drawn] == [n, 25]
        value = resampling._frechet(x, y, a[i], b[i])
        assert value == pytest.approx(direct_frechet(*drawn), rel=1e-5)


def test_draws_of_the_kernel_distance_are_those_of_the_drawn_pictures(monkeypatch):
    monkeypatch.setattr(resampling, "MANY", 4)
    x, y = gaussian(9, 4, 0), gaussian(7, 4, 1, 0.5)
    a, b = (torch.from_numpy(counts).long() for counts in resampling._counts(9, 7, 4, False))
    direct = np.array(
        [
            direct_kernel(x.repeat_interleave(i, 0), y.repeat_interleave(j, 0))
            for i, j in zip(a, b, strict=True)
        ]
    )
    drawn = np.array(of_kernel(x, y, paired=False).draws)
    assert drawn - drawn.mean() == pytest.approx(direct - direct.mean(), rel=1e-6)


def test_every_setting_draws_the_same_pictures_whatever_it_is_compared_with():
    mine, others = resampling._counts(20, 20, 5, False)
    assert np.array_equal(resampling._counts(20, 30, 5, False)[0], mine)
    assert np.array_equal(resampling._counts(20, 20, 5, True), [mine, mine])
    assert not np.array_equal(mine, others)  # real pictures are drawn apart


def test_intervals_of_distances():
    x, y = gaussian(60, 8, 0), gaussian(60, 8, 1, 0.7)
    for of in (of_frechet, of_kernel):
        drawn = of(x, y, paired=False)
        assert np.mean(drawn.draws) == pytest.approx(drawn.value)  # their bias is taken out
        entry = drawn.entry()
        assert entry["low"] < entry["value"] < entry["high"]
        with pytest.raises(ValueError, match="60 images cannot be paired with 59"):
            of(x, y[1:], paired=True)
    same = of_frechet(x, x, paired=True).entry()
    assert (same["low"], same["value"], same["high"]) == pytest.approx((0, 0, 0), abs=1e-6)
    # Two settings that move all pictures alike are told apart, although each alone is uncertain.
    near, far = (of_frechet(x + shift, y, paired=False) for shift in (0.0, -0.3))
    change = relative_increase(far, near)
    assert change.low > 0 and near.entry()["high"] > far.entry()["low"]


# Scores of one picture


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIPModel with random weights, and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*map(chr, range(33, 127))]
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    start, end = len(pieces) - 2, len(pieces) - 1
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={
            **layers,
            "num_attention_heads": 2,
            "vocab_size": len(pieces),
            "max_position_embeddings": 20,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**layers, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]),
    ).save_pretrained(folder)
    return folder


def test_clip_score_is_the_models_own_similarity(clip_folder):
    images = torch.from_numpy(pixels(6, (40, 52))).permute(0, 3, 1, 2)
    prompts = ["ab", "c d", "an apple", "x" * 60, "y" * 19 + "z", "the end"]  # two are too long
    alignment = ClipAlignment(clip_folder)
    found = alignment(images, prompts)

    model, processor = (
        CLIPModel.from_pretrained(clip_folder),
        CLIPProcessor.from_pretrained(clip_folder),
    )
    inputs = processor(
        text=prompts,
        images=list(images),
        padding=True,
        truncation=True,
        max_length=20,
        return_tensors="pt",
    )
    with torch.no_grad():
        cosines = (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal()
    assert found == pytest.approx(100 * cosines.clamp(min=0), abs=1e-3)
    assert found.max() > 1
    assert alignment.identity["name"] == "clip_score"
    assert (inputs["input_ids"] == model.config.text_config.eos_token_id).any(1).all()


def test_another_model_gives_no_clip_score(tmp_path):
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = CLIPTextConfig(**layers, num_attention_heads=1, vocab_size=10)
    CLIPTextModel(text).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a CLIPTextModel, no CLIPModel"):
        ClipAlignment(tmp_path)


def test_drift_of_known_pictures(tmp_path):
    grey = np.full((3, 17, 24, 3), 100, np.uint8)
    moved = grey.copy()
    moved[1] += 10
    moved[2, 5, 5, 1] += 1
    found = paired.drift(Pictures(moved, tmp_path), Pictures(grey, tmp_path))
    ten, one_value = 20 * np.log10(255 / 10), 10 * np.log10(255**2 * 17 * 24 * 3)
    assert found["psnr_db"].tolist() == pytest.approx([120.0, ten, one_value])
    # SSIM of flat pictures has its luminance term only.
    c = (0.01 * 255) ** 2
    flat = (2 * 100 * 110 + c) / (100**2 + 110**2 + c)
    assert found["ssim"].tolist()[:2] == pytest.approx([1.0, flat])
    assert 0.9 < found["ssim"][2] < 1


def alexnet() -> nn.Sequential:
    """What torchvision, which tests have not, calls alexnet().features."""
    sizes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1)]
    layers: list[nn.Module] = []
    for index, (inner, outer, kernel, stride, padding) in enumerate([*sizes, (256, 256, 3, 1, 1)]):
        layers += [nn.Conv2d(inner, outer, kernel, stride, padding), nn.ReLU()]
        if index in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers)


def test_lpips_with_a_local_backbone(tmp_path, monkeypatch):
    path = tmp_path / "alexnet.pth"
    weights = alexnet()
    torch.save({f"features.{name}": value for name, value in weights.state_dict().items()}, path)
    with pytest.raises(ValueError, match="no backbone of LPIPS: its SHA-256 starts with"):
        Lpips(path)
    digest = scores.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(paired, "LPIPS_NETS", {digest[:8]: "alex"})
    monkeypatch.setattr(lpips, "_TORCHVISION_AVAILABLE", False)
    with pytest.raises(ImportError, match="LPIPS needs the torchvision"):
        Lpips(path)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: alexnet())

    perceptual = Lpips(path)
    a, b = (torch.from_numpy(pixels(3, (64, 80), seed)).permute(0, 3, 1, 2) for seed in (0, 1))
    found = perceptual(a, b)
    assert found.shape == (3,) and perceptual(a, a).abs().max() < 1e-6
    # The paper's formula on the backbone of the file.
    shift, scale = perceptual.net.scaling_layer.shift, perceptual.net.scaling_layer.scale
    x, y = (((images / 127.5 - 1) - shift) / scale for images in (a, b))
    expected, head = torch.zeros(3), 0
    for layer in weights:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU):
            gap = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
            lin = perceptual.net.lins[head].model[-1].weight
            expected += F.conv2d(gap, lin).mean((1, 2, 3))
            head += 1
    assert found == pytest.approx(expected.detach(), rel=1e-3)


# Scores of a run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": [*(f"thing {i}" for i in range(8)), "x"]},
            r"half is not .*unreduced:.*prompts\[8\]: 'x' of the run, 'thing 8' of",
        ),
        ({"seeds": [0, 1, 3, 2, *range(4, 9)]}, r"seeds\[2\] \(and 1 more\): 3 of the run, 2 of"),
        ({"weights": "f" * 16}, "weights: 'f+' of the run, '0123456789abcdef' of"),
        ({"dtype": "float16"}, "dtype: 'float16' of the run, .*--allow-different dtype$"),
        ({"pictures": pixels(8)}, "images: 8 in .*half, 9 in .*unreduced"),
        ({"pictures": pixels(9, (15, 23))}, "height x width of image 0: 15 x 23 in .*, 15 x 22 in"),
    ],
)
def test_runs_that_do_not_match_are_refused(reference, tmp_path, changes, message):
    pictures = changes.pop("pictures", pixels())
    half = write_run(tmp_path / "half", pictures, **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        score(half, reference, extractor=tiny(), alignment=None)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("word", "changes", "told"),
    [
        ("guidance", {"call": {"guidance_scale": 4.0}}, "call.guidance_scale: 4.0 of the run, noth"),
        ("steps", {"call": {"num_inference_steps": 8}}, "call.num_inference_steps: 8 of the run"),
        ("call", {"call": {"eta": 1}}, "call.eta: 1 of the run, nothing of the reference"),
        (
            "scheduler",
            {"pipeline": {"name": "tiny", "class": "Tiny", "weights": "0123456789abcdef"}
                | {"scheduler": {"class": "Euler"}}},
            "pipeline.scheduler: {'class': 'Euler'} of the run",
        ),
        (
            "pipeline",
            {"pipeline": {"name": "tiny", "class": "Other", "weights": "0123456789abcdef"}},
            "pipeline.class: 'Other' of the run, 'Tiny' of the reference",
        ),
        ("seeds", {"seeds": range(1, 10)}, r"seeds\[0\] \(and 8 more\): 1 of the run, 0 of"),
    ],
)  # fmt: skip
def test_what_differs_from_the_reference_is_asked_for(reference, tmp_path, word, changes, told):
    half = write_run(tmp_path / "half", pixels(seed=1), **changes)
    tools = {"extractor": tiny(), "alignment": None}
    for allowed in ((), {*scores.WORDS} - {word}):
        with pytest.raises(ValueError, match=f"(?s){told}.*--allow-different {word}$"):
            score(half, reference, **tools, allow_different=allowed)
    found = score(half, reference, **tools, allow_different=[word])
    assert len(found["different"]) == 1 and word in scores.WORDS
    assert score(half, reference, **tools, allow_different=scores.WORDS) == found
    with pytest.raises(
        ValueError, match="'colour' cannot be allowed to differ; choose of pipeline,"
    ):
        score(half, reference, **tools, allow_different=["colour"])


def test_a_reduced_reference_is_asked_for(reference, tmp_path):
    half = write_run(tmp_path / "half", pixels(seed=1))
    tools = {"extractor": tiny(), "alignment": None}
    told = r"kind: 'tofu' of the reference, which should be .*--allow-different reference$"
    with pytest.raises(ValueError, match=f"(?s){told}"):
        score(reference, half, **tools)
    found = score(reference, half, **tools, allow_different=["reference"])
    assert found["different"] == [
        "setting.kind: 'tofu' of the reference, which should be 'unreduced'"
    ]


def test_settings_may_change_steps_and_sampler_and_what_changes_rounding_may_differ(
    reference, tmp_path
):
    fewer = {
        "name": "fewer",
        "kind": "fewer_steps",
        "options": {"steps": 2, "scheduler": "multistep"},
    }
    other = {"batch_size": 1, "device": "GPU", "threads": 8, "versions": {"torch": "9"}}
    copied = {"name": "copy", "class": "Tiny", "weights": "0123456789abcdef"}
    sized = {"height": 15, "width": 22}  # as the pictures of the reference, which does not say so
    made = write_run(tmp_path / "fewer", pixels(seed=1), **other, pipeline=copied, call=sized)
    dataclasses.replace(Manifest.load(made), setting=fewer).save(made)
    assert score(made, reference, extractor=tiny(), alignment=None)["different"] == []


def test_a_run_that_is_not_finished_is_refused(reference, tmp_path):
    half = write_run(tmp_path / "half", pixels())
    image_path(half, 4).unlink()
    with pytest.raises(ValueError, match=r"1 of 9 images are missing from .*, the first is 00004"):
        score(half, reference, extractor=tiny(), alignment=None)


def test_scores_are_written_with_what_they_come_from_and_reused(tmp_path):
    count = 35  # more than a batch
    reference = write_run(tmp_path / "unreduced", pixels(count))
    half = write_run(tmp_path / "half", pixels(count, seed=1))
    np.save(tmp_path / "real.npy", pixels(4, (8, 8), seed=2))
    extractor, alignment = tiny(), Brightness()

    def run() -> dict:
        return score(
            half, reference, extractor=extractor, alignment=alignment, real=tmp_path / "real.npy"
        )

    with pytest.warns(
        UserWarning, match=r"real picture is 8 x 8 px and the first of the run \d+ x"
    ):
        result = run()
    rows = {
        name: extractor(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        for name, pictures in (
            ("half", pixels(count, seed=1)),
            ("unreduced", pixels(count)),
            ("real", pixels(4, (8, 8), seed=2)),
        )
    }
    metrics, per_image = result["metrics"], result["per_image"]
    assert metrics["fd-tiny"]["value"] == pytest.approx(
        frechet_distance(rows["half"], rows["unreduced"]), rel=1e-4
    )
    assert metrics["kid-tiny-real"]["value"] == pytest.approx(
        kernel_distance(rows["half"], rows["real"]), rel=1e-4
    )
    cosines = F.cosine_similarity(rows["half"], rows["unreduced"])
    assert per_image["feature_distance"] == pytest.approx((1 - cosines).tolist(), abs=1e-6)
    assert per_image["brightness"] == pytest.approx(
        pixels(count, seed=1).mean((1, 2, 3)).tolist(), rel=1e-5
    )
    assert alignment.asked == [f"thing {i}" for i in range(count)]
    for name, values in per_image.items():
        assert len(values) == count == metrics[name]["n"]
        assert metrics[name]["value"] == pytest.approx(np.mean(values))
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in metrics.values())
    # 35 pictures suffice for 6 dimensions, 4 do not.
    assert "warning" not in metrics["fd-tiny"]
    assert "4 images for 6 feature dimensions" in metrics["fd-tiny-real"]["warning"]
    assert "biased downwards" in metrics["kid-tiny"]["warning"]

    path = tmp_path / "scores" / "half.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    digest = scores.hashlib.sha256((half / "manifest.json").read_bytes()).hexdigest()
    assert result["inputs"]["run"]["manifest"] == digest[:16]
    assert result["inputs"]["extractor"]["resize"] == "bilinear"

    # The same inputs: nothing is computed again. A changed picture: everything of it is.
    before = path.stat().st_mtime_ns
    alignment.asked.clear()
    assert run() == json.loads(json.dumps(result))
    assert not alignment.asked and path.stat().st_mtime_ns == before
    Image.fromarray(pixels(count)[2]).save(image_path(half, 2))
    assert run()["per_image"]["psnr_db"][2] == paired.PSNR_CAP_DB
    assert alignment.asked


def test_the_reference_against_itself(reference):
    metrics = score(reference, reference, extractor=tiny(), alignment=None)["metrics"]
    assert metrics["psnr_db"]["value"] == paired.PSNR_CAP_DB
    assert metrics["ssim"]["value"] == pytest.approx(1)
    assert metrics["feature_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["fd-tiny"]["high"] == pytest.approx(0, abs=1e-4)
    assert (reference.parent / "scores" / "unreduced.json").exists()


def test_what_a_setting_loses_of_its_own_scores():
    """Alignment and the distance to real pictures, as shares of the unreduced ones; a share of 0 is none."""

    def scored(alignment, distance):
        draws = {"fd-tiny-real": distance, "kid-tiny-real": [0.0, *distance[1:]]}
        return {
            "inputs": {"alignment": {"name": "clip_score"}},
            "metrics": {
                name: {"value": 0.0, "n": 4} for name in ("psnr_db", "clip_score", "fd-tiny")
            }
            | {name: {"value": float(np.mean(d)), "n": 4} for name, d in draws.items()},
            "per_image": {"psnr_db": alignment, "clip_score": alignment},
            "draws": draws,
        }

    base = scored([20.0, 30.0, 25.0, 25.0], [5.0, 5.5, 4.5])
    mine = scored([19.0, 29.0, 24.0, 24.0], [10.0, 11.0, 9.0])
    found = scores.changes(mine, base)
    assert set(found) == {"clip_score-change", "fd-tiny-real-change"}
    assert found["clip_score-change"]["value"] == pytest.approx(-0.04)
    assert found["clip_score-change"]["lower"] < -0.04 < found["clip_score-change"]["upper"] < 0
    assert found["fd-tiny-real-change"]["value"] == pytest.approx(1.0)
    for name in found:
        assert metric_of(name) is not None


def test_two_settings_are_compared_by_their_results(reference, tmp_path):
    noise = np.random.default_rng(3).normal(0, 1, pixels().shape)
    results = {}
    for name, strength in (("mild", 8), ("strong", 24)):
        noisy = (pixels() + strength * noise).clip(0, 255).astype(np.uint8)
        folder = write_run(tmp_path / name, noisy)
        results[name] = score(folder, reference, extractor=tiny(), alignment=None)
    mild, strong = results["mild"], results["strong"]
    change = compare(strong, mild, "psnr_db", relative=False)
    gaps = np.subtract(strong["per_image"]["psnr_db"], mild["per_image"]["psnr_db"])
    assert change.value == pytest.approx(gaps.mean()) and gaps.min() <= change.low
    assert change.upper < 0
    distances = [result["metrics"]["fd-tiny"]["value"] for result in (strong, mild)]
    difference_of_fd = compare(strong, mild, "fd-tiny", relative=False)
    assert difference_of_fd.value == pytest.approx(distances[0] - distances[1])
    assert compare(strong, mild, "feature_distance", relative=True).lower > 0
    with pytest.raises(ValueError, match="no lpips among psnr_db, ssim"):
        compare(strong, mild, "lpips", relative=True)
    other = score(
        tmp_path / "mild", reference, extractor=tiny("bicubic"), alignment=None, out=tmp_path / "o"
    )
    with pytest.raises(ValueError, match=r"extractor is .* of one"):
        compare(strong, other, "fd-tiny", relative=True)


def test_the_command_scores_an_embedded_pipeline(tmp_path, capsys):
    """Whole and with tofu, from pictures to the printed table, on the default networks."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts, weights = ["a red apple", "a blue car"], weights_hash()

    def pictures() -> np.ndarray:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        images = pipe(prompts, num_inference_steps=2, generator=generators).images
        return np.stack([np.array(image) for image in images])

    whole = pictures()
    write_run(tmp_path / "unreduced", whole, prompts=prompts, weights=weights)
    with apply_tofu(pipe, ratio=0.5, method="tome"):
        reduced = pictures()
    write_run(tmp_path / "half", reduced, prompts=prompts, weights=weights)

    parser = argparse.ArgumentParser()
    scores.add_arguments(parser)
    assert scores.main(parser.parse_args(["--run", str(tmp_path / "half")])) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "scores" / "half.json").read_text())
    assert list(result["metrics"]) == [
        "psnr_db",
        "ssim",
        "feature_distance",
        "emoji_alignment",
        "fd-effnetlite0",
        "kid-effnetlite0",
    ]
    assert all(name in printed for name in result["metrics"])
    assert "2 images for 1280 feature dimensions" in printed
    scorer = EmojiScorer.load()
    expected = scorer.score(torch.from_numpy(reduced).permute(0, 3, 1, 2), prompts)
    assert result["per_image"]["emoji_alignment"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert result["inputs"]["alignment"]["retrieval"] == scorer.retrieval


def test_other_pipelines_get_no_emoji_score():
    assert default_alignment(manifest("half", 2).pipeline["weights"]) is None
