"""What did a setting cost in quality? Scores of a run's pictures against the unreduced ones, and real ones.

    python -m eval score --run sweep/half --reference sweep/unreduced

Picture i is compared with picture i of the reference, which the same prompt and seed made:

- psnr_db (identical pictures count as 120 dB), ssim, lpips, feature_distance (1 - cosine);
- emoji_alignment or clip_score: how well the picture shows its prompt;
- fd-..., kid-... (fid and kid for Inception): distances between the sets; -real: to the real pictures.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import (
    lpips,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.functional.multimodal import clip_score
from transformers import AutoModel, AutoProcessor, CLIPModel

from eval.generate.manifest import NAME, Manifest, image_path, write_whole
from eval.metrics import resampling
from eval.metrics.extractors import (
    EXTRACTORS,
    RESIZES,
    Extractor,
    Pictures,
    features,
    few_pictures,
    load_extractor,
    read_pictures,
    weights_of,
)
from eval.metrics.resampling import Change, Resampled, of_frechet, of_kernel, of_mean
from pipelines.emoji import MODELS, weights_hash
from pipelines.emoji.scorer import EmojiScorer

FORMAT = 1
PSNR_CAP_DB = (
    120.0  # more than any two pictures have that differ and are of less than 5,000 x 5,000 pixels
)
# The backbones of LPIPS by the start of their file's SHA-256: alexnet-owt-7be5be79.pth, vgg16-397923af.pth.
LPIPS_NETS = {"7be5be79": "alex", "397923af": "vgg"}
PACKAGES = ("torch", "torchmetrics", "scipy", "transformers")


class Alignment(Protocol):
    """How well pictures show their prompts. identity: "name", of the metric, and what else it depends on."""

    identity: dict[str, Any]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 [B, 3, H, W] -> [B], more is better"""
        ...


class EmojiAlignment:
    """The emoji scorer's: cosine x 100, from a head trained apart from every pipeline. No CLIP score."""

    def __init__(self) -> None:
        self.scorer = EmojiScorer.load()
        networks = nn.ModuleList([self.scorer.lite0, self.scorer.minilm, self.scorer.head])
        self.identity = {
            "name": "emoji_alignment",
            "weights": weights_of(networks),
            "retrieval": self.scorer.retrieval,
        }

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scorer.score(images, prompts)


class ClipAlignment:
    """The CLIP score, max(100 cos, 0) of each picture, of a CLIP model on the hub or in a folder.

    Raises:
        ValueError: if it is another kind of model.
    """

    def __init__(self, source: str | Path) -> None:
        clip = AutoModel.from_pretrained(source)
        if not isinstance(clip, CLIPModel):
            raise ValueError(
                f"{source} is a {type(clip).__name__}, no CLIPModel; name one of those"
            )
        clip = clip.eval().requires_grad_(False)
        longest = clip.config.text_config.max_position_embeddings
        # Cut by the tokenizer, a long prompt keeps its end token, which CLIP reads the text's features from.
        processor = functools.partial(
            AutoProcessor.from_pretrained(source), truncation=True, max_length=longest
        )
        self.parts = (_Clip(clip), processor)
        self.identity = {
            "name": "clip_score",
            "model": Path(source).name if Path(source).is_dir() else str(source),
            "weights": weights_of(clip),
        }

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(images, prompts, strict=True)
        return torch.stack(
            [clip_score(image, prompt, lambda: self.parts) for image, prompt in pairs]
        )


