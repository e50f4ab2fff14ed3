"""What speed costs, drawn: the Pareto front of a sweep with its intervals, and which tokens were kept."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

Row = Mapping[str, Any]

# Okabe and Ito's colours, which the colour-blind tell apart too, and a shape each for print without colour.
STYLES = {
    "unreduced": ("#000000", "X"),
    "tofu": ("#0072b2", "o"),
    "fewer_steps": ("#d55e00", "s"),
    "step_cache": ("#009e73", "D"),
    "tomesd": ("#cc79a7", "^"),
    "pab": ("#e69f00", "v"),
    "taylorseer": ("#7f3c8d", "<"),
    "first_block_cache": ("#8c564b", ">"),
    "magcache": ("#b22222", "d"),
    "seacache": ("#1fa3a3", "*"),
    "dbcache": ("#5b5b00", "8"),
    "deepcache": ("#a5aa00", "h"),
    "stack": ("#56b4e9", "P"),
    "both": ("#1b2f5a", "H"),
}
OTHER = ("#777777", "p")
SPEEDS = {"flops": "FLOPs, unreduced over this setting", "speed": "measured speed, denoiser only"}
INK, MUTED = "#222222", "#767676"
NAME_LENGTH = 32  # what a column of the key holds
DPI = 200
PIXEL = DPI / 72  # of a typographic point
# Gaps between point and label in typographic points; across the far ones goes a line.
NEAR, FAR = (3.5, 7.0), (13.0, 20.0)
CROWDED = 0.2  # share of a label that may lie on something else before a number must do


@dataclass(frozen=True)
class Metric:
    """How to read a metric.

    title: None where only the name says what it is, such as the features of a distance.
    paired: against the unreduced pictures of the same prompts and seeds, whose own value means nothing.
    """

    title: str | None
    higher_is_better: bool
    paired: bool
    digits: int


# By name, in the order of plots and columns.
METRICS = (
    (r"psnr_db", Metric("PSNR, dB", True, True, 1)),
    (r"ssim", Metric("SSIM", True, True, 3)),
    (r"lpips", Metric("LPIPS", False, True, 3)),
    (r"feature_distance", Metric("feature distance", False, True, 4)),
    (r"(\w+_)?alignment|clip_score", Metric(None, True, False, 2)),
    (r"((\w+_)?alignment|clip_score)-change", Metric(None, True, True, 4)),
    (r"(fid|fd-\w+)-real", Metric(None, False, False, 1)),
    (r"(fid|fd-\w+)-real-change", Metric(None, False, True, 4)),
    (r"kid(-\w+)?-real", Metric(None, False, False, 4)),
    (r"fid|fd-\w+", Metric(None, False, True, 1)),
    (r"kid(-\w+)?", Metric(None, False, True, 4)),
)


def metric_of(name: str) -> Metric | None:
    """What is known about a metric; None if nothing is, then it is listed but not drawn."""
    return next((metric for known, metric in METRICS if re.fullmatch(known, name)), None)


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Every metric of any row, known ones in the order above, others after them."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])

    def place(name: str) -> int:
        fits = (i for i, (known, _) in enumerate(METRICS) if re.fullmatch(known, name))
        return next(fits, len(METRICS))

    return sorted(names, key=place)


def title(name: str) -> str:
    """What a reader calls a metric."""
    metric = metric_of(name)
    return (metric and metric.title) or name


@dataclass(frozen=True)
class Point:
    """One row in one plot: x and y are (low, value, high); number is its place in the table."""

    number: int
    name: str
    kind: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def _span(entry: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    if entry is None or entry["value"] is None or not math.isfinite(entry["value"]):
        return None
    value = entry["value"]
    return entry.get("low", value), value, entry.get("high", value)


def points(rows: Sequence[Row], metric: str, speed: str) -> list[Point]:
    """The rows that have both a finite speed ("flops" or "speed") and a finite metric."""
    found = []
    for number, row in enumerate(rows, 1):
        name, kind = row["setting"]["name"], row["setting"]["kind"]
        if kind == "unreduced":
            x: tuple[float, float, float] | None = (1.0, 1.0, 1.0)  # by definition of a ratio
        elif speed == "flops":
            x = (row["flops_ratio"],) * 3
        else:
            x = _span(row.get("speed"))
        y = _span(row["metrics"].get(metric))
        if x is not None and y is not None:
            found.append(Point(number, name, kind, x, y))
    return found


def front(found: Iterable[Point], higher_is_better: bool = True) -> list[Point]:
    """Those that no other point beats in speed and quality, slowest first."""
    sign = 1 if higher_is_better else -1
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (-p.x[1], -sign * p.y[1])):
        if not best or sign * point.y[1] > sign * best[-1].y[1]:
            best.append(point)
    return best[::-1]


def pareto(rows: Sequence[Row], name: str, speed: str) -> Figure:
    """Quality against speed: better is up and to the right.

    Raises:
        ValueError: if no setting but the unreduced one has both numbers, or the metric is unknown.
    """
    metric = metric_of(name)
    if metric is None:
        raise ValueError(f"metric {name!r} is unknown: say in METRICS whether higher is better")
    found = points(rows, name, speed)
    # A paired metric compares with the unreduced pictures: for these it is a definition, no measurement.
    drawn = [p for p in found if not (metric.paired and p.kind == "unreduced")]
    if all(point.kind == "unreduced" for point in drawn):
        what = "FLOPs ratio" if speed == "flops" else "measured speed"
        raise ValueError(f"no reduced setting has both a {what} and a finite {name}")
    best = front(drawn, metric.higher_is_better)

    lines = 1 + (len(drawn) + len({p.kind for p in drawn})) // 2
    figure = Figure(figsize=(5.2, 4.1 + 0.175 * lines), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, drawn, best, metric)
    axes.set_xlabel(SPEEDS[speed], fontsize=9)
    axes.set_ylabel(title(name) + ("" if metric.higher_is_better else ", less is up"), fontsize=9)
    first = rows[0]
    axes.set_title(
        f"{first['pipeline']}, weights {first['weights']}, {first['n']} prompts, {first['device']}",
        fontsize=7,
        color=MUTED,
        loc="left",
    )
    _key(figure, drawn, best)
    figure.draw_without_rendering()  # the layout is settled before labels are placed in it
    _label(axes, drawn, best)
    return figure


def _draw(axes: Axes, drawn: list[Point], best: list[Point], metric: Metric) -> None:
    axes.axvline(1, color=MUTED, lw=0.8, ls=":", zorder=1)
    for point in drawn:
        colour, shape = STYLES.get(point.kind, OTHER)
        (left, x, right), (low, y, high) = point.x, point.y
        axes.vlines(x, low, high, color=colour, lw=1.1, alpha=0.75, zorder=2)
        axes.hlines(y, left, right, color=colour, lw=1.1, alpha=0.75, zorder=2)
        axes.plot(x, y, shape, color=colour, ms=5, mec="white", mew=0.5, zorder=4)
        if point.kind == "unreduced":
            axes.axhline(y, color=MUTED, lw=0.8, ls=":", zorder=1)
    axes.step(
        [point.x[1] for point in best],
        [point.y[1] for point in best],
        where="pre",  # to have at least this speed, the best quality is that of the next point
        color=INK,
        lw=1,
        alpha=0.5,
        zorder=1.5,
        gid="front",
    )
    axes.margins(x=0.06, y=0.08)
    if not metric.higher_is_better:
        axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.grid(color="#e8e8e8", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _key(figure: Figure, drawn: list[Point], best: list[Point]) -> None:
    """Number and name of every row, by kind, those on the front bold."""
    kinds = sorted({point.kind for point in drawn}, key=[*STYLES, *(p.kind for p in drawn)].index)
    entries: list[tuple[str, str, str, bool]] = []  # label, shape, colour of the shape, bold
    for kind in kinds:
        colour, shape = STYLES.get(kind, OTHER)
        entries.append((kind.replace("_", " "), "", MUTED, False))
        for point in (p for p in drawn if p.kind == kind):
            name = point.name
            if len(name) > NAME_LENGTH:
                name = f"{name[:18]}…{name[-NAME_LENGTH + 19 :]}"
            entries.append((f"{point.number}  {name}", shape, colour, point in best))
    # No kind's name at the foot of the first column, away from its rows.
    foot = (len(entries) - 1) // 2
    if not entries[foot][1]:
        entries[foot:foot] = [("", "", MUTED, False)] * (2 - len(entries) % 2)
    handles = [Line2D([], [], ls="", marker=m, color=c, ms=5, label=t) for t, m, c, _ in entries]
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=2,
        fontsize=8,
        frameon=False,
        handletextpad=0.2,
        labelspacing=0.25,
        columnspacing=1.5,
    )
    for text, (_, shape, _, bold) in zip(legend.get_texts(), entries, strict=True):
        text.set_color(INK if shape else MUTED)
        text.set_fontweight("bold" if bold else "normal")


def _label(axes: Axes, drawn: list[Point], best: list[Point]) -> None:
    """A row's number beside its point; for those on the front its name too, where there is room."""
    renderer = axes.get_figure().canvas.get_renderer()  # type: ignore[union-attr]
    frame = axes.get_window_extent(renderer).extents

    def at(x: float, y: float) -> np.ndarray:
        return np.asarray(axes.transData.transform((x, y)))

    def box(first: np.ndarray, second: np.ndarray, edge: float, weight: float) -> list[float]:
        low, high = np.minimum(first, second), np.maximum(first, second)
        return [*(low - edge), *(high + edge), weight]

    taken = []
    for p in drawn:
        centre = at(p.x[1], p.y[1])
        taken.append(box(centre, centre, 3 * PIXEL, 4.0))
        taken.append(box(at(p.x[1], p.y[0]), at(p.x[1], p.y[2]), PIXEL, 1.0))
        taken.append(box(at(p.x[0], p.y[1]), at(p.x[2], p.y[1]), PIXEL, 1.0))
    for p, q in pairwise(best):
        taken.append(box(at(p.x[1], p.y[1]), at(p.x[1], q.y[1]), PIXEL, 1.0))
        taken.append(box(at(p.x[1], q.y[1]), at(q.x[1], q.y[1]), PIXEL, 1.0))

    style = {"textcoords": "offset points", "in_layout": False, "zorder": 6}
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    for p in [*best, *(p for p in drawn if p not in best)]:
        where = (p.x[1], p.y[1])
        note = axes.annotate(
            str(p.number),
            where,
            xytext=(0, 0),
            ha="center",
            va="center",
            fontsize=8,
            color=INK,
            path_effects=halo,
            **style,
        )
        found = None
        if p in best and len(p.name) <= NAME_LENGTH:
            note.set_text(f"{p.number} {p.name}")
            half = note.get_window_extent(renderer).size / 2
            found = _place(at(*where), half, frame, taken, NEAR)
            if found[0] > CROWDED * half.prod():
                note.set_text(str(p.number))
                found = None
        if found is None:
            half = note.get_window_extent(renderer).size / 2
            found = _place(at(*where), half, frame, taken, [*NEAR, *FAR])
        _, gap, shift = found
        note.xyann = tuple(shift / PIXEL)
        middle = at(*where) + shift
        taken.append([*(middle - half), *(middle + half), 8.0])
        if gap in FAR:
            line = {"arrowstyle": "-", "lw": 0.5, "color": MUTED, "shrinkA": 0}
            end = (shift - np.sign(shift) * half) / PIXEL
            axes.annotate("", where, xytext=tuple(end), arrowprops=line, **style)


