"""The tables of what else saves FLOPs, beside the default at as many or fewer, from committed rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.jsonl import read
from eval.report.cells import interval, line
from eval.report.tables_front import FRONT
from eval.report.tables_rows import Row, ahead, by_name, circumstances, cite, drift, files

RIVALS = files("rivals")
NAMES = {
    "multistep-12": "12 steps, DPM-Solver++",
    "repeat-12": "12 of 25 steps, repeated between",
    "pab-2": "Pyramid Attention Broadcast (diffusers)",
    "taylorseer-2": "TaylorSeer, every 2nd step (diffusers)",
    "taylorseer-3": "TaylorSeer, every 3rd step (diffusers)",
    "early-random": "few tokens early (JiT's shares), at random",
    "early-tome": "few tokens early (JiT's shares), by ToMe",
    "deepcache-2": "DeepCache, every 2nd step",
    "deepcache-3": "DeepCache, every 3rd step",
    "both-0.25-2": "`ratio=0.25` and `speedup=2`",
    "both-0.5-2": "`ratio=0.5` and `speedup=2`",
}
FORECASTS = {"repeat": "", "taylorseer": " with TaylorSeer", "foca": " with FoCa"}


Pair = tuple[Row, Row]
"""Another's row, and the default's at as many FLOPs or fewer."""


def pairs(path: Path) -> list[Pair]:
    """All that have both, from little to much saved."""
    rows = by_name(read(path))
    found = [(row, rows.get(f"speedup-as-{name}")) for name, row in rows.items()]
    both = [(row, default) for row, default in found if default is not None]
    return sorted(both, key=lambda pair: float(pair[0]["flops_ratio"]))


def rivals_table() -> str:
    """What else makes fewer FLOPs of a pipeline, and how far the default is ahead at as many or fewer."""
    return table({path: pairs(path) for path in RIVALS.values()})


def closest_table(paths: Mapping[str, Path]) -> str:
    """Of each cache, whatever its threshold or interval, the setting that the default is least ahead of."""
    return table({path: [*closest(filter(cache, pairs(path)))] for path in paths.values()})


def both_table() -> str:
    """Both workflows together, beside step skipping alone."""
    return table({path: [*filter(both, pairs(path))] for path in FRONT.values()})


def both(pair: Pair) -> bool:
    """Whether a pair is of both workflows."""
    return bool(pair[0]["setting"]["kind"] == "both")


def cache(pair: Pair) -> bool:
    """Whether a pair is of what reuses or forecasts: no other solver, no fewer tokens."""
    return pair[0]["setting"]["kind"] not in ("fewer_steps", "tofu", "tomesd", "both")


def closest(found: Iterable[Pair]) -> Iterator[Pair]:
    """One pair of each rival; what tells its settings apart is the end of their names."""
    groups: dict[str, list[Pair]] = {}
    for pair in found:
        groups.setdefault(pair[0]["setting"]["name"].rpartition("-")[0], []).append(pair)
    for group in groups.values():
        yield min(group, key=lambda pair: drift(pair[1]) - drift(pair[0]))


def table(found: Mapping[Path, Sequence[Pair]]) -> str:
    """A line a pair."""
    lines = [
        "| | FLOPs | PSNR, dB | `speedup=`, FLOPs | ahead by, dB |",
        "|---|---|---|---|---|",
    ]
    every: list[Row] = []
    for path, those in found.items():
        for row, default in those:
            every += [row, default]
            cells = [
                f"`{row['pipeline']}`, {named(row['setting'])} {cite(path, row)}",
                f"{row['flops_ratio']:.2f}x",
                interval(row["metrics"]["psnr_db"], 1),
                f"{default['flops_ratio']:.2f}x {cite(path, default)}",
                ahead(default, row),
            ]
            lines.append(line(cells))
    return "\n".join([circumstances(every), "", *lines])


def named(setting: dict[str, Any]) -> str:
    """A setting of another package, in words."""
    options = setting["options"]
    if setting["kind"] == "seacache":
        return f"SeaCache's rule, threshold {options['threshold']:g}"
    if setting["kind"] == "magcache":
        return f"MagCache (diffusers), threshold {options['threshold']:g}"
    if setting["kind"] == "dbcache":
        return f"DBCache{FORECASTS[options['forecast']]} (cache-dit), threshold {options['threshold']:g}"
    return NAMES.get(setting["name"], setting["name"])
