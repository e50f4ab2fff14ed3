"""The tables of README.md and the documents, and the plots, from committed results.

    python -m eval tables

Between a document's marks, <!-- table: NAME --> and <!-- /table -->, stands what `TABLES` makes of the rows.
Every line of a study cites its row, so that `check_citations` finds it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eval.bootstrap import difference, of_mean
from eval.plots import pareto
from eval.plots_growth import growth
from eval.study import read
from eval.tables_speed import growth_rows, growth_table, suite_table
from tofu_diffusers import profile

ROOT = Path(__file__).parent.parent
SPEEDS = {name: ROOT / "eval" / "results" / f"speed_{name}.json" for name in ("unet", "mmdit")}
FAMILY = {"unet": "unet", "mmdit": "sd3"}
RESULTS = {name: ROOT / "eval" / "results" / f"study_{name}.jsonl" for name in ("unet", "mmdit")}


def measured(name: str) -> dict[str, Path]:
    """The committed files of a measurement by device: a GPU's are there once one has measured."""
    found = {
        device: ROOT / "eval" / "results" / f"{name}_{device}.csv" for device in ("cpu", "cuda")
    }
    return {device: path for device, path in found.items() if path.exists()}


GROWTH, SUITES = measured("growth"), measured("suite")
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "speed.md")
MARKED = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)

Row = Mapping[str, Any]


def rows_of(model: str, stage: str) -> list[Row]:
    """A pipeline's committed rows of one stage, such as "25steps-n32"."""
    start = f"{model}-{stage}/"
    return [row for row in read(RESULTS[model]) if row["id"].startswith(start)]


def described(row: Row) -> str:
    """A setting in words."""
    setting, steps = row["setting"], row["steps"]
    options, kind = setting["options"], setting["kind"]
    if kind == "fewer_steps":
        solver = ", DPM-Solver++" if "scheduler" in options else ""
        return f"{options['steps']} steps{solver}"
    if kind == "step_cache":
        how = "extrapolated" if options["order"] else "repeated"
        return (
            f"whole-step caching, {options['computed']} of {steps} steps, the first {options['first']} among "
            f"them, {how}"
        )
    if kind == "stack":
        inner = " with ".join(
            described({"setting": each, "steps": steps}) for each in options["of"]
        )
        return f"both: {inner}"
    if kind != "tofu":
        numbers = ", ".join(f"{name} {value}" for name, value in options.items())
        return f"{kind}, {numbers}"
    if options.get("scope") == "step":
        run = round(steps / row["flops_ratio"])
        return (
            f"scope `step`, ratio {options['ratio']:.2f}, {options['first_steps']} whole steps: "
            f"{run} of {steps} steps run"
        )
    if "context" in options:
        chosen = "at random" if options["method"] == "random" else "by change"
        return (
            f"tokens {chosen}, {options['restore']}, context {options['context']}, "
            f"ratio {options['ratio']:g}, {options['first_steps']} whole steps"
        )
    return f"{options['method']}, ratio {options['ratio']:g}"


def cite(model: str, row: Row) -> str:
    """The comment that names a row."""
    return f"<!-- row: {RESULTS[model].name}#{row['id']} -->"


def line(model: str, row: Row) -> str:
    """A row of a table: what, FLOPs, PSNR with its interval, the worst picture's."""
    psnr = row["metrics"]["psnr_db"]
    return (
        f"| {described(row)} {cite(model, row)} | {row['flops_ratio']:.2f}x | "
        f"{psnr['value']:.1f} ({psnr['low']:.1f} to {psnr['high']:.1f}) | {min(row['psnr_db']):.1f} |"
    )


def circumstances(rows: Sequence[Row]) -> str:
    """Of rows that share them."""
    row = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    call = row["call"]
    size = f"{call['width']} x {call['height']} px, " if "width" in call else ""
    return (
        f"Embedded pipeline `{row['pipeline']}` (weights {row['weights']}), {size}{row['steps']} steps, "
        f"guidance {call['guidance_scale']:g}, n = {row['n']}, seed {row['seed']} on; {row['device']}; "
        f"{versions}. PSNR to the unreduced picture of the same seed in dB, mean with its 95 % bootstrap "
        "interval, and the lowest. FLOPs of the denoiser, counted, unreduced over reduced."
    )


def drift_table(model: str, stage: str) -> str:
    """All rows of a stage, the least drift first."""
    rows = rows_of(model, stage)
    ordered = sorted(rows, key=lambda row: -row["metrics"]["psnr_db"]["value"])
    head = ["| | FLOPs | PSNR, dB | lowest |", "|---|---|---|---|"]
    return "\n".join([circumstances(rows), "", *head, *(line(model, row) for row in ordered)])


def is_default(model: str, row: Row) -> bool:
    """Whether a row is of the pipeline's profile, at whatever ratio."""
    options = {k: v for k, v in row["setting"]["options"].items() if k != "ratio"}
    mine: bool = options == profile(FAMILY[model])["config"]
    return mine


def ahead_table(stage: str) -> str:
    """By how much the default, scope "step", is ahead of what has the same FLOPs, image by image."""
    lines = ["| | against | FLOPs | ahead by, dB |", "|---|---|---|---|"]
    for model in RESULTS:
        rows = {row["setting"]["name"]: row for row in rows_of(model, stage)}
        for name, row in rows.items():
            if not is_default(model, row):
                continue
            count = name.split("-")[1]
            for rival in ("steps", "multistep", "line", "late", "repeat"):
                other = rows.get(f"{rival}-{count}")
                if other is None:
                    continue
                change = difference(of_mean(row["psnr_db"]), of_mean(other["psnr_db"]))
                lines.append(
                    f"| `{model}`, {described(row)} {cite(model, row)} | {described(other)} "
                    f"{cite(model, other)} | {row['flops_ratio']:.2f}x | "
                    f"{change.value:+.1f} ({change.low:+.1f} to {change.high:+.1f}) |"
                )
    return "\n".join(lines)


