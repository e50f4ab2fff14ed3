"""How much faster, and what did it cost? One self-contained page and its plots from a sweep folder.

`python -m eval report --sweep FOLDER` writes FOLDER/report.html and the plots in FOLDER/report_plots.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from eval.files import write_whole
from eval.generate.manifest import Manifest, image_path
from eval.report.cells import (
    CIRCUMSTANCES,
    cell,
    columns_of,
    heading,
    markdown_table,
    mixed,
    sort_value,
)
from eval.report.plots import (
    OTHER,
    SPEEDS,
    STYLES,
    Row,
    front,
    metric_names,
    metric_of,
    pareto,
    points,
    title,
)

FORMAT = 1
NEEDED = (
    "id", "pipeline", "weights", "setting", "n", "seed", "steps", "device", "versions", "commit",
    "flops_ratio", "speed", "metrics",
)  # fmt: skip
THUMBNAIL = 256


def load(sweep: Path) -> list[dict[str, Any]]:
    """The rows of a sweep folder.

    Raises:
        FileNotFoundError: if there is no results.json.
        ValueError: if it holds no rows, or rows of another form.
    """
    path = sweep / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no results.json in {sweep}; a sweep writes it: python -m eval --help"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); run the sweep again") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found!r}, this report reads {FORMAT}; use the version that wrote it, "
            "or run the sweep again"
        )
    rows: list[dict[str, Any]] = data.get("rows", [])
    if not rows:
        raise ValueError(f"{path} has no rows; run the sweep for at least one setting first")
    for number, row in enumerate(rows, 1):
        lacking = [key for key in NEEDED if key not in row]
        if lacking:
            raise ValueError(
                f"{path}: row {number} of {len(rows)} ({row.get('id', 'no id')}) lacks "
                f"{', '.join(lacking)}; run its setting again"
            )
    return rows


# --- The pictures


@dataclass(frozen=True)
class Run:
    """A setting's pictures by prompt and seed, and the PSNR of each, or the problem with all of them.

    failed: The names of those that are none, and why.
    """

    folder: Path
    pairs: tuple[tuple[str, int], ...] = ()
    psnr_db: tuple[float, ...] = ()
    problem: str | None = None
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sweep: Path, row: Row) -> Run:
        """Read a setting's folder; what cannot be read becomes the problem that the page shows."""
        name = row["setting"]["name"]
        folder, scores = sweep / name, sweep / "scores" / f"{name}.json"
        try:
            manifest = Manifest.load(folder)
        except ValueError:
            found = "cannot be read" if (folder / "manifest.json").exists() else "is missing"
            return cls(folder, problem=f"{name}/manifest.json {found}")
        if (made := manifest.pipeline["weights"]) != row["weights"]:
            return cls(folder, problem=f"made with weights {made}, the row is of {row['weights']}")
        scored = json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else {}
        pairs = zip(manifest.prompts, manifest.seeds, strict=True)
        psnr_db = tuple(scored.get("per_image", {}).get("psnr_db", ()))
        return cls(folder, tuple(pairs), psnr_db, failed=manifest.failed)


@dataclass(frozen=True)
class Shown:
    """One picture of the grid: data URIs of it and of the tokens kept, or the problem."""

    caption: str
    picture: str | None = None
    kept: str | None = None
    problem: str | None = None


def inline(png: bytes) -> str:
    """As a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def inline_file(path: Path) -> str:
    """A run's picture as a data URI, made smaller if it is larger than `THUMBNAIL`.

    Raises:
        LookupError: if it is missing or no picture.
    """
    where = "/".join(path.parts[-3:])
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except FileNotFoundError:
        raise LookupError(f"{where} is missing") from None
    except OSError:
        raise LookupError(f"{where} is no picture") from None
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "png", optimize=True)
    return inline(buffer.getvalue())


def shown(run: Run, pair: tuple[str, int], is_reference: bool) -> Shown:
    """What the grid has for one setting, prompt and seed."""
    try:
        if run.problem or pair not in run.pairs:
            raise LookupError(run.problem or "this run has no such prompt and seed")
        index = run.pairs.index(pair)
        path = image_path(run.folder, index)
        kept = run.folder / "kept" / path.name
        picture, overlay = inline_file(path), inline_file(kept) if kept.exists() else None
    except LookupError as error:
        return Shown("no picture", problem=str(error))
    if is_reference:
        caption = "the reference"
    elif index < len(run.psnr_db):
        caption = f"{run.psnr_db[index]:.1f} dB"
    else:
        caption = "not scored"
    if path.name in run.failed:
        caption += f", failed: {run.failed[path.name]}"
    return Shown(caption, picture, overlay)


def unreduced_first(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Rows with their numbers in the table."""
    return sorted(enumerate(rows, 1), key=lambda pair: pair[1]["setting"]["kind"] != "unreduced")


