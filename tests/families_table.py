"""The table of families in docs/models.md, from what the tiny denoisers of the tests really do.

`python -m tests.families_table` rebuilds it; a test holds the document to it.
"""

from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tofu_diffusers import FAMILIES, apply_tofu
from tofu_diffusers.config import KEYS_VALUES, SCOPES

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
MARKS = ("<!-- families: python -m tests.families_table -->", "<!-- /families -->")
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
    lines = [HEADER, ("---",) * len(HEADER), *map(row, BUILDERS)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
