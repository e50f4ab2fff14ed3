"""What a row of `eval.suite` says, and how rows are kept in a file: written one by one, read back as texts.

The overhead is the share of a reduced step that its ceiling does not take: plan, fold and restore.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.manifest import write_whole

FIELDS = (
    "model", "size", "batch", "conditions", "tokens", "kind", "method", "scope", "context", "ratio", "mode",
    "step_ms", "step_ms_p20", "step_ms_p80", "unreduced_ms", "speed", "speed_p20", "speed_p80",
    "ceiling_speed", "overhead", "flops_ratio", "peak_mib", "rounds", "note", "dtype", "device", "threads",
    "torch", "diffusers", "transformers", "tofu_diffusers", "commit",
)  # fmt: skip
KEY = ("model", "size", "kind", "method", "scope", "context", "ratio", "mode")
SAME = ("dtype", "device", "threads", "torch", "diffusers", "tofu_diffusers")


def read_rows(out: Path) -> list[dict[str, str]]:
    """The rows of a file; a last one that was cut off is taken out of it."""
    if not out.exists():
        return []
    text = out.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_whole(out, whole.encode())
    lines = whole.splitlines()
    if lines and lines[0] != ",".join(FIELDS):
        raise ValueError(f"{out} is no table of this suite; choose another --out")
    return list(csv.DictReader(lines))


def append_row(out: Path, row: dict[str, Any]) -> dict[str, str]:
    """Put a row behind those of a file, under a header if it is the first; the row as it reads back."""
    texts = {name: as_text(row.get(name)) for name in FIELDS}
    new = not out.exists() or not out.stat().st_size
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(texts)
    return texts


def as_text(value: Any) -> str:
    """A value as a row of the file says it."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def against_ceiling(row: dict[str, Any], rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """The ceiling's speed and the overhead of one of tofu's rows, where both were measured."""
    if row["kind"] != "tofu" or "speed" not in row:
        return {}
    like = ("model", "size", "mode", "scope", "context", "ratio")
    for other in rows:
        same = other["kind"] == "ceiling" and all(other[n] == as_text(row[n]) for n in like)
        if same and other["speed"]:
            ceiling = float(other["speed"])
            return {"ceiling_speed": ceiling, "overhead": 1 - row["speed"] / ceiling}
    return {}


def line(row: dict[str, str]) -> str:
    """A row to read while it runs."""
    what = " ".join(row[name] for name in ("kind", "method", "scope", "context") if row[name])
    head = f"{row['model']} {row['size']} {row['mode']} {what} {row['ratio']}"
    if not row["step_ms"]:
        return f"{head}: {row['note']}"
    overhead = f", overhead {float(row['overhead']):.1%}" if row["overhead"] else ""
    return (
        f"{head}: {float(row['step_ms']):.2f} ms, {float(row['speed']):.2f}x, "
        f"FLOPs {float(row['flops_ratio']):.2f}x{overhead}"
    )
