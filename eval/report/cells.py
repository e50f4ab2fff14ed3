"""What stands in the cells of a table of result rows, on the page and in documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eval.report.plots import Row, metric_names, metric_of, title

# What all rows should share, and what every row says of itself.
CIRCUMSTANCES = ("pipeline", "weights", "n", "seed", "device", "threads", "versions", "commit")


def interval(entry: Mapping[str, Any] | None, digits: int, unit: str = "") -> str:
    """A value with its interval, as "44.2 (43.0 to 45.1)", or "-" for nothing."""
    if entry is None or entry["value"] is None:
        return "-"
    text = f"{entry['value']:.{digits}f}{unit}"
    if "low" in entry and "high" in entry:
        text += f" ({entry['low']:.{digits}f} to {entry['high']:.{digits}f})"
    return text


def versions(row: Mapping[str, Any]) -> str:
    """Of the packages that a row was measured with."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items())


def _settings(setting: Mapping[str, Any]) -> str:
    options = dict(setting["options"])
    if setting["kind"] == "stack":
        return "stack of " + " and ".join(f"({_settings(inner)})" for inner in options["of"])
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{setting['kind']}: {text}" if text else setting["kind"]


def _warnings(row: Row) -> str:
    # Rows of before failures were looked for do not say.
    failed = [
        f"{count} pictures of the {which} failed (NaN or one colour) and are scored like others"
        for which, count in row.get("failed", {}).items()
        if count
    ]
    entries = row["metrics"].items()
    said = [f"{name}: {entry['warning']}" for name, entry in entries if "warning" in entry]
    return "; ".join(failed + said)


CELLS: dict[str, Callable[[Row], str]] = {
    "id": lambda row: row["id"],
    "settings": lambda row: _settings(row["setting"]),
    "flops_ratio": lambda row: f"{row['flops_ratio']:.2f}x",
    "speed": lambda row: interval(row["speed"], 2, "x"),
    "warnings": _warnings,
    "threads": lambda row: str(row.get("threads", "-")),
    "versions": versions,
    **{key: lambda row, key=key: str(row[key]) for key in (
        "pipeline", "weights", "n", "seed", "steps", "device", "commit",
    )},
}  # fmt: skip


def columns_of(rows: Sequence[Row]) -> list[str]:
    """What the report's table shows; `CELLS` has more."""
    return ["id", "settings", "flops_ratio", "speed", *metric_names(rows), "n", "warnings"]


def head(names: Sequence[str]) -> list[str]:
    """The first two lines of a table in a document."""
    return [line(names), "|---" * len(names) + "|"]


def line(cells: Iterable[str]) -> str:
    """One more line of it."""
    return f"| {' | '.join(cells)} |"


def heading(column: str) -> str:
    """Of a column."""
    return "FLOPs" if column == "flops_ratio" else title(column)


def cell(row: Row, column: str) -> str:
    """What stands in a row under a column: one of `CELLS`, or a metric with its interval."""
    if column in CELLS:
        return CELLS[column](row)
    metric = metric_of(column)
    return interval(row["metrics"].get(column), metric.digits if metric else 3)


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """These columns of result rows, for a document.

    Raises:
        ValueError: on a column that is neither one of `CELLS` nor a metric of any row.
    """
    known = [*CELLS, *metric_names(rows)]
    for column in columns:
        if column not in known:
            raise ValueError(f"unknown column {column!r}; choose among {', '.join(known)}")
    lines = [[heading(column) for column in columns], ["---"] * len(columns)]
    lines += [[cell(row, column) for column in columns] for row in rows]
    escaped = ([re.sub(r"\s+", " ", text).replace("|", r"\|") for text in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def sort_value(row: Row, column: str) -> float | str:
    """What the page sorts a column by: the number where there is one."""
    if column == "flops_ratio":
        return float(row["flops_ratio"])
    if column == "speed" or column in row["metrics"]:
        entry = row["speed"] if column == "speed" else row["metrics"][column]
        return "" if entry is None or entry["value"] is None else float(entry["value"])
    return row["n"] if column == "n" else cell(row, column)


def mixed(rows: Sequence[Row]) -> list[str]:
    """The circumstances in which the rows differ, so that they cannot simply be compared."""
    return [
        f"{key}: {'; '.join(values)}"
        for key in CIRCUMSTANCES
        if len(values := dict.fromkeys(cell(row, key) for row in rows)) > 1
    ]