def grid(sweep: Path, rows: Sequence[Row], prompts: int) -> list[tuple[str, int, list[Shown]]]:
    """For the first prompts: prompt, seed, and every setting's picture, unreduced first."""
    ordered = [row for _, row in unreduced_first(rows)]
    runs = [Run.of(sweep, row) for row in ordered]
    # The first run that is there says which prompts there are.
    pairs = next((run.pairs for run in runs if run.pairs), ())[:prompts]
    references = [row["setting"]["kind"] == "unreduced" for row in ordered]
    return [
        (*pair, [shown(run, pair, is_it) for run, is_it in zip(runs, references, strict=True)])
        for pair in pairs
    ]


# --- The page


@dataclass(frozen=True)
class Plot:
    """One plot of the page. note: what it leaves out, or without uri why there is none."""

    metric: str
    speed: str
    uri: str | None
    note: str


def plots(rows: Sequence[Row], folder: Path) -> Iterator[Plot]:
    """Each known metric against each speed, also written as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in metric_names(rows):
        metric = metric_of(name)
        if metric is None:
            yield Plot(name, "", None, f"{name} is not drawn: whether more is better is unknown")
            continue
        for speed in SPEEDS:
            try:
                figure = pareto(rows, name, speed)
            except ValueError as error:
                yield Plot(name, speed, None, f"{title(name)} against {speed}: {error}")
                continue
            path = folder / f"{name}_{speed}.png"
            figure.savefig(path, metadata={"Software": None})
            there = {point.number for point in points(rows, name, speed)}
            absent = [
                str(number)
                for number, row in enumerate(rows, 1)
                if number not in there and row["setting"]["kind"] != "unreduced"
            ]
            note = f"Not drawn, as a number is missing: {', '.join(absent)}." if absent else ""
            warnings = (row["metrics"].get(name, {}).get("warning") for row in rows)
            note = " ".join(filter(None, [note, *dict.fromkeys(warnings)]))
            yield Plot(name, speed, inline(path.read_bytes()), note)


def template(name: str) -> Template:
    """A template of this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def page(sweep: Path, rows: Sequence[Row], folder: Path, prompts: int) -> str:
    """The HTML; plots are written to the folder too."""
    # Measured speed where there is any, else counted.
    by = "speed" if any(row["speed"] for row in rows) else "flops"
    reduced = [p for p in points(rows, "psnr_db", by) if p.kind != "unreduced"]
    columns = columns_of(rows)
    return template("report.html.in").render(
        rows=rows,
        columns=columns,
        intervals=["speed", *metric_names(rows)],
        best={point.number: rows[point.number - 1] for point in front(reduced)},
        by=by,
        colours={
            row["setting"]["kind"]: STYLES.get(row["setting"]["kind"], OTHER)[0] for row in rows
        },
        heading=heading,
        cell=cell,
        sort_value=sort_value,
        circumstances=[*CIRCUMSTANCES, "steps"],
        mixed=mixed(rows),
        plots=list(plots(rows, folder)),
        ordered=unreduced_first(rows),
        grid=grid(sweep, rows, prompts),
        markdown=markdown_table(rows, columns),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--sweep", type=Path, required=True, help="folder with results.json")
    parser.add_argument("--out", type=Path, help="the page (report.html in the sweep folder)")
    parser.add_argument("--prompts", type=int, default=4, help="rows of pictures (%(default)s)")


def main(args: argparse.Namespace) -> None:
    """Write the page and its plots."""
    if args.prompts < 1:
        raise ValueError(f"--prompts is {args.prompts}; show at least 1")
    rows = load(args.sweep)
    out: Path = args.out or args.sweep / "report.html"
    folder = out.with_name(out.stem + "_plots")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page(args.sweep, rows, folder, args.prompts).encode())
    print(f"{out} ({len(rows)} settings), plots in {folder}")
