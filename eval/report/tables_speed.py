"""Tables of times: pipelines, steps of denoisers against their ceilings, how single operations grow."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.bench.rows import read_rows
from eval.jsonl import read
from eval.provenance import ROOT
from eval.report.cells import head, interval, line, versions
from eval.report.tables_rows import circumstances, cite, described, either
from tofu_diffusers import KEYS_VALUES

SPEEDS = {name: ROOT / "eval" / "results" / f"speed_{name}.json" for name in ("unet", "mmdit")}

Row = Mapping[str, str]


def stacking_table(paths: Sequence[Path]) -> str:
    """Speeds alone and together, a line a partner."""
    rows = [(path, row) for path in paths for row in read(path)]
    first = rows[0][1]
    devices = dict.fromkeys(f"{row['device']}, {row['dtype']}" for _, row in rows)
    lines = [
        f"Random weights; {'; '.join(devices)}; {versions(first)}. Time of {first['steps']} unreduced "
        f"steps over that of as many with each, in turns, median of {first['rounds']} (p20 to p80).",
        "",
        "| model | with | tofu | the other | both | share of the product |",
        "|---|---|---|---|---|---|",
    ]
    for path, row in rows:
        speeds = (interval(row["speed"][name], 2) for name in ("tofu", "partner", "both"))
        share = row["share_of_product"]
        lines.append(
            f"| {row['model']} {row['size']} | {row['partner'].replace('_', ' ')} "
            f"<!-- row: {path.name}#{row['id']} --> | {' | '.join(speeds)} | "
            f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%}) |"
        )
    return "\n".join(lines)


def growth_rows(path: Path) -> list[dict[str, str]]:
    """Of a file that `python -m eval growth` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def growth_about(row: Row) -> str:
    """Where and with what a file was measured."""
    return (
        f"{row['device']}, {row['threads']} threads, {row['implementation']}; {row['dtype']}, "
        f"{row['channels']} channels; torch {row['torch']}; commit {row['commit'][:12]}"
    )


def growth_table(paths: Sequence[Path]) -> str:
    """A table a device: a line an operation, a column a number of tokens."""
    return "\n\n".join(_growth(growth_rows(path)) for path in paths)


