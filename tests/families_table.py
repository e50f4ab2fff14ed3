"""The table of families and the list of denoisers in docs/models.md, from what the tests really run.

`python -m tests.families_table` rebuilds it; a test holds the document to it.
"""

import textwrap
from pathlib import Path
from typing import Any

import torch

from tests import markdown, tiny
from tests.denoisers import DENOISERS, NO_DENOISERS
from tofu_diffusers import FAMILIES, apply_tofu
from tofu_diffusers.config import KEYS_VALUES, SCOPES

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
MARKS = ("<!-- families: python -m tests.families_table -->", "<!-- /families -->")
LIST_MARKS = ("<!-- denoisers: python -m tests.families_table -->", "<!-- /denoisers -->")
BUILDERS = {
    "unet": (tiny.tiny_sd, tiny.tiny_sdxl),
    "sd3": (tiny.tiny_sd3,),
    "flux": (tiny.tiny_flux,),
    "qwen": (tiny.tiny_qwen,),
    "pixart": (tiny.tiny_pixart,),
    "wan": (tiny.tiny_wan,),
    "dit": (tiny.tiny_dit,),
    "unet2d": (tiny.tiny_ddpm,),
}
SKIPPED = sorted({*DENOISERS} - {*NO_DENOISERS})
HEADER = ("denoiser", "pipelines", "grid", *(f"`{scope}`" for scope in SCOPES), "images of a batch")


@torch.no_grad()
def runs(model: Any, inputs: dict[str, Any], scope: str, keys_values: str) -> bool:
    """Whether the denoiser takes this combination; if it does, tokens must go and numbers be finite."""
    options = {"scope": scope, "keys_values": keys_values, "warmup_steps": 1}
    try:
        handle = apply_tofu(model, ratio=0.5, method="random", **options)
    except ValueError:
        return False
    for step in range(2):
        handle.step(step, 2)
        out = model(**inputs)[0]
    rows = handle.stats()
    assert torch.isfinite(out).all()
    assert rows and all(row["tokens_kept"] < row["tokens_in"] for row in rows)
    handle.remove()
    return True


@torch.no_grad()
def batches(model: Any, inputs: dict[str, Any]) -> str:
    """How images that keep different tokens are run."""
    with apply_tofu(model, ratio=0.5, method="tome") as handle:
        model(**inputs)
        alone = handle.inspect()[0].per_image
    return "one after another, unless `share_plan`" if alone else "together"


def row(name: str) -> tuple[str, ...]:
    """One family's line."""
    pipes = [build() for build in BUILDERS[name]]
    model = tiny.denoisers(pipes[0])[0]
    inputs = tiny.model_inputs(model)
    assert FAMILIES[name].classes == (type(model).__name__,)
    grid = FAMILIES[name].grids(model, inputs)[0]
    sides = [str(side) for side in grid.sides if side > 1]
    scopes = (
        ", ".join(
            keys_values for keys_values in KEYS_VALUES if runs(model, inputs, scope, keys_values)
        )
        for scope in SCOPES
    )
    classes = ", ".join(f"`{type(pipe).__name__}`" for pipe in pipes)
    return (
        f"`{type(model).__name__}`",
        classes,
        " x ".join(sides),
        *scopes,
        batches(model, inputs),
    )


def table() -> str:
    """All families, as Markdown."""
    return markdown.table(HEADER, map(row, BUILDERS))


def denoisers() -> str:
    """The classes on which steps are skipped in tests, as Markdown."""
    names = ", ".join(f"`{name}`" for name in SKIPPED)
    return "\n".join(textwrap.wrap(f"{len(SKIPPED)} classes: {names}.", 120))


def document() -> str:
    """The page with both made anew."""
    text = markdown.between(MARKS, f"\n{table()}\n", DOCUMENT.read_text(encoding="utf-8"))
    return markdown.between(LIST_MARKS, f"\n{denoisers()}\n", text)


def main() -> None:
    DOCUMENT.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
