"""One denoising step, drawn: the ten numbered things of docs/how_it_works.md in their order."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from eval.report.plots import INK, MUTED

EDGE, FILL, KEPT, GONE, MEMORY = "#8c959f", "#f3f5f8", "#0072b2", "#d5dbe3", "#d55e00"
DPI = 120
WIDTH, HEIGHT = 100.0, 74.0  # units of the drawing
KEPT_TOKENS = {0, 2, 5, 7, 8, 11, 13, 14}  # of the 16 that are drawn

# Number, what is done, the file that does it, and whether it writes what later steps read.
BEGIN = (
    (1, "read grid, guidance\nbranches, images", "runtime/runtime", False),
    (2, "refuse what\ncannot run", "runtime/runtime", False),
    (3, "make room\nin the caches", "runtime/caches", False),
)
BLOCK = (
    (4, "choose the plan", "tokens/methods", False),
    (5, "merge or prune", "tokens/merge", False),
    (6, "run the block", "hooks/block", False),
    (7, "unmerge the update", "tokens/unmerge", True),
)
END = (
    (8, "remember the output\nfor forecasts", "steps/forecast", True),
    (9, "note which tokens\nwere computed", "tokens/statistics", True),
    (10, "correct what was\nforecast wrongly", "steps/corrector", True),
)


def step() -> Figure:
    """Draw the picture."""
    figure = Figure(figsize=(9.2, 9.2 * HEIGHT / WIDTH), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    _scheduler(axes)
    _frame(axes, (2, 7, 96, 52), "one call of the denoiser", "hooks/denoiser")
    for x, (number, text, room, writes) in zip((4, 27, 50), BEGIN, strict=True):
        _numbered(axes, (x, 45, 20, 9), number, text, room, writes)
    _box(axes, (76, 45, 20, 9), "is this step skipped?", "")
    for x in (24, 47):
        _arrow(axes, (x, 49.5), (x + 3, 49.5))
    _arrow(axes, (70, 49.5), (76, 49.5))
    _blocks(axes)
    _forecast(axes)
    for x, (number, text, room, writes) in zip((4, 27, 50), END, strict=True):
        _numbered(axes, (x, 9.5, 20, 9), number, text, room, writes)
    for x in (24, 47):
        _arrow(axes, (x, 14), (x + 3, 14))
    _arrow(axes, (70, 14), (76, 14))
    _box(axes, (76, 9.5, 20, 9), "the step's prediction", "to the scheduler")
    axes.add_patch(Rectangle((4, 2.6), 1.3, 1.3, color=MEMORY))
    _text(axes, 6.3, 3.2, "remembered for later steps: what caches hold, cleared as one", 8, MUTED)
    return figure


def save(path: Path) -> None:
    """Write the picture with as few colours as it needs."""
    figure = step()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).quantize(64, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def _scheduler(axes: Axes) -> None:
    _box(axes, (2, 63, 24, 8), "the scheduler takes a step", "steps/clock")
    _arrow(axes, (26, 67), (31, 67))
    text = "which step it is, the ratio of every site, and whether it is skipped"
    _box(axes, (31, 63, 67, 8), text, "runtime/generation, plain Python between calls")
    _arrow(axes, (50, 63), (50, 59))


def _blocks(axes: Axes) -> None:
    """What every reduced block does, with the tokens that go through it."""
    _frame(axes, (4, 21.5, 68, 19.5), "every block that is reduced", "")
    # From the question, not skipped, to the first block; from the last one on.
    _line(axes, ((81, 45), (81, 43), (13.2, 43), (13.2, 41)), "no", (77.4, 44.2))
    for x, (number, text, room, writes) in zip((5.5, 22, 38.5, 55), BLOCK, strict=True):
        _numbered(axes, (x, 23, 15.5, 7.5), number, text, room, writes)
    for x in (21, 37.5, 54):
        _arrow(axes, (x, 26.75), (x + 1, 26.75))
    _tokens(axes, 7.5, range(16), "N tokens")
    _tokens(axes, 24, KEPT_TOKENS, "K kept")
    _tokens(axes, 40.5, KEPT_TOKENS, "on K tokens")
    _tokens(axes, 57, range(16), "N updates")
    _line(axes, ((62, 21.5), (62, 20), (14, 20), (14, 18.5)))


def _forecast(axes: Axes) -> None:
    _box(axes, (76, 24, 20, 9), "forecast the output\nfrom earlier ones", "steps/forecast")
    _line(axes, ((89, 45), (89, 33)), "yes", (90.2, 39))
    _line(axes, ((86, 24), (86, 18.5)))


def _frame(axes: Axes, at: tuple[float, float, float, float], title: str, room: str) -> None:
    """A rounded box around what happens inside something."""
    x, y, width, height = at
    shape = FancyBboxPatch(
        (x, y), width, height, "round,pad=0,rounding_size=1.2", fill=False, ec=EDGE, lw=1.0
    )
    axes.add_patch(shape)
    _text(axes, x + 1.5, y + height - 1.8, title, 9, INK, bold=True)
    if room:
        _text(axes, x + width - 1.5, y + height - 1.8, room, 7.5, MUTED, align="right")


def _box(axes: Axes, at: tuple[float, float, float, float], text: str, room: str) -> None:
    """A thing that is done, and below it the file that does it."""
    x, y, width, height = at
    shape = FancyBboxPatch(
        (x, y), width, height, "round,pad=0,rounding_size=0.8", fc=FILL, ec=EDGE, lw=0.8
    )
    axes.add_patch(shape)
    middle = y + height / 2 + (1.3 if room else 0)
    _text(axes, x + width / 2, middle, text, 8.5, INK, align="center")
    if room:
        _text(axes, x + width / 2, y + 1.4, room, 7, MUTED, align="center")


def _numbered(
    axes: Axes,
    at: tuple[float, float, float, float],
    number: int,
    text: str,
    room: str,
    writes: bool,
) -> None:
    """A box with its number, and a mark if later steps read what it writes."""
    x, y, width, height = at
    _box(axes, at, text, room)
    axes.plot(x, y + height, "o", ms=14, mfc=INK, mec="white", mew=1.2, zorder=3)
    label = {"ha": "center", "va": "center_baseline", "zorder": 4, "fontweight": "bold"}
    axes.text(x, y + height, str(number), fontsize=8 if number < 10 else 7, color="white", **label)
    if writes:
        axes.add_patch(Rectangle((x + width - 2, y + 0.8), 1.3, 1.3, color=MEMORY))


def _tokens(axes: Axes, x: float, kept: Container[int], label: str) -> None:
    """A 4 x 4 grid of tokens, those that are computed in colour."""
    for token in range(16):
        row, column = divmod(token, 4)
        colour = KEPT if token in kept else GONE
        axes.add_patch(Rectangle((x + 1.25 * column, 36 - 1.25 * row), 1.05, 1.05, color=colour))
    _text(axes, x + 6, 34.6, label, 7.5, MUTED)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.0, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def _line(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    label: str = "",
    at: tuple[float, float] = (0, 0),
) -> None:
    """A line with corners that ends in an arrow, with a word beside it."""
    axes.plot(*zip(*points[:-1], strict=True), color=INK, lw=1.0, solid_joinstyle="miter")
    _arrow(axes, points[-2], points[-1])
    if label:
        _text(axes, *at, label, 8.5, INK)


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    colour: str,
    align: str = "left",
    bold: bool = False,
) -> None:
    weight = "bold" if bold else "normal"
    place = {"ha": align, "va": "center_baseline", "linespacing": 1.15}
    axes.text(x, y, text, fontsize=size, color=colour, fontweight=weight, **place)
