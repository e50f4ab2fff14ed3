"""The tables of the skip rules and of the search over whole schedules, from committed rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from eval.jsonl import read
from eval.provenance import ROOT
from eval.report.cells import head, interval, line
from eval.report.tables_rows import Row, ahead, circumstances, cite, drift, files, sampler

CHOSEN_WARMUP = {"unet": 2, "mmdit": 4}
"""Of rule "late" when it was the default."""
RULES = files("rules")
SEARCHED = ROOT / "eval" / "results" / "searched.jsonl"


Group = dict[float, dict[str, Row]]
"""By speed-up, the best row of each rule and fewer steps, by name."""


def groups() -> dict[tuple[str, int, str], Group]:
    """By pipeline, steps and sampler in words."""
    found: dict[tuple[str, int, str], Group] = {}
    for model, path in RULES.items():
        for row in read(path):
            group = found.setdefault((model, row["steps"], sampler(row)), {})
            speedup = float(row["setting"]["name"].split("-")[1])
            rule = row["setting"]["options"].get("rule", "fewer steps")
            best = group.setdefault(speedup, {})
            if rule not in best or drift(row) > drift(best[rule]):
                best[rule] = row
    return found


def rules_table() -> str:
    """The default rule at every speed-up, and how far it is ahead of the best other one."""
    return table(groups(), default_ahead)


def lengths_table() -> str:
    """The default rule in short and long generations, and how far it is ahead of fewer steps."""
    own = {key: group for key, group in groups().items() if not key[2]}
    return table(own, ahead_of_fewer)


def table(
    shown: Mapping[tuple[str, int, str], Group], cell: Callable[[Path, Mapping[str, Row]], str]
) -> str:
    """A line a group, and a column a speed-up."""
    speedups = sorted({speedup for group in shown.values() for speedup in group})
    lines = head(["", *(f"{speedup:g}x" for speedup in speedups)])
    for (model, steps, also), group in shown.items():
        cells = (cell(RULES[model], group[speedup]) for speedup in speedups)
        lines.append(line([f"`{model}`, {steps} steps{also}", *cells]))
    every = [row for group in shown.values() for rows in group.values() for row in rows.values()]
    return "\n".join([circumstances(every), "", *lines])


def default_ahead(path: Path, rows: Mapping[str, Row]) -> str:
    """The PSNR of rule "trajectory", how much more than the best of the other rules, and than fewer steps."""
    own, fewer = rows["trajectory"], rows["fewer steps"]
    other = max((row for row in rows.values() if row not in (own, fewer)), key=drift)
    gains = (f"{drift(own) - drift(row):+.1f} {cite(path, row)}" for row in (other, fewer))
    return f"{drift(own):.1f} {cite(path, own)} ({', '.join(gains)})"


def ahead_of_fewer(path: Path, rows: Mapping[str, Row]) -> str:
    """Its PSNR, and how much more than of fewer steps, picture by picture."""
    own, fewer = rows["trajectory"], rows["fewer steps"]
    return f"{drift(own):.1f} {cite(path, own)}: {ahead(own, fewer)} {cite(path, fewer)}"


def searched_table() -> str:
    """What a search over whole schedules finds, beside the default rule's own choice."""
    lines = [
        "| | rule `trajectory`, dB | found, dB | ahead, dB | on the prompts of the search | schedules |",
        "|---|---|---|---|---|---|",
    ]
    rows = read(SEARCHED)
    for row in rows:
        ahead = row["ahead_db"]
        drawn = (
            "".join("#" if step in computed else "." for step in range(row["steps"]))
            for computed in row["schedules"].values()
        )
        cells = [
            f"`{row['pipeline']}`, {row['call']['width']} px, {row['steps']} steps{sampler(row)}, "
            f"{row['speedup']:g}x {cite(SEARCHED, row)}",
            interval(row["planned"], 1),
            interval(row["found"], 1),
            f"{ahead['held_out']:+.1f} ({ahead['low']:+.1f} to {ahead['high']:+.1f})",
            f"{ahead['searched']:+.1f}",
            "<br>".join(f"`{each}`" for each in drawn),
        ]
        lines.append(line(cells))
    return "\n".join([circumstances(rows), "", *lines])
