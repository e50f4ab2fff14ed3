"""Files that are added to or written whole, whenever the process or the machine stops."""

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
