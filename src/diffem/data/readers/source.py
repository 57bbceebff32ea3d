"""What a reader finds in a file before values are read, and the limits that hold for all of them.

A reader looks at headers only, so that what does not fit is refused before anything is written. Values come in blocks, so that
memory does not grow with the number of observations.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffem.errors import DiffemError

Shape = tuple[int, ...]
Block = dict[str, np.ndarray]  # y, and what lies like it: (n, *shape) each

BLOCK = 2**24  # bytes that are read at a time, about
FREE = 2**26  # bytes that any file may declare,
DENSEST = 2000  # or else so many for each byte that it stores: deflate packs 1,032 to one at the most


@dataclass(frozen=True)
class Options:
    """What a user may say of the files, see `diffem import --help`; each is for some formats. `inside` is the PATH of FILE:PATH."""

    patch: int | None = None
    hdu: str | None = None
    slices: int | None = None
    columns: str | None = None
    axes: str | None = None
    inside: str | None = None


@dataclass(frozen=True)
class Array:
    """An array of a file, not yet read.

    Attributes:
        shape: (N, ...).
        dtype: Of its values, in this machine's byte order.
        blocks: Gives its rows in order, in blocks (n, ...).
    """

    shape: Shape
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class File:
    """Observations that lie in one file.

    Attributes:
        name: Its path below the source.
        items: The shapes (channels, *spatial) or (features,) of its items in order, in runs: (how many, shape).
        dtype: Of y.
        read: Gives the items in order, in blocks.
        planes: What `read` gives besides y: the mask (true = observed) or the noise, like y.
        beside: Arrays that become operator parameters, by name.
        about: What is needed to write the file again, ready for JSON.
    """

    name: str
    items: list[tuple[int, Shape]]
    dtype: np.dtype
    read: Callable[[], Iterator[Block]]
    planes: dict[str, np.dtype] = field(default_factory=dict)
    beside: dict[str, Array] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def decoding(name: str | Path) -> Iterator[None]:
    """Turns whatever a decoder stumbles over in a broken file into one line."""
    try:
        yield
    except DiffemError:
        raise
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise DiffemError(f"{name}: cannot be read ({reason.splitlines()[0]}); replace it or remove it") from None


def numbers(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype of values, in this machine's byte order.

    Raises:
        DiffemError: If they are not numbers.
    """
    if dtype.kind not in "biufc":
        raise DiffemError(f"{name}: holds {dtype}; give numbers")
    return dtype.newbyteorder("=")


def plausible(name: str, shape: Shape, dtype: np.dtype, stored: int) -> None:
    """Refuses a shape far beyond what is stored, before anything is allocated.

    Arguments:
        name: What error messages call it.
        shape: As declared.
        dtype: As declared.
        stored: The bytes that hold it.
    """
    declared = math.prod(shape) * dtype.itemsize
    if declared > max(FREE, DENSEST * stored):
        raise DiffemError(f"{name}: declares {shape} of {dtype}, {declared:,} bytes, but stores {stored:,}; not read")


def same(name: str, found: list[tuple[Shape, np.dtype]]) -> tuple[list[tuple[int, Shape]], np.dtype]:
    """The runs of shapes of the items of a file, and their one dtype.

    Raises:
        DiffemError: If there are none, or of several dtypes.
    """
    if not found:
        raise DiffemError(f"{name}: holds nothing to read")
    if other := next((dtype for _, dtype in found if dtype != found[0][1]), None):
        raise DiffemError(f"{name}: holds {found[0][1]} and {other}; give values of one type")
    return [(len(list(run)), shape) for shape, run in itertools.groupby(shape for shape, _ in found)], found[0][1]


def steps(rows: int, of_bytes: int) -> Iterator[slice]:
    """The rows in steps of about :data:`BLOCK` bytes."""
    step = max(1, BLOCK // max(1, of_bytes))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def corners(shape: Shape, patch: int) -> list[Shape]:
    """Where patches of an item (channels, *spatial) begin: edge to edge, the last one of an axis at its end."""
    starts = [sorted({*range(0, size - patch + 1, patch), size - patch}) for size in shape[1:]]
    return list(itertools.product(*starts))


def window(corner: Shape, patch: int) -> tuple[slice, ...]:
    """The part of an item (channels, *spatial) that a patch is."""
    return (slice(None), *(slice(start, start + patch) for start in corner))
