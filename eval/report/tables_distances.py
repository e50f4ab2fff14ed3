"""The tables of distances between sets of pictures, and of alignment, from committed sweeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.report.cells import head, interval, line
from eval.report.tables_rows import DRIFT, Row, by_name, circumstances, cite, described, files
from eval.studies.stages import MERGING

DISTANCES = files("distances", "json")
SIZES = {"64 px": DISTANCES, "128 px": files("distances_128px", "json")}
FD, KID, ALIGNMENT = "fd-effnetlite0-real", "kid-effnetlite0-real", "emoji_alignment"
NAMES = {ALIGNMENT: "alignment", FD: "Frechet distance", KID: "KID"}
WORSE = {FD: "upper", KID: "upper", ALIGNMENT: "lower"}
"""The one-sided bound of a change that says how much worse it may be."""
SHARP = ("speedup-2", "steps-12", "speedup-3", "steps-8", "ratio-0.5", "damaged")
"""What must cost little, and what a sharp test sees."""
CHANGE = (
    "Change from the unreduced pipeline, picture by picture, with its 95 % bootstrap interval: less "
    "alignment and more distance are worse."
)
WHOLE = (
    f"{DRIFT} Alignment is the mean score, higher is better; of distances to the training pictures lower is "
    'better. "At most" is the one-sided 95 % bound of the change from the unreduced pipeline.'
)
INSTEAD = (
    "Change when ToFu takes the place of the method named, picture by picture, with its 95 % bootstrap "
    "interval: less distance and more alignment are better."
)


def sweep_rows(path: Path) -> dict[str, Row]:
    """The rows of a committed sweep by name."""
    return by_name(json.loads(path.read_text(encoding="utf-8"))["rows"])


def distances_table(paths: Mapping[str, Path]) -> str:
    """How far sets of pictures are from those of training, and how much worse than unreduced at most."""
    names = ["", "FLOPs", "PSNR, dB", "alignment", "lost at most"]
    lines = head([*names, "Frechet distance", "more at most", "KID x 1000", "more at most"])
    every: list[Row] = []
    for path in paths.values():
        for row in sweep_rows(path).values():
            every.append(row)
            metrics = row["metrics"]
            whole = row["setting"]["kind"] == "unreduced"
            kid = {key: metrics[KID][key] * 1000 for key in ("value", "low", "high")}
            cells = [
                f"`{row['pipeline']}`, {'unreduced' if whole else described(row)} {cite(path, row)}",
                "" if whole else f"{row['flops_ratio']:.2f}x",
                "" if whole else interval(metrics["psnr_db"], 1),
                interval(metrics[ALIGNMENT], 2),
                "" if whole else worst(metrics, ALIGNMENT),
                interval(metrics[FD], 1),
                "" if whole else worst(metrics, FD),
                interval(kid, 1),
                "" if whole else worst(metrics, KID),
            ]
            lines.append(line(cells))
    return "\n".join([circumstances(every, WHOLE), "", *lines])


def sharp_table() -> str:
    """How skipped steps, fewer steps and damage change alignment and distances, at both sizes."""
    lines = head(["", *(f"{px}: {each}" for px in SIZES for each in ("FLOPs", *NAMES.values()))])
    every: list[Row] = []
    for model in DISTANCES:
        sweeps = {paths[model]: sweep_rows(paths[model]) for paths in SIZES.values()}
        for name in SHARP:
            cells = []
            for path, rows in sweeps.items():
                row = rows[name]
                every.append(row)
                cells.append(f"{row['flops_ratio']:.2f}x {cite(path, row)}")
                cells += [share(row["metrics"][f"{metric}-change"]) for metric in NAMES]
            lines.append(line([f"`{model}`, {described(row)}", *cells]))
    return "\n".join([circumstances(every, CHANGE), "", *lines])


def share(change: Mapping[str, float]) -> str:
    """A relative change with its interval."""
    return f"{change['value']:+.1%} ({change['low']:+.1%} to {change['high']:+.1%})"


def worst(metrics: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """How much worse a metric is at most, one-sided with 95 % confidence."""
    change = metrics[f"{name}-change"]
    worse = change["upper"] if WORSE[name] == "upper" else -change["lower"]
    return f"{max(0.0, worse):.1%}"


def claim_table() -> str:
    """ToFu at half of the tokens: how much more or less than others its pictures score, pair by pair."""
    metrics = (FD, KID, ALIGNMENT)
    heads = (f"`{model}`, {NAMES[metric]}" for model in DISTANCES for metric in metrics)
    lines = head(["ToFu instead of", *heads])
    every: list[Row] = []
    rivals = [rival for rival in MERGING if rival != "tofu"]
    in_blocks = [f"{rival}-0.5" for rival in rivals]
    around = [f"{rival}-attention-0.5" for rival in rivals if rival != "random"]
    at_128_px = [f"{rival}-attention-0.5" for rival in ("tome", "prune")]
    for px, names in (("64 px", [*in_blocks, *around]), ("128 px", at_128_px)):
        sweeps = {path: sweep_rows(path) for path in SIZES[px].values()}
        for name in names:
            mine = "tofu-attention-0.5" if "-attention" in name else "tofu-0.5"
            cells = []
            for path, rows in sweeps.items():
                row = rows[name]
                every.append(row)
                # Rows have how much another is more than ToFu, as a share of ToFu's.
                distance, *others = (
                    less(row["against"][mine][f"{each}-change"]) for each in metrics
                )
                cells += [f"{distance} {cite(path, row)}", *others]
            lines.append(line([f"{described(row)}, {px}", *cells]))
    return "\n".join([circumstances(every, INSTEAD), "", *lines])


def less(change: Mapping[str, float]) -> str:
    """A change the other way round: from 0.25 more to 0.2 less."""

    def back(value: float) -> float:
        return 1 / (1 + value) - 1

    value, low, high = (back(change[key]) for key in ("value", "high", "low"))
    return share({"value": value, "low": low, "high": high})
