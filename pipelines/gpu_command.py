"""What commands for a machine with a GPU share: packages from a folder of wheels, and an end in time."""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

GRACE = 20
"""Seconds over its time after which what then still runs is cut off; what is done is on disk by then."""


def start_with_wheels(
    parser: argparse.ArgumentParser, wheels: Path | None, module: str, given: Sequence[str]
) -> None:
    """Start a command anew with the packages of a folder, if one is given; does not return then.

    Exits as on a mistake in the arguments if that cannot be done.
    """
    if wheels is None:
        return
    try:
        with_wheels(wheels, module, without_wheels(given))
    except (ValueError, subprocess.CalledProcessError) as error:
        parser.error(str(error))


def with_wheels(wheels: Path, module: str, arguments: Sequence[str]) -> None:
    """Start a module with the packages of a folder beside the interpreter's own; does not return.

    Raises:
        ValueError: if there are none.
        subprocess.CalledProcessError: if pip cannot install them.
    """
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise ValueError(
            f"{wheels} holds no .whl file; fill it with `pip download`, or leave it out"
        )
    target = tempfile.mkdtemp(prefix="wheels-")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--target", target, *found], check=True)
    path = os.pathsep.join(filter(None, [target, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def without_wheels(arguments: Sequence[str]) -> list[str]:
    """The same arguments but --wheels."""
    kept = list(arguments)
    for i, each in enumerate(kept):
        if each == "--wheels":
            return kept[:i] + kept[i + 2 :]
        if each.startswith("--wheels="):
            return kept[:i] + kept[i + 1 :]
    return kept


@contextmanager
def cut_off_after(minutes: float) -> Iterator[None]:
    """Inside it, the process ends with a traceback once it is `GRACE` seconds over its minutes."""
    # The real stderr: what stands in for it has no file.
    faulthandler.dump_traceback_later(60 * minutes + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