def _growth(rows: Sequence[Row]) -> str:
    sizes = sorted({int(row["tokens"]) for row in rows})
    lines = [
        f"{growth_about(rows[0])}. Median time in ms by number of tokens, half of them removed; empty: left "
        "out, more FLOPs than this machine does in seconds. Behind it the share of that time that its bound "
        "takes, at the most tokens measured, and what bounds it.",
        "",
        f"| | {' | '.join(f'{size:,}' for size in sizes)} | bound |",
        "|---|" + "---|" * len(sizes) + "---|",
    ]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        mine = {int(row["tokens"]): row for row in rows if row["operation"] == operation}
        cells = [short(float(mine[size]["ms"])) if size in mine else "" for size in sizes]
        last = mine[max(mine)]
        by = {"flops": "FLOPs"}.get(last["bound_by"], last["bound_by"])
        share = f"{float(last['bound_share']):.0%}, {by}"
        lines.append(f"| {operation} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def short(value: float) -> str:
    """A number with three digits or all before the point."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def full_size_table(path: Path) -> str:
    """A line a model: what a step takes, and how many times fewer FLOPs every setting counts."""
    rows = read(path)
    names = list(dict.fromkeys(row["setting"]["name"] for row in rows))
    steps = either(row["steps"] for row in rows)
    heads = (f"`{name.replace('-', '=')}`" for name in names)
    lines = [
        f"Counted on shapes alone, {steps} steps; {versions(rows[0])}. A step is that of one image in one "
        "branch of guidance.",
        "",
        f"| | image tokens | a step | {' | '.join(heads)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for model, size in dict.fromkeys((row["model"], row["size"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["size"]) == (model, size)]
        shown = {
            row["setting"][
                "name"
            ]: f"{row['flops_ratio']:.2f}x <!-- row: {path.name}#{row['id']} -->"
            for row in mine
        }
        cells = [f"{mine[0]['tokens']:,}", f"{short(mine[0]['step_flops'] / 1e12)} TFLOPs"]
        cells += [shown.get(name, "") for name in names]
        lines.append(f"| {model}, {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def classes_table(path: Path) -> str:
    """A line a class of denoisers: what a step takes, and what a reduced one saves of it."""
    rows = sorted(read(path), key=lambda row: str(row["model"]))
    kinds = [kind for kind in KEYS_VALUES if any(kind in row["flops_ratio"] for row in rows)]
    ratios = " / ".join(f"{ratio:g}" for ratio in rows[0]["ratios"])
    heads = (f"`{kind}`, {ratios}" for kind in kinds)
    lines = [
        f"Counted on shapes alone; {versions(rows[0])}. A step is that of one row of the batch.",
        "",
        f"| denoiser | counted | grid | image tokens | a step | {' | '.join(heads)} |",
        "|---|---|---|---|---|" + "---|" * len(kinds),
    ]
    for row in rows:
        saved = {
            kind: " / ".join(f"{each:.2f}x" for each in found)
            for kind, found in row["flops_ratio"].items()
        }
        cells = [
            f"`{row['model']}` <!-- row: {path.name}#{row['id']} -->",
            f"{row['config']}, {row['parameters'] / 1e9:.1f}B",
            " x ".join(map(str, row["sides"])),
            f"{row['tokens']:,}",
            f"{short(row['step_flops'] / 1e12)} TFLOPs",
            *(saved.get(kind, "-") for kind in kinds),
        ]
        lines.append(line(cells))
    return "\n".join(lines)


def padding_table(path: Path) -> str:
    """A line a class whose text padding can be dropped: what a step takes, and what dropping it saves."""
    rows = sorted(read(path), key=lambda row: str(row["model"]))
    lines = [
        f"Counted on shapes alone; {versions(rows[0])}. A step is that of one row of the batch.",
        "",
        "| denoiser | counted | image tokens | text tokens, padded -> left | a step | `drop_text_padding` |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        texts = (f"{before:,} -> {after}" for before, after in row["text"].values())
        cells = [
            f"`{row['model']}` <!-- row: {path.name}#{row['id']} -->",
            row["config"],
            f"{row['tokens']:,}",
            ", ".join(texts),
            f"{short(row['step_flops'] / 1e12)} TFLOPs",
            f"{row['flops_ratio']:.3f}x",
        ]
        lines.append(line(cells))
    return "\n".join(lines)


def padding_seen_table(path: Path) -> str:
    """A line a size: how far pictures are without text padding that their denoiser sees."""
    rows = read(path)
    lines = head(["", "text tokens, padded -> left", "PSNR, dB"])
    for row in rows:
        padded, *left = row["text_tokens"]
        cells = [
            f"`{row['pipeline']}`, {row['call']['height']} px {cite(path, row)}",
            f"{padded} -> {' to '.join(map(str, left))}",
            interval(row["metrics"]["psnr_db"], 1),
        ]
        lines.append(line(cells))
    return "\n".join([circumstances(rows), "", *lines])


def suite_table(path: Path) -> str:
    """What every reduced step took, against the unreduced one and against its ceiling."""
    rows = read_rows(path)
    first = rows[0]
    names = ("torch", "diffusers", "transformers", "tofu_diffusers")
    versions = ", ".join(f"{name} {first[name]}" for name in names)
    commits = ", ".join(dict.fromkeys(row["commit"][:12] for row in rows))
    rounds = either(row["rounds"] for row in rows if row["rounds"])
    columns = (
        "model", "tokens", "what", "ratio", "FLOPs", "ceiling", "speed", "share of the ceiling", "peak, MiB",
    )  # fmt: skip
    lines = [
        f"Random weights; {first['device']}, {first['threads']} threads, {first['dtype']}; {versions}; "
        f"commit {commits}. Time of an unreduced step over that of a reduced one, and of the ceiling's over "
        f"that of a reduced one, in turns, median of {rounds} (p20 to p80).",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    cases = list(dict.fromkeys((row["model"], row["size"], row["mode"]) for row in rows))
    told = [row for row in rows if row["kind"] in ("tofu", "tomesd") or without_times(row)]
    # As measured inside a case: what the ratio 0.5 is compared with stands together.
    told.sort(
        key=lambda row: (
            cases.index((row["model"], row["size"], row["mode"])),
            float(row["ratio"]),
        )
    )
    return "\n".join([*lines, *map(suite_line, told)])


def without_times(row: Row) -> bool:
    """Whether a row says why it was not measured."""
    return row["note"].startswith(("failed", "n/a"))


def suite_line(row: Row) -> str:
    """A row of the suite; of one that was not measured the reason."""
    kind = () if row["kind"] == "tofu" else (row["kind"],)
    # tomesd is both the kind and the method.
    what = dict.fromkeys((*kind, row["scope"], row["keys_values"], row["method"]))
    cells = [f"{row['model']} {row['size']}, {row['mode']}"]
    if row["note"] and not without_times(row):
        cells[0] += f" ({row['note']})"
    cells += [f"{int(row['tokens']):,}" if row["tokens"] else ""]
    cells += [", ".join(word for word in what if word), row["ratio"]]
    if without_times(row):
        reason = row["note"].replace("|", "\\|")
        return f"| {' | '.join(cells)} | {reason} | | | | |"
    cells += [
        f"{float(row['flops_ratio']):.2f}x",
        "",
        told_spread(row, "speed", ".2f", "x"),
        "",
        "",
    ]
    if row["ceiling_speed"]:
        cells[5] = f"{float(row['ceiling_speed']):.2f}x"
        cells[7] = told_spread(row, "share", ".0%")
    if row["peak_mib"]:
        cells[8] = f"{float(row['peak_mib']):,.0f}"
    return f"| {' | '.join(cells)} |"


def told_spread(row: Row, name: str, digits: str, unit: str = "") -> str:
    """A median with its p20 and p80."""
    value, low, high = (format(float(row[f"{name}{end}"]), digits) for end in ("", "_p20", "_p80"))
    return f"{value}{unit} ({low} to {high})"


def speed_table(model: str) -> str:
    """Times of some settings, as `python -m eval speed` wrote them."""
    data = json.loads(SPEEDS[model].read_text(encoding="utf-8"))
    about = data["about"]
    call = about["call"]
    lines = [
        f"Embedded pipeline `{model}` (weights {about['pipeline']['weights']}), batch of {about['n']}, "
        f"{call['num_inference_steps']} steps, guidance {call['guidance_scale']:g}; {about['device']}, "
        f"{about['threads']} threads; {versions(about)}; commit {about['commit'][:12]}. Unreduced time over "
        f"that of the setting, in turns, median of {data['rows'][0]['rounds']} (p20 to p80).",
        "",
        "| | FLOPs | denoiser | end to end |",
        "|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = [f"{row['flops_ratio']:.2f}x"]
        cells += [interval(row[name], 2, "x") for name in ("speed", "end_to_end_speed")]
        lines.append(f"| {described(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)
