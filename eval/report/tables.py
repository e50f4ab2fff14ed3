"""The tables of README.md and the documents, and the plots, from committed results.

    python -m eval tables

Between a document's marks, <!-- table: NAME --> and <!-- /table -->, stands what `TABLES` makes of the rows.
Every line of a study cites its row, so that `check_citations` finds it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from eval.provenance import ROOT
from eval.report import plots_step
from eval.report.plots import pareto
from eval.report.plots_growth import growth
from eval.report.tables_distances import SIZES, claim_table, distances_table, sharp_table
from eval.report.tables_encoders import SUBJECTS, ahead_of, encoders_table
from eval.report.tables_front import (
    FRONT,
    drawn_rows,
    drift_table,
    hires_table,
    steps_table,
    tokens_table,
    typed_table,
)
from eval.report.tables_linearity import linearity_table, merged_table
from eval.report.tables_profiles import options_table, whole_steps_table
from eval.report.tables_rivals import RIVALS, both_table, closest_table, rivals_table
from eval.report.tables_rules import lengths_table, rules_table, searched_table
from eval.report.tables_speed import (
    SPEEDS,
    classes_table,
    full_size_table,
    growth_rows,
    growth_table,
    padding_seen_table,
    padding_table,
    speed_table,
    stacking_table,
    suite_table,
)
from eval.report.tables_tuned import late_table, tried_table, tuned_table


def measured(name: str, suffix: str = "csv") -> list[Path]:
    """The committed files of a measurement, the CPU's first; a GPU's is there once one has measured."""
    results = ROOT / "eval" / "results"
    found = [results / f"{name}_{device}.{suffix}" for device in ("cpu", "cuda")]
    return [path for path in found if path.exists()]


GROWTH, SUITES = measured("growth"), measured("suite")
STACKING = measured("stacking", "jsonl")
FULL_SIZE = ROOT / "eval" / "results" / "full_size.jsonl"
CLASSES = ROOT / "eval" / "results" / "full_size_classes.jsonl"
PADDING = ROOT / "eval" / "results" / "text_padding.jsonl"
PADDING_SEEN = ROOT / "eval" / "results" / "padding_seen.jsonl"
DOCUMENTS = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{guide}.md"
        for guide in ("encoders", "models", "notebook", "results", "speed")
    ),
)
MARKED = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    **{f"{model} drift": (lambda model=model: drift_table(model)) for model in FRONT},
    **{f"{model} speed": (lambda model=model: speed_table(model)) for model in SPEEDS},
    **{f"encoders {each}": (lambda each=each: encoders_table(each)) for each in SUBJECTS},
    **{f"encoders {each} ahead": (lambda each=each: ahead_of(each)) for each in SUBJECTS},
    "whole steps": whole_steps_table,
    "profile options": options_table,
    "typed": typed_table,
    "steps": steps_table,
    "closest": lambda: closest_table(RIVALS),
    "closest at 128 px": lambda: closest_table(FRONT),
    "both": both_table,
    "tokens": tokens_table,
    "hires": hires_table,
    "claim": claim_table,
    "sharp": sharp_table,
    **{
        f"distances at {px}": (lambda paths=paths: distances_table(paths))
        for px, paths in SIZES.items()
    },
    "lengths": lengths_table,
    "rules": rules_table,
    "searched": searched_table,
    "tuned": tuned_table,
    "late": late_table,
    "tried": tried_table,
    "rivals": rivals_table,
    "linearity": linearity_table,
    "merged by linearity": merged_table,
    "full size": lambda: full_size_table(FULL_SIZE),
    "classes": lambda: classes_table(CLASSES),
    "padding": lambda: padding_table(PADDING),
    "padding seen": lambda: padding_seen_table(PADDING_SEEN),
    "stacking": lambda: stacking_table(STACKING),
    "growth": lambda: growth_table(GROWTH),
    "suite": lambda: "\n\n".join(map(suite_table, SUITES)),
}


def filled(text: str) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: if it asks for a table that is none of `TABLES`.
    """

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table {match[2]!r}; choose one of {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return MARKED.sub(made, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes none."""


def main(args: argparse.Namespace) -> None:
    """`python -m eval tables`."""
    for model in FRONT:
        figure = pareto(drawn_rows(model), "psnr_db", "flops")
        figure.savefig(ROOT / "docs" / f"results_{model}.png", metadata={"Software": None})
    figure = growth([growth_rows(path) for path in GROWTH])
    figure.savefig(ROOT / "docs" / "growth.png", metadata={"Software": None})
    plots_step.save(ROOT / "docs" / "how_it_works.png")
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
