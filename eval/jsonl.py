"""Rows as JSON, a line each, in a file that is added to as they are measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed process left unfinished is passed over."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def mend(path: Path) -> None:
    """Cut off a line that a killed process left unfinished, before others are added behind it."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row in one write, so that several processes can."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")
