"""What a row of `denoisers` says, and how rows are kept in a file: written one by one, read back as texts.

The share is how much of the ceiling's speed is reached, round by round; what it lacks goes into plan, merge
and unmerge.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from eval.files import add, whole_lines

FIELDS = (
    "model", "size", "batch", "cfg_branches", "tokens", "kind", "method", "scope", "keys_values", "ratio",
    "mode", "step_ms", "step_ms_p20", "step_ms_p80", "unreduced_ms", "speed", "speed_p20", "speed_p80",
    "ceiling_speed", "share", "share_p20", "share_p80", "flops_ratio", "peak_mib", "rounds", "note", "dtype",
    "device", "threads", "torch", "diffusers", "transformers", "tofu_diffusers", "commit",
)  # fmt: skip
KEY = ("model", "size", "kind", "method", "scope", "keys_values", "ratio", "mode")
SAME = ("dtype", "device", "threads", "torch", "diffusers", "tofu_diffusers")


def read_rows(out: Path) -> list[dict[str, str]]:
    """The whole rows of a file."""
    lines = [line.decode() for line in whole_lines(out)]
    if lines and lines[0] != ",".join(FIELDS):
        raise ValueError(f"{out} is no table of this suite; choose another --out")
    return list(csv.DictReader(lines))


def append_row(out: Path, row: dict[str, Any]) -> dict[str, str]:
    """Put a row behind those of a file, under a header if it is the first; the row as it reads back."""
    texts = {name: as_text(row.get(name)) for name in FIELDS}
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    if not out.exists() or not out.stat().st_size:
        writer.writeheader()
    writer.writerow(texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    add(out, text.getvalue().encode())
    return texts


def as_text(value: Any) -> str:
    """A value as a row of the file says it."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def line(row: dict[str, str]) -> str:
    """A row to read while it runs."""
    what = " ".join(row[name] for name in ("kind", "method", "scope", "keys_values") if row[name])
    head = f"{row['model']} {row['size']} {row['mode']} {what} {row['ratio']}"
    if not row["step_ms"]:
        return f"{head}: {row['note']}"
    share = f", {float(row['share']):.1%} of the ceiling" if row["share"] else ""
    return (
        f"{head}: {float(row['step_ms']):.2f} ms, {float(row['speed']):.2f}x, "
        f"FLOPs {float(row['flops_ratio']):.2f}x{share}"
    )
