"""The tables of linearity: of every block, and what ToFu's choice by it is worth, from committed rows."""

from __future__ import annotations

from collections.abc import Iterator

from eval.jsonl import read
from eval.provenance import ROOT
from eval.report.cells import head, interval
from eval.report.tables_rows import FAMILY, Row, ahead, by_name, circumstances, cite

LINEARITY = ROOT / "eval" / "results" / "linearity.jsonl"
SCOPES = ("block", "attention")
SHARES = ("0.25", "0.5", "0.75")
RIVALS = {"prune": "prune everywhere", "mlerp": "MLERP everywhere", "depth": "by depth"}


def linearity_table() -> str:
    """Every block of both pipelines at every noise level."""
    parts = []
    for row in (each for each in read(LINEARITY) if "blocks" in each):
        names = [
            f"`{row['pipeline']}` {cite(LINEARITY, row)}",
            "depth",
            *(f"{level:.2f}" for level in row["levels"]),
            "mean",
        ]
        lines = head(names)
        for block, depth, values, mean in zip(
            row["blocks"], row["depths"], row["values"], row["means"], strict=True
        ):
            numbers = " | ".join(f"{value:.3f}" for value in (*values, mean))
            lines.append(f"| `{block}` | {depth:.2f} | {numbers} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def groups() -> Iterator[tuple[str, str, dict[str, Row]]]:
    """Pipeline, scope, and the rows of what is compared there, by name."""
    for model in FAMILY:
        rows = [row for row in read(LINEARITY) if row["pipeline"] == model]
        for scope in SCOPES:
            start = f"{scope}-"
            found = {
                name.removeprefix(start): row
                for name, row in by_name(rows).items()
                if name.startswith(start)
            }
            if found:
                yield model, scope, found


def merged_table() -> str:
    """PSNR of all that is compared, and how far the choice by the searched threshold is ahead, in pairs."""
    columns = [*groups()]
    every = [row for _, _, rows in columns for row in rows.values()]
    names = ["PSNR, dB", *(f"`{model}`, {scope}" for model, scope, _ in columns)]
    lines = head(names)
    saved = (f"{rows['prune']['flops_ratio']:.2f}x" for _, _, rows in columns)
    lines.append(f"| FLOPs, of all | {' | '.join(saved)} |")
    labels = dict(RIVALS)
    for which in ("most", "least"):
        labels |= {
            f"{which}-{share}": f"MLERP in the {which} linear {float(share):.0%}"
            for share in SHARES
        }
    for name, label in labels.items():
        cells = [
            f"{interval(rows[name]['metrics']['psnr_db'], 1)} {cite(LINEARITY, rows[name])}"
            for _, _, rows in columns
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    names[0] = "threshold that merges, ahead by dB of"
    lines += ["", *head(names)]
    chosen = [max(SHARES, key=lambda share: searched(rows, share)) for _, _, rows in columns]
    lines.append(f"| | {' | '.join(f'{float(share):.0%} of the blocks' for share in chosen)} |")
    for rival, label in {**RIVALS, "least": "MLERP in as many, the least linear"}.items():
        cells = [
            ahead(rows[f"most-{share}"], rows[f"least-{share}" if rival == "least" else rival])
            for (_, _, rows), share in zip(columns, chosen, strict=True)
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([circumstances(every), "", *lines])


def searched(rows: dict[str, Row], share: str) -> float:
    """What a threshold is chosen by: its PSNR on the prompts that linearity was measured on."""
    return float(rows[f"most-{share}"]["searched_psnr_db"]["value"])
