"""Files that are replaced atomically, never through a link."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from diffem.errors import DiffemError

FORGET = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def _renamed(file: Path) -> Iterator[Path]:
    """A new path next to `file`, which is renamed to `file` at the end. After an exception it is removed."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")  # other processes may write the same file
    try:
        yield temporary
        os.replace(temporary, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # after link() it remains also if both names already were one file


def replace(file: Path, content: bytes, keep: Path | None = None) -> None:
    """Writes `content` to a temporary file next to `file`, flushes it to disk, and renames it to `file`; the file that
    was there is kept as `keep`, if one is named."""
    with _renamed(file) as temporary:
        with open(temporary, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if keep is not None and file.exists():
            link(file, keep)


def link(source: Path, target: Path) -> None:
    """Replaces `target` by the content of `source`, as a hard link where the file system allows it.

    Afterwards neither file may be written to, only replaced.
    """
    with _renamed(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def remove_temporaries(folder: Path) -> None:
    """Removes temporary files that killed processes left in a folder."""
    for file in folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(file.name) and not file.is_dir():
            file.unlink(missing_ok=True)


def make_array(file: Path, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.memmap:
    """A new memory-mapped array with its disk space allocated: on a full disk, writing to the map would kill the
    process."""
    try:
        file.unlink(missing_ok=True)  # it may be a link to another file
        array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(file, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from None
    return array


def open_array(file: Path, mode: Literal["r", "r+"] = "r") -> np.memmap:
    """A .npy array, memory-mapped; nothing in it is unpickled."""
    if not file.is_file():
        raise DiffemError(f"{file}: missing")
    try:
        with np.errstate(all="ignore"):
            with open(file, "rb") as stream:
                if stream.read(2) == b"PK":
                    raise ValueError("it is an archive; give one array of it")
            array = np.load(file, mmap_mode="r", allow_pickle=False)  # r+ would lengthen a file that is too short
            return array if mode == "r" else np.lib.format.open_memmap(file, mode=mode)
    except Exception as error:  # of many kinds: the header is Python
        said = (str(error) or type(error).__name__).splitlines()[0]
        if "Python objects" in said:
            raise DiffemError(f"{file}: holds text or objects; give numbers") from None
        raise DiffemError(f"{file}: is not a complete .npy array: {said}") from None


def release(*arrays: object) -> None:
    """Gives back the memory of the pages of memory-mapped arrays that were read or written; otherwise a process seems to
    need as much memory as its files are large. The system keeps the pages in its cache, and nothing is lost."""
    for array in arrays:
        pages = getattr(array, "_mmap", None)  # of numpy.memmap, and of its views
        private = getattr(array, "mode", "c") == "c"  # copy on write: changes are in these pages only
        if FORGET is not None and isinstance(pages, mmap.mmap) and not private:
            pages.madvise(FORGET)
