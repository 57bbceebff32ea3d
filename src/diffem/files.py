"""Files are replaced as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike


def replace(file: Path, content: bytes) -> None:
    """Writes `content` beside `file`, to the disk, and then puts it in the place of `file`."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from None


def make_array(file: Path, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.memmap:
    """A new memory-mapped array whose space is taken now: on a full disk, writing to the map would kill the process."""
    try:
        array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(file, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from None
    return array


def link(source: Path, target: Path) -> None:
    """Puts the content of `source` in the place of `target`, without a copy where the file system allows it.

    Neither may be written to afterwards, only replaced.
    """
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays where both names are of one file already