def _place(
    centre: np.ndarray,
    half: np.ndarray,
    frame: np.ndarray,
    taken: list[list[float]],
    gaps: Sequence[float],
) -> tuple[float, float, np.ndarray]:
    """Where a label of this half size overlaps least, near before far: cost, gap, shift from the point."""
    choices = []
    for gap in gaps:
        for right, up in ((1, 1), (1, -1), (-1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (-1, 0)):
            shift = np.array([right, up]) * (half + gap * PIXEL)
            label = np.concatenate([centre + shift - half, centre + shift + half])
            outside = np.maximum(frame[:2] - label[:2], label[2:] - frame[2:]).clip(min=0).sum()
            choices.append((_overlap(label, taken) + 1e3 * float(outside) + gap, gap, shift))
    return min(choices, key=lambda choice: choice[0])


def _overlap(label: np.ndarray, taken: list[list[float]]) -> float:
    """Weighted area, in pixels, that a box (left, lower, right, upper) shares with others."""
    boxes = np.asarray(taken)
    low, high = np.maximum(label[:2], boxes[:, :2]), np.minimum(label[2:], boxes[:, 2:4])
    return float((np.maximum(high - low, 0).prod(axis=1) * boxes[:, 4]).sum())


def overlay_kept(image: Image.Image, kept: Any) -> Image.Image:
    """The picture, darker and greyer where tokens were computed less often.

    Args:
        kept: [H, W], the token grid: bool, kept or removed at one step, or a share of steps in [0, 1]. Each
            token covers its share of the picture.

    Raises:
        ValueError: if it is anything else.
    """
    mask = np.asarray(kept)
    share = mask.astype(np.float64) if mask.dtype.kind in "bf" else np.full(mask.shape, np.nan)
    if mask.ndim != 2 or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(
            f"the mask of kept tokens is {mask.dtype} of shape {mask.shape}; give bool [H, W], or shares "
            "in [0, 1], for one picture"
        )
    levels = np.round(share * 255).astype(np.uint8)
    scaled = Image.fromarray(levels).resize(image.size, Image.Resampling.NEAREST)
    dark = image.convert("L").point(lambda level: int(level * 0.4)).convert("RGB")
    return Image.composite(image.convert("RGB"), dark, scaled)
