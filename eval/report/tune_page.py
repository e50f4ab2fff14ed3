"""What `tune` found, as one self-contained page: the front, the schedules, pictures side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from eval.bench.pipeline import one_batch
from eval.report.page import THUMBNAIL, inline, template
from eval.report.plots import DPI, STYLES
from eval.statistics import of_mean
from tofu_diffusers import Tuned, apply_tofu

KINDS = {"default": ("#009e73", "D"), "tuned": STYLES["tofu"], "fewer steps": STYLES["fewer_steps"]}
"""Colour and shape of each kind of row."""


def pictures(
    pipe: Any, tuned: Tuned, prompts: Sequence[str], seed: int, call: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each prompt the unreduced picture and those of every row, with captions, as data URIs.

    Of a video the frame in the middle; none where tune compared no pictures, as of sound.
    """
    shown: list[tuple[str, list[tuple[str, str]]]] = []
    if not any(row.pixels_db for row in tuned.rows):
        return shown
    for n, prompt in enumerate(prompts):

        def made(n: int = n, prompt: str = prompt, **changes: Any) -> str:
            given = {**call, **changes, "output_type": "pt"}
            image = one_batch(pipe, [prompt], seed + n, given)[0][0]
            if image.dim() > 3:
                image = image[len(image) // 2]
            return _inline(image.float().cpu().clamp(0, 1).permute(1, 2, 0).numpy())

        row = [("unreduced", made())]
        for speedup in tuned.choices:
            own = {each.kind: each for each in tuned.rows if each.speedup == speedup}
            with apply_tofu(pipe, speedup=speedup):
                row.append((f"{speedup:g}x, default", made()))
            if speedup not in tuned.overfitted:  # there the default stays
                with apply_tofu(pipe, tuned, speedup=speedup):
                    row.append((f"{speedup:g}x, tuned", made()))
            if "fewer steps" in own:
                fewer = own["fewer steps"]
                row.append((fewer.name, made(num_inference_steps=fewer.num_inference_steps)))
        shown.append((prompt, row))
    return shown


def page(
    tuned: Tuned, shown: Sequence[tuple[str, list[tuple[str, str]]]], about: Mapping[str, Any]
) -> str:
    """The HTML."""
    return template("tune.html.in").render(
        tuned=tuned,
        rows=tuned.rows,
        colours={kind: colour for kind, (colour, _) in KINDS.items()},
        cell=interval,
        front=front(tuned),
        shown=shown,
        about={**about, **{k: v for k, v in tuned.about.items() if k != "overfitted"}},
    )


def interval(values: Sequence[float]) -> str:
    """The mean with its 95 % bootstrap interval; of one value the value alone, of none a dash."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    entry = of_mean(values).entry()
    return f"{entry['value']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})"


def front(tuned: Tuned) -> str:
    """Latents' dB against counted FLOPs, as a data URI."""
    figure = Figure(figsize=(6, 4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, (colour, marker) in KINDS.items():
        rows = [row for row in tuned.rows if row.kind == kind]
        x = [row.flops for row in rows]
        y = [float(np.mean(row.held_out_db)) for row in rows]
        axes.plot(x, y, color=colour, marker=marker, linewidth=1, label=kind)
    axes.set_xlabel("FLOPs, unreduced over this setting")
    axes.set_ylabel("latents, dB (higher is nearer)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _uri(figure)


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return inline(buffer.getvalue())


def _inline(pixels: np.ndarray) -> str:
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return inline(buffer.getvalue())
