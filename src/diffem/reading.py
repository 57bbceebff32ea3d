"""Small files, read only if they are what they should be: they may come from a stranger."""

from __future__ import annotations

import stat
from pathlib import Path

from diffem.errors import DiffemError

LARGEST = 2**26  # bytes of a small file, such as the metrics of a run


def regular(file: Path) -> Path:
    """The path of a regular file. A pipe or a device might have no end.

    Raises:
        FileNotFoundError: If there is none.
        DiffemError: If it is something else.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise DiffemError(f"{file}: is not a regular file")
    return file


def read(file: Path, largest: int = LARGEST) -> bytes:
    """The content of a regular file of at most `largest` bytes; see :func:`regular`."""
    with open(regular(file), "rb") as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise DiffemError(f"{file}: is larger than {largest:,} bytes, so it is not what its name says")
    return content
