"""The interface between readers and the import, and limits that hold for all readers.

A reader first reads headers only, so that files that do not fit are refused before anything is written. Values are then
read in blocks, so that memory does not grow with the number of observations.
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
Block = dict[str, np.ndarray]  # y, and planes of the same shape: (n, *shape) each

BLOCK = 2**24  # approximate number of bytes that are read at a time
FREE = 2**26  # any file may declare this many bytes of values
DENSEST = 2000  # and otherwise at most this many per stored byte: deflate compresses by a factor of at most 1,032


@dataclass(frozen=True)
class Options:
    """Options of `diffem import`, see its `--help`; each is for some formats. `inside` is the PATH of FILE:PATH."""

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
        dtype: The dtype of its values, in this machine's byte order.
        blocks: Yields its rows in order, in blocks (n, ...).
    """

    shape: Shape
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class File:
    """The observations in one file.

    Attributes:
        name: Its path relative to the source.
        items: The shapes (channels, *spatial) or (features,) of its items in order, in runs: (count, shape).
        dtype: The dtype of y.
        read: Yields the items in order, in blocks.
        planes: The arrays that `read` yields in addition to y: mask (true = observed) or noise, in the shape of y.
        beside: Other arrays, which become operator parameters, by name.
        about: Metadata needed to write the file again, ready for JSON.
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
    """Turns any exception of a decoder, e.g. on a broken file, into a DiffemError of one line."""
    try:
        yield
    except DiffemError:
        raise
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise DiffemError(f"{name}: cannot be read ({reason.splitlines()[0]}); replace it or remove it") from None


def numbers(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype, in this machine's byte order.

    Raises:
        DiffemError: If it is not a dtype of numbers.
    """
    if dtype.kind not in "biufc":
        raise DiffemError(f"{name}: holds {dtype}; give numbers")
    return dtype.newbyteorder("=")


def plausible(name: str, shape: Shape, dtype: np.dtype, stored: int) -> None:
    """Refuses a shape far too large for the stored bytes, before anything is allocated.

    Arguments:
        name: The name in error messages.
        shape: The declared shape.
        dtype: The declared dtype.
        stored: The number of bytes that are stored.
    """
    declared = math.prod(shape) * dtype.itemsize
    if declared > max(FREE, DENSEST * stored):
        raise DiffemError(f"{name}: declares {shape} of {dtype}, {declared:,} bytes, but stores {stored:,}; not read")


def same(name: str, found: list[tuple[Shape, np.dtype]]) -> tuple[list[tuple[int, Shape]], np.dtype]:
    """The shapes of the items of a file, in runs (count, shape), and their common dtype.

    Raises:
        DiffemError: If there are no items, or items of several dtypes.
    """
    if not found:
        raise DiffemError(f"{name}: holds nothing to read")
    if other := next((dtype for _, dtype in found if dtype != found[0][1]), None):
        raise DiffemError(f"{name}: holds {found[0][1]} and {other}; give values of one type")
    return [(len(list(run)), shape) for shape, run in itertools.groupby(shape for shape, _ in found)], found[0][1]


def steps(rows: int, of_bytes: int) -> Iterator[slice]:
    """Slices of the rows, of about :data:`BLOCK` bytes each."""
    step = max(1, BLOCK // max(1, of_bytes))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def corners(shape: Shape, patch: int) -> list[Shape]:
    """Where patches of an item (channels, *spatial) begin: edge to edge, the last along an axis flush with its end."""
    starts = [sorted({*range(0, size - patch + 1, patch), size - patch}) for size in shape[1:]]
    return list(itertools.product(*starts))


def window(corner: Shape, patch: int) -> tuple[slice, ...]:
    """The slices that cut a patch out of an item (channels, *spatial)."""
    return (slice(None), *(slice(start, start + patch) for start in corner))
