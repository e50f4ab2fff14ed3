"""The tables in docs/compatibility.md, from the rows that tests/test_compatibility.py tries.

`python -m tests.compatibility_table` rebuilds them; a test holds the document to it.
"""

from pathlib import Path

from tests import markdown
from tests.compatibility import AMOUNTS, KINDS, Combination, Refused, Row

DOCUMENT = Path(__file__).parent.parent / "docs" / "compatibility.md"
MARKS = ("<!-- compatibility: python -m tests.compatibility_table -->", "<!-- /compatibility -->")
HEADER = ("", "UNet: tokens", "steps", "transformer: tokens", "steps", "note")


def line(row: Row) -> tuple[str, ...]:
    """One combination: a cell a kind of denoiser and workflow, and what to know."""
    outcomes = [getattr(row, workflow) for workflow in AMOUNTS]
    cells = [
        outcome.cell if pipelines else ""
        for pipelines in (row.unet, row.transformer)
        for outcome in outcomes
    ]
    notes = [f'"{outcome.words}"' for outcome in outcomes if isinstance(outcome, Refused)]
    instead = row.instead.items() if isinstance(row, Combination) else ()
    notes += [f'works with `{name}="{value}"`' for name, value in instead]
    return (row.name, *cells, "; ".join([*notes, *filter(None, [row.note])]))


def page(text: str) -> str:
    """The document with its tables made anew, one a kind."""
    made = (f"## {kind}\n\n{markdown.table(HEADER, map(line, KINDS[kind]))}" for kind in KINDS)
    return markdown.between(MARKS, "\n\n" + "\n\n".join(made) + "\n\n", text)


def main() -> None:
    DOCUMENT.write_text(page(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
