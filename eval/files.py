"""Files that stay valid whenever the process or the machine stops: written whole, or added to line by line.

A line that a killed process left unfinished is passed over by `whole_lines`, and `mend` cuts it off before
others are added behind it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, whenever the process or machine stops.

    Raises:
        OSError: if it cannot be written, such as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(
                error.errno,
                f"no space left to write {path}; what was written before it stays valid: free some "
                "space and run the same command again",
            ) from error
        raise


def whole_lines(path: Path) -> list[bytes]:
    """Those of a file, without the ones that hold nothing; none of a file that is not there."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [line for line in lines[:-1] if line]


def mend(path: Path) -> None:
    """Cut off a line that a killed process left unfinished."""
    if path.exists():
        data = path.read_bytes()
        if len(data) > (end := data.rfind(b"\n") + 1):
            os.truncate(path, end)


def add(path: Path, lines: bytes) -> None:
    """Add to a file in one write, so that several processes can."""
    with open(path, "ab", buffering=0) as file:
        file.write(lines)
