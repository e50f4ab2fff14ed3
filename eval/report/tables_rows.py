"""What tables of rows share: where the rows lie, a setting in words, and what all were measured with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.provenance import ROOT
from eval.report.cells import interval, versions
from eval.statistics import difference, of_mean
from pipelines.emoji.data import SIZE

FAMILY = {"unet": "unet", "mmdit": "sd3"}
"""The embedded pipelines, and the family of each one's denoiser."""

Row = Mapping[str, Any]


def files(name: str, suffix: str = "jsonl") -> dict[str, Path]:
    """The committed file of each embedded pipeline, such as rules_unet.jsonl."""
    return {model: ROOT / "eval" / "results" / f"{name}_{model}.{suffix}" for model in FAMILY}


def described(row: Row) -> str:
    """A setting in words."""
    options, kind = row["setting"]["options"], row["setting"]["kind"]
    if kind == "fewer_steps":
        solver = ", DPM-Solver++" if "scheduler" in options else ""
        return f"{options['steps']} steps{solver}"
    if kind == "both":
        return f"both: `ratio={options['tokens']['ratio']:g}` and `speedup={options['steps']['speedup']:g}`"
    if kind != "tofu":
        numbers = ", ".join(f"{name} {value}" for name, value in options.items())
        return f"{kind}, {numbers}"
    if len(options) == 1:  # as people type it
        ((name, amount),) = options.items()
        return f"`{name}={amount:g}`"
    if "keys_values" in options:
        corrector = ", corrector" if options.get("corrector") else ""
        how_chosen = options.get("method_options", {})
        source = how_chosen.get("source", "change")
        chosen = {"random": "at random", "importance": f"by {source.replace('_', ' ')}"}
        how = chosen.get(options["method"], f"as {options['method']} chooses")
        if how_chosen.get("age_exponent", 0) > 2:
            how = f"oldest first, then {how}"
        last = options.get("cooldown_steps", 0)
        cooldown = f", the last {last} whole" if last else ""
        return (
            f"tokens {how}, {options['unmerge']}{corrector}, keys_values {options['keys_values']}, "
            f"ratio {options['ratio']:g}, {options['warmup_steps']} warm-up steps{cooldown}"
        )
    if "schedule" in options:
        return f"few tokens early (JiT's shares), {options['method']}"
    merge = f", {options['merge']}" if "merge" in options else ""
    where = ", around attention" if "scope" in options else ""
    return f"{options['method']}{merge}{where}, ratio {options['ratio']:g}"


def cite(path: Path, row: Row) -> str:
    """The comment that names a row."""
    return f"<!-- row: {path.name}#{row['id']} -->"


DRIFT = (
    "PSNR to the unreduced picture of the same seed in dB, mean with its 95 % bootstrap interval. FLOPs of "
    "the denoiser, counted, unreduced over reduced."
)


def circumstances(rows: Sequence[Row], shown: str = DRIFT) -> str:
    """What rows were measured with, whatever their pipelines, and what a table shows of them."""
    weights = {each["pipeline"]: each["weights"] for each in rows}
    pipelines = ", ".join(f"`{name}` (weights {those})" for name, those in weights.items())
    scales = [f"{each['call']['guidance_scale']:g}" for each in rows if "call" in each]
    guidance = f"guidance {either(scales)}, " if scales else ""
    return (
        f"Embedded pipeline {pipelines}, {either(map(size, rows))}, {either(each['steps'] for each in rows)} "
        f"steps, {guidance}n = {either(each['n'] for each in rows)}, seed "
        f"{either(each['seed'] for each in rows)} on; {either(each['device'] for each in rows)}; "
        f"{either(map(versions, rows))}. {shown}"
    )


def either(values: Iterable[Any]) -> str:
    """Each value once."""
    return " or ".join(dict.fromkeys(map(str, values)))


def size(row: Row) -> str:
    """Of the pictures: the pipeline's own unless its call or its second pass says another."""
    call = row.get("call", {})
    own = row.get("sides", [SIZE])[-1]
    return f"{call.get('width', own)} x {call.get('height', own)} px"


def drift(row: Row) -> float:
    """The mean PSNR."""
    return float(row["metrics"]["psnr_db"]["value"])


def sampler(row: Row) -> str:
    """The sampler's class and options in words, behind a comma; nothing for the pipeline's own."""
    return f", {row['scheduler'].replace(',', ' with ')}" if "scheduler" in row else ""


def ahead(mine: Row, other: Row) -> str:
    """By how many dB, image by image, with its interval."""
    gain = difference(of_mean(mine["psnr_db"]), of_mean(other["psnr_db"]))
    return f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"


def by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows of one stage by the name of their setting.

    Raises:
        ValueError: if two have the same name: of another size or number, they belong into another file.
    """
    found: dict[str, Row] = {}
    for row in rows:
        other = found.setdefault(row["setting"]["name"], row)
        if other is not row:
            raise ValueError(
                f"{other['id']} and {row['id']} lie in one file; keep one of them there"
            )
    return found


def side_by_side(shown: Mapping[str, Mapping[str, Row]], paths: Mapping[str, Path]) -> str:
    """A line a label, with a row of each model from its file."""
    lines = [
        "| | `unet`, FLOPs | PSNR, dB | `mmdit`, FLOPs | PSNR, dB |",
        "|---|---|---|---|---|",
    ]
    for label, by_model in shown.items():
        cells = []
        for model, path in paths.items():
            row = by_model.get(model)
            cells += (
                ["", ""]
                if row is None
                else [
                    f"{row['flops_ratio']:.2f}x {cite(path, row)}",
                    interval(row["metrics"]["psnr_db"], 1),
                ]
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    every = [row for by_model in shown.values() for row in by_model.values()]
    return "\n".join([circumstances(every), "", *lines])
