"""The tables of distances between sets of pictures, and of alignment, from committed sweeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.report.cells import head, interval, line
from eval.report.tables_rows import Row, by_name, circumstances, cite, described, files
from eval.studies.stages import MERGING

DISTANCES = files("distances", "json")
FD, KID, ALIGNMENT = "fd-effnetlite0-real", "kid-effnetlite0-real", "emoji_alignment"
WORSE = {FD: "upper", ALIGNMENT: "lower"}
"""The one-sided bound of a change that says how much worse it may be."""


def sweep_rows(path: Path) -> dict[str, Row]:
    """The rows of a committed sweep by name."""
    return by_name(json.loads(path.read_text(encoding="utf-8"))["rows"])


def distances_table() -> str:
    """How far sets of pictures are from those of training, and how much worse than unreduced at most."""
    names = ["", "FLOPs", "PSNR, dB", "alignment", "lost at most"]
    lines = head([*names, "Frechet distance", "more at most", "KID x 1000"])
    every: list[Row] = []
    for path in DISTANCES.values():
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
            ]
            lines.append(line(cells))
    return "\n".join([circumstances(every), "", *lines])


def worst(metrics: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """How much worse a metric is at most, one-sided with 95 % confidence."""
    change = metrics[f"{name}-change"]
    worse = change["upper"] if WORSE[name] == "upper" else -change["lower"]
    return f"{max(0.0, worse):.1%}"


def claim_table() -> str:
    """ToFu at half of the tokens: how much more or less than others its pictures score, pair by pair."""
    metrics = {FD: "Frechet distance", KID: "KID", ALIGNMENT: "alignment"}
    sweeps = {path: sweep_rows(path) for path in DISTANCES.values()}
    heads = (f"`{model}`, {title}" for model in DISTANCES for title in metrics.values())
    lines = head(["ToFu instead of", *heads])
    names = [f"{rival}{scope}-0.5" for scope in ("", "-attention") for rival in MERGING]
    for name in names:
        found = {path: rows[name] for path, rows in sweeps.items() if name in rows}
        if not found or name.startswith("tofu"):
            continue
        cells = [described(next(iter(found.values())))]
        mine = "tofu-attention-0.5" if "-attention" in name else "tofu-0.5"
        for path, row in found.items():
            # Rows have how much another is more than ToFu, as a share of ToFu's.
            distance, *others = (less(row["against"][mine][f"{each}-change"]) for each in metrics)
            cells += [f"{distance} {cite(path, row)}", *others]
        lines.append(line(cells))
    every = [rows["unreduced"] for rows in sweeps.values()]
    return "\n".join([circumstances(every), "", *lines])


def less(change: Mapping[str, float]) -> str:
    """A change the other way round: from 0.25 more to 0.2 less."""

    def back(value: float) -> float:
        return 1 / (1 + value) - 1

    value, low, high = (back(change[key]) for key in ("value", "high", "low"))
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"
