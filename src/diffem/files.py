"""Atomic replacement of files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike


def replace(file: Path, content: bytes) -> None:
    """Writes `content` to a temporary file next to `file`, flushes it to disk, and renames it to `file`."""
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
    """A new memory-mapped array with its disk space allocated: on a full disk, writing to the map would kill the
    process."""
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
    """Replaces `target` by the content of `source`, as a hard link where the file system allows it.

    Afterwards neither file may be written to, only replaced.
    """
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it remains if both names already were one file
