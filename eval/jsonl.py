"""Rows as JSON, a line each, in a file that is added to as they are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.files import add, whole_lines


def read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file."""
    return [json.loads(line) for line in whole_lines(path)]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row."""
    add(path, json.dumps(row).encode() + b"\n")
