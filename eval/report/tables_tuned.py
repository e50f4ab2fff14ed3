"""The tables of `tune`: what it is worth on other prompts, and what it tried, from committed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval.jsonl import read
from eval.report.cells import head, interval, line
from eval.report.tables_rows import Row, ahead, circumstances, cite, files, sampler
from eval.report.tables_rules import CHOSEN_WARMUP, RULES

TUNED = files("tuned")
MAIN = "px-25steps-n32"
"""Of the stage at which everything is compared."""
WITH_TOKENS = {
    "own trajectory": "own trajectory",
    "own trajectory and ratio 0.25": "and `ratio=0.25`",
    "own trajectory and ratio 0.5": "and `ratio=0.5`",
}


def groups() -> Iterator[tuple[str, float, dict[str, Row]]]:
    """Where it was tuned and reported on, the speed-up, and the rows of it by kind."""
    for path in TUNED.values():
        found: dict[tuple[str, float], dict[str, Row]] = {}
        for row in read(path):
            speedup = float(row["setting"]["options"]["speedup"])
            key = (row["id"].split("/")[0], speedup)
            found.setdefault(key, {})[row["setting"]["kind"]] = row
        for (stage, speedup), rows in found.items():
            if "tuned" in rows:
                yield stage, speedup, rows


def where(row: Row) -> str:
    """What a group of rows is of, in words."""
    steps = f"{row['steps']} steps{sampler(row)}"
    words = [f"`{row['pipeline']}`", f"{row['call']['width']} px", steps]
    guidance, at = row["call"]["guidance_scale"], row["tuned_on"]["guidance"]
    if guidance != at:
        words.append(f"guidance {guidance:g}, tuned at {at:g}")
    if row["tuned_on"]["prompts"] != 4:
        words.append(f"tuned on {row['tuned_on']['prompts']} prompts")
    return ", ".join(words)


def tuned_table() -> str:
    """The default and the tuned setting on prompts kept apart, and how far that is ahead, in pairs."""
    names = [
        "",
        "n",
        "default, dB",
        "tuned, dB",
        "ahead of it",
        "of fewer steps",
        "minutes",
        "steps",
    ]
    lines = head(names)
    every: list[Row] = []
    for _, speedup, rows in groups():
        default, tuned, fewer = (rows[kind] for kind in ("default", "tuned", "fewer steps"))
        every += rows.values()
        file = TUNED[tuned["pipeline"]]
        cells = [
            f"{where(tuned)}, {speedup:g}x {cite(file, tuned)}",
            str(tuned["n"]),
            f"{interval(default['metrics']['psnr_db'], 1)} {cite(file, default)}",
            interval(tuned["metrics"]["psnr_db"], 1),
            "the default stays" if same(tuned, default) else ahead(tuned, default),
            f"{ahead(tuned, fewer)} {cite(file, fewer)}",
            f"{tuned['tuned_on']['minutes']:g}",
            f"`{default['plan'] if same(tuned, default) else tuned['plan']}`",
        ]
        lines.append(line(cells))
    return "\n".join([circumstances(every), "", *lines])


def late_table() -> str:
    """How far tuned settings are ahead of rule "late", on the pictures that both were measured on."""
    lines = ["| | rule `late`, dB | tuned, ahead by |", "|---|---|---|"]
    rules = {row["id"]: row for path in RULES.values() for row in read(path)}
    for stage, speedup, rows in groups():
        row = rows["tuned"]
        model = row["pipeline"]
        if stage != f"{model}-64{MAIN}":
            continue
        late = rules[f"{model}-64px-25steps-n8/late-{speedup:g}-first{CHOSEN_WARMUP[model]}"]
        same_pictures = {**row, "psnr_db": row["psnr_db"][: late["n"]]}
        cells = [
            f"{where(row)}, {speedup:g}x {cite(TUNED[row['pipeline']], row)}",
            f"{interval(late['metrics']['psnr_db'], 1)} {cite(RULES[model], late)}",
            ahead(same_pictures, late),
        ]
        lines.append(line(cells))
    return "\n".join(lines)


def tried_table() -> str:
    """Latents in dB on the prompts searched on: with tokens reduced inside the steps that run, and fitted."""
    names = ["latents, dB (FLOPs)", *WITH_TOKENS.values(), "fitted, no tokens reduced"]
    lines = head(names)
    for stage, speedup, rows in groups():
        row = rows["tuned"]
        if stage.endswith(MAIN) and row["call"]["width"] == 64:
            tried: dict[str, Any] = row["searched"]
            fits = [each for name, each in tried.items() if name.startswith("fitted")]
            shown = [*(tried[name] for name in WITH_TOKENS), max(fits, key=lambda each: each[1])]
            cells = (f"{db:.1f} ({flops:.2f}x)" for flops, db in shown)
            lines.append(
                f"| {where(row)}, {speedup:g}x {cite(TUNED[row['pipeline']], row)} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def same(tuned: Row, default: Row) -> bool:
    """Whether the default was kept."""
    return bool(tuned["psnr_db"] == default["psnr_db"])
