"""How time grows with the tokens, drawn: a line an operation, and dashed what its bound would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from eval.report.plots import DPI, MUTED, STYLES
from eval.report.tables_speed import growth_about

Row = Mapping[str, str]

# Panels by the first word of their operations.
PANELS = {"plans": ("match", "energy"), "merges and unmerges": ("merge", "unmerge")}
LOOKS = list(STYLES.values())[1:]
DASH = 3.0  # in line widths


def growth(devices: Sequence[Sequence[Row]]) -> Figure:
    """Two panels for the rows of each device, both axes logarithmic."""
    figure = Figure(figsize=(9.2, 4.3 * len(devices)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(devices), 1, squeeze=False)[:, 0]
    for rows, part in zip(devices, parts, strict=True):
        part.suptitle(growth_about(rows[0]), fontsize=7, color=MUTED, x=0.01, ha="left")
        panels = part.subplots(1, len(PANELS))
        for (title, words), axes in zip(PANELS.items(), panels, strict=True):
            _draw(axes, [row for row in rows if row["operation"].split()[0] in words])
            axes.set_title(title, fontsize=9, loc="left")
        panels[0].set_ylabel("ms", fontsize=9)
    return figure


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["operation"], []).append(row)
    bounds = {name: [float(row["bound_ms"]) for row in mine] for name, mine in found.items()}
    for (name, mine), (colour, shape) in zip(found.items(), LOOKS, strict=False):
        tokens = [int(row["tokens"]) for row in mine]
        low, ms, high = ([float(row[key]) for row in mine] for key in ("ms_p20", "ms", "ms_p80"))
        axes.vlines(tokens, low, high, color=colour, lw=1.1, alpha=0.75)
        axes.plot(
            tokens, ms, shape, ls="-", color=colour, lw=1.2, ms=5, mec="white", mew=0.5, label=name
        )
        # Where several have one bound, their dashes take turns.
        alike = [other for other in found if bounds[other] == bounds[name]]
        turn, gap = 2 * DASH * alike.index(name), DASH * (2 * len(alike) - 1)
        axes.plot(tokens, bounds[name], ls=(-turn, (DASH, gap)), color=colour, lw=1.1)
    axes.plot([], [], ls="--", color=MUTED, lw=1.1, label="its bound")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({int(row["tokens"]) for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlabel("tokens, half of them removed", fontsize=9)
    axes.tick_params(labelsize=7.5)
    axes.grid(color="#e8e8e8", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", labelspacing=0.25)
