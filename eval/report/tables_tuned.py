"""The tables of `tune`: what it is worth on other prompts, and what it tried, from committed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval.jsonl import read
from eval.provenance import ROOT
from eval.report.cells import interval
from eval.report.tables_study import (
    CHOSEN_WARMUP,
    FAMILY,
    RULES,
    Row,
    ahead,
    circumstances,
    sampler,
)

FILES = {model: ROOT / "eval" / "results" / f"tuned_{model}.jsonl" for model in FAMILY}
RIVALS = {model: ROOT / "eval" / "results" / f"rivals_{model}.jsonl" for model in FAMILY}
MAIN = "px-25steps-n32"
"""Of the stage at which everything is compared."""
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
}
FORECASTS = {"repeat": "", "taylorseer": " with TaylorSeer", "foca": " with FoCa"}
WITH_TOKENS = {
    "own trajectory": "own trajectory",
    "own trajectory and ratio 0.25": "and `ratio=0.25`",
    "own trajectory and ratio 0.5": "and `ratio=0.5`",
}


def cite(row: Row) -> str:
    """The comment that names a row."""
    return f"<!-- row: {FILES[row['pipeline']].name}#{row['id']} -->"


def groups() -> Iterator[tuple[str, float, dict[str, Row]]]:
    """Where it was tuned and reported on, the speed-up, and the rows of it by kind."""
    for path in FILES.values():
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
    head = [
        "",
        "n",
        "default, dB",
        "tuned, dB",
        "ahead of it",
        "of fewer steps",
        "minutes",
        "steps",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    every: list[Row] = []
    for _, speedup, rows in groups():
        default, tuned, fewer = (rows[kind] for kind in ("default", "tuned", "fewer steps"))
        every += rows.values()
        cells = [
            f"{where(tuned)}, {speedup:g}x {cite(tuned)}",
            str(tuned["n"]),
            f"{interval(default['metrics']['psnr_db'], 1)} {cite(default)}",
            interval(tuned["metrics"]["psnr_db"], 1),
            "the default stays" if same(tuned, default) else ahead(tuned, default),
            f"{ahead(tuned, fewer)} {cite(fewer)}",
            f"{tuned['tuned_on']['minutes']:g}",
            f"`{default['plan'] if same(tuned, default) else tuned['plan']}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
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
            f"{where(row)}, {speedup:g}x {cite(row)}",
            f"{interval(late['metrics']['psnr_db'], 1)} <!-- row: {RULES[model].name}#{late['id']} -->",
            ahead(same_pictures, late),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tried_table() -> str:
    """Latents in dB on the prompts searched on: with tokens reduced inside the steps that run, and fitted."""
    head = ["latents, dB (FLOPs)", *WITH_TOKENS.values(), "fitted, no tokens reduced"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for stage, speedup, rows in groups():
        row = rows["tuned"]
        if stage.endswith(MAIN) and row["call"]["width"] == 64:
            tried: dict[str, Any] = row["searched"]
            fits = [each for name, each in tried.items() if name.startswith("fitted")]
            shown = [*(tried[name] for name in WITH_TOKENS), max(fits, key=lambda each: each[1])]
            cells = (f"{db:.1f} ({flops:.2f}x)" for flops, db in shown)
            lines.append(f"| {where(row)}, {speedup:g}x {cite(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rivals_table() -> str:
    """What else makes fewer FLOPs of a pipeline, and how far the default is ahead at as many or fewer."""
    lines = [
        "| | FLOPs | PSNR, dB | default: FLOPs | ahead by, dB |",
        "|---|---|---|---|---|",
    ]
    every: list[Row] = []
    for path in RIVALS.values():
        rows = {row["setting"]["name"]: row for row in read(path)}
        pairs = [(row, rows.get(f"speedup-as-{name}")) for name, row in rows.items()]
        for row, default in sorted(pairs, key=lambda pair: pair[0]["flops_ratio"]):
            if default is None:
                continue
            every += [row, default]
            file = path.name
            cells = [
                f"`{row['pipeline']}`, {named(row['setting'])} <!-- row: {file}#{row['id']} -->",
                f"{row['flops_ratio']:.2f}x",
                interval(row["metrics"]["psnr_db"], 1),
                f"{default['flops_ratio']:.2f}x <!-- row: {file}#{default['id']} -->",
                ahead(default, row),
            ]
            lines.append(f"| {' | '.join(cells)} |")
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


def same(tuned: Row, default: Row) -> bool:
    """Whether the default was kept."""
    return bool(tuned["psnr_db"] == default["psnr_db"])