class _Clip(nn.Module):
    """As torchmetrics 1.9 expects it: since transformers 5 features come inside of an output."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip, self.config = clip, clip.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.clip.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.clip.get_text_features(tokens, mask).pooler_output


class Lpips:
    """LPIPS with torchmetrics' linear heads and a local file of torchvision's AlexNet or VGG-16.

    Raises:
        ValueError: if the file is another.
        ImportError: without torchvision.
    """

    def __init__(self, path: str | Path) -> None:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        name = LPIPS_NETS.get(digest[:8])
        if name is None:
            raise ValueError(
                f"{path} is no backbone of LPIPS: its SHA-256 starts with {digest[:8]}, not with "
                f"{' or '.join(LPIPS_NETS)}; take torchvision's alexnet-owt-7be5be79.pth or "
                "vgg16-397923af.pth"
            )
        try:
            self.net = lpips._NoTrainLpips(net=name, pnet_rand=True)
        except ModuleNotFoundError as error:
            raise ImportError(
                "LPIPS needs the torchvision that fits your torch; install it, or leave out --lpips-path"
            ) from error
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # "features.3.weight" there is "slice2.3.weight" here.
        names = {name: f"features.{name.split('.', 1)[1]}" for name in self.net.net.state_dict()}
        self.net.net.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
        self.identity = {"name": f"lpips-{name}", "weights": weights_of(self.net)}

    @torch.no_grad()
    def __call__(self, mine: Tensor, others: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] x 2 -> [B]"""
        return self.net(mine / 255, others / 255, normalize=True).flatten()


@dataclass(frozen=True)
class Run:
    """A finished run folder."""

    folder: Path
    manifest: Manifest
    pictures: Pictures

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Raises ValueError if an image is missing."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        files = [image_path(folder, index) for index in range(len(manifest))]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(
                f"{len(missing)} of {len(files)} images are missing from {folder}, the first is "
                f"{missing[0].name}; finish the run by the command that began it"
            )
        return cls(folder, manifest, Pictures(files, folder, (folder / NAME).read_bytes()))

    def inputs(self) -> dict[str, str]:
        """What a score depends on."""
        digest = hashlib.sha256((self.folder / NAME).read_bytes()).hexdigest()[:16]
        return {"manifest": digest, "images": self.pictures.digest}


def check_match(run: Run, reference: Run) -> None:
    """Whether image i of both was made by one model from one prompt and seed, in one size.

    Raises:
        ValueError: naming the first thing that differs.
    """
    here, there = run.manifest, reference.manifest

    def differ(what: str, mine: Any, other: Any) -> ValueError:
        return ValueError(
            f"{what}: {mine} in {run.folder}, {other} in {reference.folder}; a run is scored against the "
            "unreduced run of the same model, prompts, seeds and size"
        )

    if here.pipeline["weights"] != there.pipeline["weights"]:
        raise differ("weights", here.pipeline["weights"], there.pipeline["weights"])
    if len(here) != len(there):
        raise differ("images", len(here), len(there))
    for index in range(len(here)):
        for what, mine, other in (
            ("prompt", here.prompts, there.prompts),
            ("seed", here.seeds, there.seeds),
        ):
            if mine[index] != other[index]:
                raise differ(f"{what} of image {index}", repr(mine[index]), repr(other[index]))
        sizes = []
        for one in (run, reference):
            with Image.open(image_path(one.folder, index)) as image:
                sizes.append(f"{image.height} x {image.width}")
        if sizes[0] != sizes[1]:
            raise differ(f"height x width of image {index}", *sizes)


def psnr_db(mine: Tensor, others: Tensor) -> Tensor:
    """Of each picture to the one at its place.  uint8 [B, 3, H, W] x 2 -> [B], float64"""
    x, y = mine.double(), others.double()
    psnr = peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return psnr.clamp(max=PSNR_CAP_DB)


def drift(mine: Pictures, others: Pictures, perceptual: Lpips | None = None) -> dict[str, Tensor]:
    """Of each picture from the one at its place: PSNR, SSIM and, if given, LPIPS."""
    found: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": []}
    for a, b in zip(mine.batches(), others.batches(), strict=True):
        x, y = a.double(), b.double()
        ssim = structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")
        found["psnr_db"].append(psnr_db(a, b))
        found["ssim"].append(ssim)
        if perceptual is not None:
            found.setdefault("lpips", []).append(perceptual(a, b))
    return {name: torch.cat(values) for name, values in found.items()}


