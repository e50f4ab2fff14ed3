"""The tables of families and the list of denoisers in docs/models.md, from what the tests really run.

`python -m tests.families_table` rebuilds it; a test holds the document to it.
"""

import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests import markdown
from tests.denoisers import DENOISERS, NO_DENOISERS
from tofu_diffusers import FAMILIES, TokenReduction, apply_tofu, remove_tofu
from tofu_diffusers.config import KEYS_VALUES, SCOPES
from tofu_diffusers.families import known_classes, known_family
from tofu_diffusers.profiles import origin, resolve
from tofu_diffusers.steps.outputs import tensors_in

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
MARKS = ("<!-- families: python -m tests.families_table -->", "<!-- /families -->")
LIST_MARKS = ("<!-- denoisers: python -m tests.families_table -->", "<!-- /denoisers -->")
CLASSES = sorted({name for family in FAMILIES.values() for name in family.classes} & {*DENOISERS})
"""Of denoisers whose tokens are reduced."""
SKIPPED = sorted({*DENOISERS} - {*NO_DENOISERS})
HEADER = (
    "denoiser",
    "pipelines",
    "grid",
    *(f"`{scope}`" for scope in SCOPES),
    "images of a batch",
    "profile",
)
MAPS = {"deepfloyd_if", "kandinsky", "kandinsky2_2"}
"""Pipelines with UNets whose attention works on maps, which is refused."""
REFUSED_MARKS = ("<!-- refused: python -m tests.families_table -->", "<!-- /refused -->")
REFUSED_HEADER = ("denoiser", "refused", "because")


@torch.no_grad()
def runs(model: Any, inputs: dict[str, Any], scope: str, keys_values: str) -> bool:
    """Whether the denoiser takes this combination; if it does, tokens must go and numbers be finite."""
    options = {"scope": scope, "keys_values": keys_values, "warmup_steps": 1}
    try:
        handle = apply_tofu(model, ratio=0.5, method="random", **options)
        for step in range(2):
            handle.step(step, 2)
            out = model(**inputs, return_dict=False)
    except ValueError:  # refused in words, when applied or at the first call
        remove_tofu(model)
        return False
    rows = handle.stats()
    assert all(torch.isfinite(each).all() for each in tensors_in(out))
    assert rows and all(row["tokens_kept"] < row["tokens_in"] for row in rows)
    handle.remove()
    return True


@torch.no_grad()
def batches(model: Any, inputs: dict[str, Any]) -> str:
    """How images that keep different tokens are run."""
    family = known_family(model)
    assert family is not None
    scope = next(each for each in ("block", "attention") if each not in family.scopes_refused)
    with apply_tofu(model, ratio=0.5, method="tome", scope=scope) as handle:
        model(**inputs)
        alone = handle.inspect()[0].per_image
    return "one after another, unless `share_plan`" if alone else "together"


@cache
def pipeline_sources() -> list[tuple[frozenset[str], list[str]]]:
    """Of every file of diffusers' pipelines, the words in it and the pipelines that it defines."""
    files = Path(diffusers.pipelines.__path__[0]).rglob("pipeline_*.py")
    texts = [path.read_text(encoding="utf-8") for path in files if path.parent.name not in MAPS]
    return [
        (
            frozenset(re.findall(r"\w+", text)),
            re.findall(r"^class (\w+Pipeline)\(", text, re.MULTILINE),
        )
        for text in texts
    ]


def pipelines_of(name: str) -> list[str]:
    """The pipelines of diffusers that take a denoiser of this class, by their source."""
    found = {each for words, defined in pipeline_sources() if name in words for each in defined}
    return sorted(found, key=lambda each: (len(each), each))


def row(name: str) -> tuple[str, ...]:
    """One class's line."""
    model, inputs = DENOISERS[name].build(), DENOISERS[name].arguments()
    family = known_family(model)
    assert family is not None
    sides = [str(side) for side in family.grids(model, inputs)[0].sides if side > 1]
    scopes = (
        ", ".join(each for each in KEYS_VALUES if runs(model, inputs, scope, each)) or "-"
        for scope in SCOPES
    )
    pipelines = pipelines_of(name)
    others = f" and {len(pipelines) - 1} more" if len(pipelines) > 1 else ""
    named = f"`{pipelines[0]}`{others}" if pipelines else "-"
    grid, profile = " x ".join(sides), default_profile(family.name)
    return (f"`{name}`", named, grid, *scopes, batches(model, inputs), profile)


def default_profile(family: str) -> str:
    """Whose profile `ratio=` takes, and whether it was measured there, as a summary says it."""
    said = origin(family, resolve(TokenReduction(ratio=0.5), family))
    return said.removeprefix(" (default profile, ").removesuffix(")")


def refused() -> str:
    """The classes in which a choice of keys and values or a scope cannot be had, and why, as Markdown."""
    rows = []
    for name in CLASSES:
        family = FAMILIES[known_classes()[name]]
        choices = [f"`keys_values={each!r}`" for each in family.keys_values_refused]
        choices += [f"`scope={each!r}`" for each in family.scopes_refused]
        if choices:
            rows.append((f"`{name}`", ", ".join(choices), family.refused_because))
    return markdown.table(REFUSED_HEADER, rows)


def table() -> str:
    """All classes, as Markdown."""
    return markdown.table(HEADER, map(row, CLASSES))


def denoisers() -> str:
    """The classes on which steps are skipped in tests, as Markdown."""
    names = ", ".join(f"`{name}`" for name in SKIPPED)
    return "\n".join(textwrap.wrap(f"{len(SKIPPED)} classes: {names}.", 120))


def document() -> str:
    """The page with all three made anew."""
    text = markdown.between(MARKS, f"\n{table()}\n", DOCUMENT.read_text(encoding="utf-8"))
    text = markdown.between(REFUSED_MARKS, f"\n{refused()}\n", text)
    return markdown.between(LIST_MARKS, f"\n{denoisers()}\n", text)


def main() -> None:
    DOCUMENT.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
