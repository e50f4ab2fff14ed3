"""The picture of one denoising step: its numbers are the document's, its files exist, it is small."""

import re

from eval.provenance import ROOT
from eval.report import plots_step

PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")


def test_it_numbers_the_things_of_the_document():
    drawn = [number for number, *_ in (*plots_step.BEGIN, *plots_step.BLOCK, *plots_step.END)]
    assert drawn == [*range(1, 11)]
    assert [int(n) for n in re.findall(r"^ +(\d+)  \w", PAGE, flags=re.MULTILINE)] == drawn


def test_every_file_that_it_names_exists():
    package = ROOT / "tofu_diffusers"
    texts = [text.get_text() for text in plots_step.step().axes[0].texts]
    named = {match[0] for text in texts for match in re.finditer(r"[a-z]+/\w+", text)}
    assert len(named) > 10
    for name in named:
        assert (package / name).is_dir() or (package / f"{name}.py").is_file(), name


def test_it_stands_in_the_document_and_is_small(tmp_path):
    assert "](how_it_works.png)" in PAGE
    plots_step.save(tmp_path / "step.png")
    for path in (tmp_path / "step.png", ROOT / "docs" / "how_it_works.png"):
        assert path.stat().st_size < 60_000