def score(
    run: str | Path,
    reference: str | Path,
    *,
    extractor: Extractor,
    alignment: Alignment | None,
    real: str | Path | None = None,
    perceptual: Lpips | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """All scores of a run, also written to `out`; what lies there of the same inputs is reused.

    Args:
        run, reference: Run folders; a run against itself gives the reference's own scores.
        extractor: Of feature distances.
        alignment: Left out of the scores if None.
        real: A folder or file, as of `read_pictures`.
        perceptual: LPIPS, left out if None.
        out: scores/<setting>.json beside the run folder unless given.

    Returns:
        "metrics": each with "value", "low", "high" (95 %), "n" and where needed "warning"; "per_image" and
        "draws", which `compare` reads; "inputs": what all depends on.

    Raises:
        ValueError: if the runs do not match image by image.
    """
    mine, base = Run.read(run), Run.read(reference)
    check_match(mine, base)
    out = Path(out or _place(mine.folder, mine.manifest))
    # Beside the scores: the pictures may lie where nothing may be written.
    wild = None if real is None else read_pictures(real, out.parent / "real")
    inputs = {
        "run": mine.inputs(),
        "reference": base.inputs(),
        "real": None if wild is None else {"images": wild.digest, "n": len(wild)},
        "extractor": extractor.identity,
        "alignment": None if alignment is None else alignment.identity,
        "lpips": None if perceptual is None else perceptual.identity,
        "psnr_cap_db": PSNR_CAP_DB,
        "bootstrap": {"seed": resampling.SEED, "means": resampling.MANY, "fd": resampling.FEW},
    }
    if out.exists():
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        if found.get("format") == FORMAT and found["inputs"] == json.loads(json.dumps(inputs)):
            return found

    rows, base_rows = features(extractor, mine.pictures), features(extractor, base.pictures)
    per_image = drift(mine.pictures, base.pictures, perceptual)
    per_image["feature_distance"] = 1 - F.cosine_similarity(rows.double(), base_rows.double())
    if alignment is not None:
        per_image[alignment.identity["name"]] = _aligned(alignment, mine)
    metrics: dict[str, dict[str, Any]] = {
        name: of_mean(values).entry() for name, values in per_image.items()
    }
    frechet, kernel = extractor.names
    draws, remarks = _distances(frechet, kernel, rows, base_rows, paired=True)
    if wild is not None:
        names = (f"{frechet}-real", f"{kernel}-real")
        real_draws, real_remarks = _distances(*names, rows, features(extractor, wild), paired=False)
        draws |= real_draws
        remarks |= real_remarks
    metrics |= {name: drawn.entry() for name, drawn in draws.items()}
    for name, remark in remarks.items():
        metrics[name]["warning"] = remark
    result = {
        "format": FORMAT,
        "pipeline": dict(mine.manifest.pipeline),
        "setting": dict(mine.manifest.setting),
        "n": len(rows),
        "inputs": inputs,
        "versions": {name: version(name) for name in PACKAGES},
        "metrics": metrics,
        "per_image": {name: values.tolist() for name, values in per_image.items()},
        "draws": {name: list(drawn.draws) for name, drawn in draws.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(out, text.encode())
    return result


def compare(
    mine: Mapping[str, Any], others: Mapping[str, Any], metric: str, *, relative: bool
) -> Change:
    """By how much a metric of one scored setting is more than another's, image by image.

    relative: as a share of the other's, such as `upper` = 0.05: at most 5 % more, with 95 % confidence.

    Raises:
        ValueError: if they were not scored against the same pictures in the same way, or lack the metric.
    """
    for name, value in mine["inputs"].items():
        if name != "run" and value != others["inputs"][name]:
            raise ValueError(f"{name} is {value} of one, {others['inputs'][name]} of the other")
    a, b = (_resampled(result, metric) for result in (mine, others))
    return resampling.relative_increase(a, b) if relative else resampling.difference(a, b)


def changes(mine: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, dict[str, float | int]]:
    """By what share alignment and the distance to real pictures are more than the unreduced run's.

    Named <metric>-change; a loss is held to a limit by `lower` (alignment) and `upper` (distance). What may
    be 0 or less has no such share, and is left out.
    """
    found = {}
    alignment = mine["inputs"]["alignment"]
    for name in mine["metrics"]:
        its_own = name.endswith("-real") or (alignment and name == alignment["name"])
        if its_own and min(_resampled(base, name).draws) > 0:
            found[f"{name}-change"] = compare(mine, base, name, relative=True).to_dict()
    return found


def default_alignment(weights: str) -> EmojiAlignment | None:
    """The emoji scorer for pipelines embedded here; None for others, which need a CLIP model."""
    embedded = weights in map(weights_hash, MODELS)
    return EmojiAlignment() if embedded else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m eval score`."""
    parser.add_argument("--run", type=Path, required=True, help="run folder to score")
    parser.add_argument(
        "--reference", type=Path, help="unreduced run folder; default: `unreduced` beside the run"
    )
    add_scoring_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: scores/<setting>.json beside the run")


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """With what to score; see `scoring`."""
    parser.add_argument("--real", type=Path, help="real pictures: a folder, .npy or .npz")
    parser.add_argument(
        "--features", choices=EXTRACTORS, default=EXTRACTORS[0], help="(%(default)s)"
    )
    parser.add_argument("--features-path", type=Path, help="file with the weights of --features")
    parser.add_argument("--resize", choices=RESIZES, default=RESIZES[0], help="(%(default)s)")
    parser.add_argument(
        "--clip",
        help="CLIP model on the hub or in a folder; default: the emoji scorer for embedded pipelines",
    )
    parser.add_argument(
        "--lpips-path", type=Path, help="file of torchvision's AlexNet or VGG-16; default: no LPIPS"
    )


def scoring(args: argparse.Namespace, weights: str) -> dict[str, Any]:
    """Arguments of `score` by those of `add_scoring_arguments`, for a pipeline of these weights."""
    return {
        "extractor": load_extractor(args.features, resize=args.resize, path=args.features_path),
        "alignment": ClipAlignment(args.clip) if args.clip else default_alignment(weights),
        "real": args.real,
        "perceptual": Lpips(args.lpips_path) if args.lpips_path else None,
    }


def main(args: argparse.Namespace) -> int:
    """`python -m eval score`. A mistake in the arguments is a ValueError."""
    manifest = Manifest.load(args.run)
    out = args.out or _place(args.run, manifest)
    result = score(
        args.run,
        args.reference or args.run.parent / "unreduced",
        out=out,
        **scoring(args, manifest.pipeline["weights"]),
    )
    print(f"{out}: {result['n']} images, 95 % intervals")
    for name, entry in result["metrics"].items():
        print(f"{name:24} {entry['value']:10.4f} ({entry['low']:.4f} to {entry['high']:.4f})")
        if "warning" in entry:
            print(f"{'':24} {entry['warning']}")
    return 0


def _aligned(alignment: Alignment, run: Run) -> Tensor:
    parts: list[Tensor] = []
    start = 0
    for batch in run.pictures.batches():
        parts.append(alignment(batch, run.manifest.prompts[start : start + len(batch)]))
        start += len(batch)
    return torch.cat(parts)


def _distances(
    frechet: str, kernel: str, rows: Tensor, others: Tensor, *, paired: bool
) -> tuple[dict[str, Resampled], dict[str, str]]:
    """Both distances under these names, and what is to be said of either."""
    found = {
        frechet: of_frechet(rows, others, paired=paired),
        kernel: of_kernel(rows, others, paired=paired),
    }
    remarks = {}
    if few := few_pictures(rows, others):
        remarks[frechet] = few
    if paired:
        remarks[kernel] = (
            "biased downwards, as both sets have the same prompts and seeds; compare settings only"
        )
    return found, remarks


def _place(folder: Path, manifest: Manifest) -> Path:
    return folder.parent / "scores" / f"{manifest.setting['name']}.json"


def _resampled(result: Mapping[str, Any], metric: str) -> Resampled:
    if metric in result["per_image"]:
        return of_mean(result["per_image"][metric])
    if metric not in result["draws"]:
        raise ValueError(f"no {metric} among {', '.join(result['metrics'])}; score both with it")
    entry = result["metrics"][metric]
    return Resampled(entry["value"], tuple(result["draws"][metric]), entry["n"])
