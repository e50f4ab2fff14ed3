"""The tables of encoders: what every method costs at the same FLOPs saved, from committed rows."""

from __future__ import annotations

from typing import Any

from eval.jsonl import read
from eval.provenance import ROOT
from eval.report.cells import head, interval, versions
from eval.statistics import Resampled, difference, of_mean, of_rank_correlation

ENCODERS = ROOT / "eval" / "results" / "encoders.jsonl"
SAVED = (20, 40, 60)
SUBJECTS = ("vit", "noisy", "keywords", "pairs")
"""Each has its two tables in a document."""
NAMES = {
    "random-prune": "at random, prune, uncounted",
    "random-counted": "at random, prune",
    "random-mean": "at random, mean",
    "tome-mean": "ToMe, mean",
    "tome-uncounted": "ToMe, mean, uncounted",
    "tome-mlerp": "ToMe, MLERP",
    "tome-prune": "ToMe, prune",
    "tofu-depth": "ToFu by depth",
    "tofu-uncounted": "ToFu by depth, uncounted",
    "tofu-linearity": "ToFu by measured linearity",
    "pitome-mean": "PiToMe, mean",
    "pitome-mlerp": "PiToMe, MLERP",
    "attention-prune": "received attention, prune, uncounted",
    "attention-counted": "received attention, prune",
    "attention-mean": "received attention, mean",
    "gradient-prune": "gradient probe, prune, uncounted",
    "gradient-mean": "gradient probe, mean",
    "hybrid-prune": "attention x gradient, prune, uncounted",
    "hybrid-mean": "attention x gradient, mean",
    "policy-tome": "ToMe, mean, learned schedule",
    "policy-attention": "received attention, prune, uncounted, learned schedule",
}
RIVALS = {
    "tome-mean": "ToMe",
    "attention-prune": "pruning by attention",
    "random-prune": "pruning at random",
}
CLAIMED = ("tofu-depth", "tofu-linearity", "tofu-uncounted", "pitome-mean", "policy-tome")

Row = dict[str, Any]


def of(subject: str) -> dict[str, Row]:
    """The rows of a subject, by what stands behind its name in their ids."""
    return {row["id"].split("/")[1]: row for row in read(ENCODERS) if row["subject"] == subject}


def cite(row: Row) -> str:
    """The comment that names a row."""
    return f"<!-- row: {ENCODERS.name}#{row['id']} -->"


def main(row: Row) -> str:
    """The metric that the tables show, its first."""
    return next(iter(row["metrics"]))


def resampled(row: Row) -> Resampled:
    """The main metric of a row, to be compared item by item."""
    scores = row["scores"][main(row)]
    if isinstance(scores[0], list):
        return of_rank_correlation(*zip(*scores, strict=True))
    return of_mean(scores)


def encoders_table(subject: str) -> str:
    """Metric and time of every method at every saving."""
    rows = of(subject)
    whole = rows["unreduced"]
    metric = main(whole)
    others = ", ".join(
        f"{name} {interval(entry, 3)}" for name, entry in whole["metrics"].items() if name != metric
    )
    about = (
        f"Unreduced: {metric} {interval(whole['metrics'][metric], 3)} {cite(whole)}"
        f"{', ' + others if others else ''}; n = {whole['n']}, weights {whole['weights']}; "
        f"{whole['device']}, {whole['threads']} thread; {versions(whole)}. Each cell: {metric} with its 95 % "
        "bootstrap interval; how many times less processor time a batch takes, by turns with the unreduced, "
        "on a shared machine, median (p20 to p80). Uncounted: `proportional_attention=False`."
    )
    names = ["FLOPs saved", *(f"{saved} %" for saved in SAVED)]
    lines = head(names)
    for name, label in NAMES.items():
        if not any(f"{name}-{saved}" in rows for saved in SAVED):
            continue
        cells = [cell(rows.get(f"{name}-{saved}"), metric) for saved in SAVED]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([about, "", *lines])


def cell(row: Row | None, metric: str) -> str:
    """What stands in the table."""
    if row is None:
        return ""
    times = "" if row["speed"] is None else f"; {interval(row['speed'], 2, 'x')}"
    return f"{interval(row['metrics'][metric], 3)}{times} {cite(row)}"


def ahead_of(subject: str) -> str:
    """By how much the published methods are ahead, item by item, of what they were compared with."""
    rows = of(subject)
    names = [f"{main(rows['unreduced'])}, ahead of", "the unreduced", *RIVALS.values()]
    lines = head(names)
    for name in CLAIMED:
        for saved in SAVED:
            row = rows.get(f"{name}-{saved}")
            if row is None:
                continue
            cells = []
            for rival in ("unreduced", *(f"{rival}-{saved}" for rival in RIVALS)):
                if rival not in rows:
                    cells.append("")
                    continue
                gain = difference(resampled(row), resampled(rows[rival]))
                cells.append(f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
            lines.append(f"| {NAMES[name]}, {saved} % {cite(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)