def worth(
    rows: Sequence[Row], option: str, mine: str, other: str
) -> tuple[int, float, float, float]:
    """Over all combinations that differ in one option only: how many, mean, p20 and p80 of the dB gained."""

    def rest(row: Row) -> tuple[Any, ...]:
        options = row["setting"]["options"]
        return tuple(sorted((k, str(v)) for k, v in options.items() if k != option))

    found: dict[str, dict[tuple[Any, ...], float]] = {mine: {}, other: {}}
    for row in rows:
        value = str(row["setting"]["options"].get(option))
        if value in found:
            found[value][rest(row)] = row["metrics"]["psnr_db"]["value"]
    gains = [found[mine][key] - found[other][key] for key in found[mine] if key in found[other]]
    if not gains:
        return 0, float("nan"), float("nan"), float("nan")
    low, high = np.percentile(gains, [20, 80])
    return len(gains), float(np.mean(gains)), float(low), float(high)


QUESTIONS = (
    ("fold", "mlerp", "mean"),
    ("fold", "None", "prune"),
    ("fold", "None", "mlerp"),
    ("fold", "mean", "prune"),
    ("restore", "temporal", "copy"),
    ("restore", "taylor", "temporal"),
    ("restore", "blend", "temporal"),
    ("context", "fresh", "none"),
    ("context", "cached", "none"),
    ("context", "fresh", "cached"),
    ("scope", "block", "attention"),
    ("method", "importance", "random"),
    ("method", "tofu", "tome"),
    ("method", "pitome", "tome"),
    ("method", "tome", "random"),
)


def worth_table(stage: str) -> str:
    """What each choice is worth, by pairs of combinations that differ in nothing else."""
    lines = [
        "| choice | instead of | "
        + " | ".join(f"`{model}`, dB | pairs" for model in RESULTS)
        + " |",
        "|---|---|" + "---|---|" * len(RESULTS),
    ]
    rows = {model: rows_of(model, stage) for model in RESULTS}
    for option, mine, other in QUESTIONS:
        cells = []
        for model in RESULTS:
            count, mean, low, high = worth(rows[model], option, mine, other)
            gained = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if count else "n/a"
            cells += [gained, str(count)]
        if set(cells[1::2]) == {"0"}:
            continue  # not measured yet
        named = (value if value != "None" else "ToFu's own, by depth" for value in (mine, other))
        lines.append(f"| {option} {' | '.join(named)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_table(stage: str) -> str:
    """Of the grid: at each saving, the combination with the least drift."""
    lines = ["| | at least | best combination | FLOPs | PSNR, dB |", "|---|---|---|---|---|"]
    for model in RESULTS:
        rows = rows_of(model, stage)
        for floor, ceiling in pairwise((1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 99.0)):
            among = [row for row in rows if floor <= row["flops_ratio"] < ceiling]
            if not among:
                continue
            best = max(among, key=lambda row: row["metrics"]["psnr_db"]["value"])
            psnr = best["metrics"]["psnr_db"]["value"]
            lines.append(
                f"| `{model}` | {floor:g}x | {best['setting']['name']} {cite(model, best)} | "
                f"{best['flops_ratio']:.2f}x | {psnr:.1f} |"
            )
    return "\n".join(lines)


def speed_table(model: str) -> str:
    """Times of some settings, as `python -m eval speed` wrote them."""
    data = json.loads(SPEEDS[model].read_text(encoding="utf-8"))
    about, steps = data["about"], data["about"]["call"]["num_inference_steps"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"Embedded pipeline `{model}` (weights {about['pipeline']['weights']}), batch of {about['n']}, "
        f"{steps} steps; {about['device']}, {about['threads']} threads; {versions}; commit "
        f"{about['commit'][:12]}. Unreduced time over that of the setting, in turns, median of "
        f"{data['rows'][0]['rounds']} (p20 to p80).",
        "",
        "| | FLOPs | denoiser | end to end |",
        "|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = [f"{row['flops_ratio']:.2f}x"]
        for name in ("speed", "end_to_end_speed"):
            each = row[name]
            cells.append(f"{each['value']:.2f}x ({each['low']:.2f} to {each['high']:.2f})")
        what = described({**row, "steps": steps})
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


FRONT, GRID = "25steps-n32", "64px-12steps-n4"
TABLES: dict[str, Callable[[], str]] = {
    **{f"{model} drift": (lambda model=model: drift_table(model, FRONT)) for model in RESULTS},
    **{f"{model} speed": (lambda model=model: speed_table(model)) for model in SPEEDS},
    "ahead": lambda: ahead_table(FRONT),
    "worth": lambda: worth_table(GRID),
    "best": lambda: best_table(GRID),
    "growth": lambda: growth_table(list(GROWTH.values())),
    **{f"suite {device}": (lambda path=path: suite_table(path)) for device, path in SUITES.items()},
}


def filled(text: str) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: if it asks for a table that is none of `TABLES`.
    """

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table {match[2]!r}; choose one of {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return MARKED.sub(made, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes none."""


def main(args: argparse.Namespace) -> None:
    """`python -m eval tables`."""
    for model in RESULTS:
        figure = pareto(rows_of(model, FRONT), "psnr_db", "flops")
        figure.savefig(ROOT / "docs" / f"results_{model}.png", metadata={"Software": None})
    figure = growth([growth_rows(path) for path in GROWTH.values()])
    figure.savefig(ROOT / "docs" / "growth.png", metadata={"Software": None})
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
