"""The tables of all ways to save: what each costs in drift, from committed rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from eval.jsonl import read
from eval.report.cells import head, interval, line
from eval.report.tables_rows import (
    Row,
    ahead,
    by_name,
    circumstances,
    cite,
    described,
    drift,
    files,
    side_by_side,
)
from eval.report.tables_tuned import TUNED
from eval.studies.stages import MERGING, SPEEDS, typed

FRONT, HIRES = files("front"), files("hires")
STEPS = 25
"""Of every row here."""


def typed_order(row: Row) -> tuple[bool, float, str]:
    """Ratios first; then each speed-up before the fewer steps that save as much."""
    kind = row["setting"]["name"].split("-")[0]
    return kind != "ratio", round(row["flops_ratio"], 1), kind


def typed_table() -> str:
    """The values that people type, both models side by side."""
    names = {trial.setting.name for trial in typed(STEPS)}
    shown: dict[str, dict[str, Row]] = {}
    for model, path in FRONT.items():
        rows = (row for row in read(path) if row["setting"]["name"] in names)
        for row in sorted(rows, key=typed_order):
            kind, amount = row["setting"]["name"].split("-")
            label = f"{amount} steps" if kind == "steps" else f"`{kind}={amount}`"
            shown.setdefault(label, {})[model] = row
    return side_by_side(shown, FRONT)


def steps_table() -> str:
    """Steps skipped, by default and tuned, and as many fewer."""
    names = ["", "FLOPs", "default, dB", "ahead of fewer steps", "of fewer, DPM-Solver++"]
    names += ["tuned, dB", "ahead of fewer steps"]
    lines = head(names)
    every: list[Row] = []
    for model, path in FRONT.items():
        rows, tuned = by_name(read(path)), {row["id"]: row for row in read(TUNED[model])}
        for speedup in (*SPEEDS, 4):
            count = int(STEPS / speedup)
            own, fewer = rows[f"speedup-{speedup:g}"], rows[f"steps-{count}"]
            second = rows[f"multistep-{count}"]
            fitted = tuned[f"{model}-128px-{STEPS}steps-n{own['n']}/tuned-{speedup:g}"]
            every.append(own)
            cells = [
                f"`{model}`, `speedup={speedup:g}` {cite(path, own)}",
                f"{own['flops_ratio']:.2f}x",
                interval(own["metrics"]["psnr_db"], 1),
                f"{ahead(own, fewer)} {cite(path, fewer)}",
                f"{ahead(own, second)} {cite(path, second)}",
                f"{interval(fitted['metrics']['psnr_db'], 1)} {cite(TUNED[model], fitted)}",
                ahead(fitted, fewer),
            ]
            lines.append(line(cells))
    return "\n".join([circumstances(every), "", *lines])


TOKENS = (
    *(f"ratio-{ratio}" for ratio in ("0.25", "0.5", "0.75")),
    "both-0.25-2",
    "both-0.5-2",
    *(f"{name}-0.5" for name in MERGING),
    *(f"{name}-attention-0.5" for name in MERGING),
    "tomesd-0.5",
    "early-random",
)
"""What removes tokens, by the names of its rows."""


def tokens_table() -> str:
    """What removes tokens, and how far it is ahead of fewer steps, as `like` chooses them."""
    cells = ("FLOPs", "PSNR, dB", "ahead of fewer steps")
    lines = head(["", *(f"`{model}`, {cell}" for model in FRONT for cell in cells)])
    rows = {model: by_name(read(path)) for model, path in FRONT.items()}
    for name in TOKENS:
        found = {model: rows[model].get(name) for model in FRONT}
        label = next(described(row) for row in found.values() if row is not None)
        shown = []
        for model, row in found.items():
            shown += ["", "", ""] if row is None else token_cells(FRONT[model], row, rows[model])
        lines.append(line([label, *shown]))
    every = [next(iter(those.values())) for those in rows.values()]
    return "\n".join([circumstances(every), "", *lines])


def token_cells(path: Path, row: Row, rows: Mapping[str, Row]) -> list[str]:
    """FLOPs, PSNR, and how far ahead of fewer steps."""
    fewer = like(row, rows.values())
    gained = "-" if fewer is None else f"{ahead(row, fewer)} {cite(path, fewer)}"
    return [
        f"{row['flops_ratio']:.2f}x {cite(path, row)}",
        interval(row["metrics"]["psnr_db"], 1),
        gained,
    ]


def hires_table() -> str:
    """Half of the tokens in a second pass, from upscaled pictures and from those that were made so large."""
    columns: dict[str, dict[str, Row]] = {}
    path_of = {}
    for model, path in HIRES.items():
        rows = read(path)
        for side, to in dict.fromkeys(tuple(row["sides"]) for row in rows):
            title = f"`{model}`, {side} to {to} px"
            columns[title] = by_name(row for row in rows if row["sides"] == [side, to])
            path_of[title] = path
    names = [name for name in TOKENS if any(name in rows for rows in columns.values())]
    lines = head(
        ["", *(f"{title}: {x}" for title in columns for x in ("dB", "ahead of fewer steps"))]
    )
    every: list[Row] = []
    for name in names:
        cells, label = [], ""
        for title, rows in columns.items():
            row = rows.get(name)
            if row is None:
                cells += ["", ""]
                continue
            every.append(row)
            label = described(row)
            _, psnr, gained = token_cells(path_of[title], row, rows)
            cells += [f"{psnr} {cite(path_of[title], row)}", gained]
        lines.append(line([label, *cells]))
    return "\n".join([circumstances(every), "", *lines])


def like(row: Row, rows: Iterable[Row]) -> Row | None:
    """Fewer steps of the own sampler to compare a row with; None if all of them save more.

    Of the fewest that save no more, and all that save more, what drifts least: with some numbers of steps
    a sampler drifts less than with a few more.
    """
    steps = [
        each
        for each in rows
        if each["setting"]["kind"] == "fewer_steps"
        and "scheduler" not in each["setting"]["options"]
    ]

    def saved(each: Row) -> float:
        return float(each["flops_ratio"])

    less = [each for each in steps if saved(each) <= row["flops_ratio"]]
    more = [each for each in steps if saved(each) > row["flops_ratio"]]
    if not less:
        return None
    return max([max(less, key=saved), *more], key=drift)


def drift_table(model: str) -> str:
    """All rows of a model, the least drift first."""
    rows = sorted(read(FRONT[model]), key=drift, reverse=True)
    lines = head(["", "FLOPs", "PSNR, dB", "lowest"])
    for row in rows:
        cells = [
            f"{described(row)} {cite(FRONT[model], row)}",
            f"{row['flops_ratio']:.2f}x",
            interval(row["metrics"]["psnr_db"], 1),
            f"{min(row['psnr_db']):.1f}",
        ]
        lines.append(line(cells))
    return "\n".join([circumstances(rows), "", *lines])


# In the plots: step skipping, fewer steps, what removes tokens, and what must be beaten.
DRAWN = (
    "speedup-1.5", "speedup-2", "speedup-3", "speedup-4", "steps-16", "steps-12", "steps-8", "steps-6",
    "multistep-12", "ratio-0.25", "ratio-0.5", "ratio-0.75", "both-0.25-2", "speedup-as-both-0.25-2",
    "tofu-0.5", "tome-0.5", "pitome-0.5", "random-0.5", "tomesd-0.5", "deepcache-2", "taylorseer-2",
    "early-random",
)  # fmt: skip


def drawn_rows(model: str) -> list[Row]:
    """Those of a model's plot."""
    rows = by_name(read(FRONT[model]))
    return [rows[name] for name in DRAWN if name in rows]
