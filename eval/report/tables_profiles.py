"""The tables of what each option of the token profiles is worth, from committed rows."""

from __future__ import annotations

from collections.abc import Iterator

from eval.jsonl import read
from eval.report.cells import head, line
from eval.report.tables_rows import Row, ahead, by_name, circumstances, cite, drift, files
from eval.studies.stages import OTHERWISE, WHOLE, WHOLE_FIRST, WHOLE_LAST

PROFILES = files("profiles")


def by_steps() -> Iterator[tuple[str, int, dict[str, Row]]]:
    """Pipeline, steps of the generation, and their rows by name."""
    for model, path in PROFILES.items():
        rows = read(path)
        for steps in sorted({row["steps"] for row in rows}):
            yield model, steps, by_name(row for row in rows if row["steps"] == steps)


def whole_steps_table() -> str:
    """Drift and FLOPs with more or fewer whole steps at the start and the end."""
    names = [f"last {last}" for last in WHOLE_LAST]
    lines = head(["PSNR, dB (FLOPs)", *names])
    every: list[Row] = []
    for model, steps, rows in by_steps():
        for first in WHOLE_FIRST:
            found = [rows.get(f"first{first}-last{last}") for last in WHOLE_LAST]
            if not any(found):
                continue
            every += filter(None, found)
            cells = [
                ""
                if row is None
                else f"{drift(row):.1f} ({row['flops_ratio']:.2f}x) {cite(PROFILES[model], row)}"
                for row in found
            ]
            lines.append(line([f"`{model}`, {steps} steps, first {first}", *cells]))
    return "\n".join([circumstances(every), "", *lines])


def options_table() -> str:
    """By how many dB each other choice is ahead of the profile, and its FLOPs."""
    columns = [each for each in by_steps() if each[1] == 25]
    heads = [name for model, _, _ in columns for name in (f"`{model}`, FLOPs", f"`{model}`, dB")]
    lines = head(["instead of the profile's", *heads])
    own = f"first{WHOLE['warmup_steps']}-last{WHOLE['cooldown_steps']}"
    for name, changed in {"the profile": {}, **OTHERWISE}.items():
        what = ", ".join(f"{key} {value!r}" for key, value in changed.items())
        cells = [f"`{what}`" if changed else name]
        for model, _, rows in columns:
            row = rows[f"profile-{name}" if changed else own]
            cells.append(f"{row['flops_ratio']:.2f}x {cite(PROFILES[model], row)}")
            cells.append(ahead(row, rows[own]) if changed else f"{drift(row):.1f}")
        lines.append(line(cells))
    return "\n".join([circumstances([rows[own] for _, _, rows in columns]), "", *lines])
