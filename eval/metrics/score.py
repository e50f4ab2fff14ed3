"""What did a setting cost in quality? Scores of a run's pictures against the unreduced ones, and real ones.

    python -m eval score --run sweep/half --reference sweep/unreduced

Picture i is compared with picture i of the reference, which the same prompt and seed made:

- psnr_db (identical pictures count as 120 dB), ssim, lpips, feature_distance (1 - cosine);
- emoji_alignment or clip_score: how well the picture shows its prompt;
- fd-..., kid-... (fid and kid for Inception): distances between the sets; -real: to the real pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.files import write_whole
from eval.generate.failed import by_prompt, failed, refuse
from eval.generate.manifest import NAME, Manifest, differing, image_path
from eval.metrics.alignment import Alignment, ClipAlignment, default_alignment
from eval.metrics.extractors import (
    EXTRACTORS,
    RESIZES,
    Extractor,
    Pictures,
    features,
    load_extractor,
    read_pictures,
)
from eval.metrics.frechet import few_pictures
from eval.metrics.paired import PSNR_CAP_DB, Lpips, drift
from eval.metrics.resampling import FEW, of_frechet, of_kernel
from eval.statistics import MANY, SEED, Change, Resampled, difference, of_mean, relative_increase

FORMAT = 1
PACKAGES = ("torch", "torchmetrics", "scipy", "transformers")
REFERENCE = "reference"
# How the fields of a manifest begin that must be those of the reference, and the word by which another one is
# asked for. The pictures themselves tell their size; what else a manifest says changes rounding at most.
MAY_DIFFER = {
    "pipeline.class": "pipeline",
    "pipeline.weights": "weights",
    "pipeline.name": None,
    "pipeline.": "scheduler",
    "call.num_inference_steps": "steps",
    "call.guidance_scale": "guidance",
    "call.height": None,
    "call.width": None,
    "call.": "call",
    "dtype": "dtype",
    "prompts": "prompts",
    "seeds": "seeds",
}
WORDS = (*dict.fromkeys(word for word in MAY_DIFFER.values() if word), REFERENCE)


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

    def failed(self, allowed: int) -> dict[str, str]:
        """The pictures that are none, and why; raises ValueError if more than allowed."""
        found = failed(self.folder, len(self.manifest))
        refuse(self.folder, by_prompt(self.manifest, found), len(self.manifest), allowed)
        return found

    def inputs(self) -> dict[str, str]:
        """What a score depends on."""
        digest = hashlib.sha256((self.folder / NAME).read_bytes()).hexdigest()[:16]
        return {"manifest": digest, "images": self.pictures.digest}


def check_match(run: Run, reference: Run, allowed: Collection[str] = ()) -> list[str]:
    """Whether image i of both was made from one prompt and seed in one way, but for the setting of the run.

    A setting that takes fewer steps or another sampler says so itself: the call that it replaces, and the
    pipeline, are those of the reference.

    Args:
        allowed: Of `MAY_DIFFER`, what may differ nevertheless.

    Returns:
        What does, a line each.

    Raises:
        ValueError: naming what else differs, with both values.
    """
    if unknown := sorted({*allowed} - {*WORDS}):
        raise ValueError(
            f"{unknown[0]!r} cannot be allowed to differ; choose of {', '.join(WORDS)}"
        )
    here, there = run.manifest, reference.manifest
    if len(here) != len(there):
        raise ValueError(
            f"images: {len(here)} in {run.folder}, {len(there)} in {reference.folder}; generate as many"
        )
    found = {}
    for name, mine, other in differing(here.to_dict(), there.to_dict()):
        word = next((word for start, word in MAY_DIFFER.items() if name.startswith(start)), None)
        if word is not None:
            found[f"{name}: {mine} of the run, {other} of the reference"] = word
    if (kind := there.setting["kind"]) != "unreduced":
        found[f"setting.kind: {kind!r} of the reference, which should be 'unreduced'"] = REFERENCE
    if refused := {line: word for line, word in found.items() if word not in allowed}:
        raise ValueError(
            "\n  ".join([f"{run.folder} is not to be scored against {reference.folder}:", *refused])
            + "\nscore it against the unreduced run of the same pipeline, call, prompts and seeds, or ask "
            f"for it: --allow-different {' '.join(dict.fromkeys(refused.values()))}"
        )
    for index in range(len(here)):
        with (
            Image.open(image_path(run.folder, index)) as image,
            Image.open(image_path(reference.folder, index)) as other_image,
        ):
            mine, other = (f"{each.height} x {each.width}" for each in (image, other_image))
        if mine != other:
            raise ValueError(
                f"height x width of image {index}: {mine} in {run.folder}, {other} in "
                f"{reference.folder}; generate both in one size"
            )
    return list(found)


def score(
    run: str | Path,
    reference: str | Path,
    *,
    extractor: Extractor,
    alignment: Alignment | None,
    real: str | Path | None = None,
    perceptual: Lpips | None = None,
    out: str | Path | None = None,
    allow_different: Collection[str] = (),
    allow_failed: int = 0,
) -> dict[str, Any]:
    """All scores of a run, also written to `out`; what lies there of the same inputs is reused.

    Args:
        run, reference: Run folders; a run against itself gives the reference's own scores.
        extractor: Of feature distances.
        alignment: Left out of the scores if None.
        real: A folder or file, as of `read_pictures`.
        perceptual: LPIPS, left out if None.
        out: scores/<setting>.json beside the run folder unless given.
        allow_different: As of `check_match`.
        allow_failed: How many pictures of each run may be of NaN or one colour. They are scored like others,
            and two that are black count as identical.

    Returns:
        "metrics": each with "value", "low", "high" (95 %), "n" and where needed "warning"; "per_image" and
        "draws", which `compare` reads; "inputs": what all depends on; "different": what differs but for the
        setting, as was asked for; "failed": the pictures of "run" and "reference" that are none.

    Raises:
        ValueError: if the runs do not match image by image, or more pictures failed than are allowed.
    """
    mine, base = Run.read(run), Run.read(reference)
    about = {
        "different": check_match(mine, base, allow_different),
        "failed": {"run": mine.failed(allow_failed), "reference": base.failed(allow_failed)},
    }
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
        "bootstrap": {"seed": SEED, "means": MANY, "fd": FEW},
    }
    if out.exists():
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        same = found.get("format") == FORMAT and found["inputs"] == json.loads(json.dumps(inputs))
        if same and about.items() <= found.items():
            return found

    if wild is not None:
        _warn_of_sizes(wild, mine.pictures)
    # The user's own first: what of them cannot be read is said before the rest is computed.
    wild_rows = None if wild is None else features(extractor, wild)
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
    if wild_rows is not None:
        names = (f"{frechet}-real", f"{kernel}-real")
        real_draws, real_remarks = _distances(*names, rows, wild_rows, paired=False)
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
        **about,
        "versions": {name: version(name) for name in PACKAGES},
        "metrics": metrics,
        "per_image": {name: values.tolist() for name, values in per_image.items()},
        "draws": {name: list(drawn.draws) for name, drawn in draws.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(out, text.encode())
    return result


def _warn_of_sizes(real: Pictures, made: Pictures) -> None:
    (_, h, w), (_, height, width) = real[0].shape, made[0].shape
    if (h, w) != (height, width):
        warnings.warn(
            f"the first real picture is {w} x {h} px and the first of the run {width} x {height}: both are "
            "resized for the extractor, and the distance to real pictures holds that, too; give real "
            "pictures made as large",
            stacklevel=3,
        )


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
    return relative_increase(a, b) if relative else difference(a, b)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m eval score`."""
    parser.add_argument("--run", type=Path, required=True, help="run folder to score")
    parser.add_argument(
        "--reference", type=Path, help="unreduced run folder; default: `unreduced` beside the run"
    )
    add_scoring_arguments(parser)
    parser.add_argument(
        "--allow-different",
        nargs="+",
        choices=WORDS,
        default=(),
        metavar="WHAT",
        help=f"what may differ from the reference but for the setting: {', '.join(WORDS)}",
    )
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
        "--allow-failed",
        type=int,
        default=0,
        metavar="N",
        help="how many pictures of a run may be of NaN or one colour (%(default)s)",
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
        "allow_failed": args.allow_failed,
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
        allow_different=args.allow_different,
        **scoring(args, manifest.pipeline["weights"]),
    )
    print(f"{out}: {result['n']} images, 95 % intervals")
    for line in result["different"]:
        print(f"differs: {line}")
    for which, found in result["failed"].items():
        if found:
            print(f"failed: {len(found)} pictures of the {which}")
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
