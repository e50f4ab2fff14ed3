"""What people stack on a pipeline together with tofu: each row of docs/compatibility.md is tried."""

import importlib.util

import pytest

from tests import compatibility_table
from tests.compatibility import AMOUNTS, KINDS

ROWS = [row for rows in KINDS.values() for row in rows]


@pytest.mark.parametrize("workflow", AMOUNTS)
@pytest.mark.parametrize(
    ("row", "pipeline"),
    [
        pytest.param(row, pipeline, id=f"{row.name}-{pipeline}")
        for row in ROWS
        for pipeline in (*row.unet, *row.transformer)
    ],
)
def test_a_row_of_the_table(row, pipeline, workflow):
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed")
    row.prove(pipeline, workflow)


def test_the_page_shows_these_rows():
    text = compatibility_table.DOCUMENT.read_text(encoding="utf-8")
    assert compatibility_table.page(text) == text


def test_rows_have_names_of_their_own():
    assert len({row.name for row in ROWS}) == len(ROWS)
