"""Large images, series and volumes in parts: grids of places that cover an item, and arrays that are read as patches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffem.errors import DiffemError

from .layout import Layout

Place = tuple[slice, ...]


class Grid:
    """Places of one size that cover an item (channels, *size).

    They lie `step` apart. The last one of an axis ends where the item ends, so that it may overlap the one before by more.

    Arguments:
        size: The spatial shape of the item.
        patch: That of a place: one number for each axis, or one for all.
        step: From one place to the next, likewise; `patch` by default.

    Attributes:
        starts: Where places begin, for each axis.
        places: All of them, the last axis fastest.

    Raises:
        DiffemError: If the item is smaller than a place.
    """

    def __init__(
        self, size: Sequence[int], patch: int | Sequence[int], step: int | Sequence[int] | None = None
    ) -> None:
        self.size = tuple(size)
        self.patch = _for_each_axis(patch, self.size)
        steps = self.patch if step is None else _for_each_axis(step, self.size)
        if any(p > n for p, n in zip(self.patch, self.size, strict=True)):
            raise DiffemError(f"patch: {list(self.patch)} is larger than the images, {list(self.size)}")
        self.starts = [[*range(0, n - p, s), n - p] for n, p, s in zip(self.size, self.patch, steps, strict=True)]
        self.places: list[Place] = [
            tuple(slice(a, a + p) for a, p in zip(corner, self.patch, strict=True))
            for corner in itertools.product(*self.starts)
        ]

    def part(self, item: Any, place: Place) -> Any:
        """What an array or a tensor says of a place: a part of (channels, *size), whose axes of length 1 stay; else all of it."""
        spatial = tuple(item.shape[1:])
        if len(spatial) != len(self.size) or any(a not in (1, n) for a, n in zip(spatial, self.size, strict=True)):
            return item
        return item[(slice(None), *(p if a > 1 else slice(None) for a, p in zip(spatial, place, strict=True)))]

    def rows(self, items: np.ndarray) -> np.ndarray:
        """The rows of the patches of some items, where those of all items lie one after the other."""
        return (items[:, None] * len(self.places) + np.arange(len(self.places))).ravel()

    def touched(self, rows: np.ndarray, items: int) -> np.ndarray:
        """Which patches of so many items share an entry with the patches `rows`, these included: bool, one for each patch."""
        found = np.zeros((items, *(len(starts) for starts in self.starts)), dtype=bool)
        found.reshape(-1)[rows] = True
        for axis, (starts, patch) in enumerate(zip(self.starts, self.patch, strict=True), start=1):
            if len(starts) > 1 and starts[-1] - starts[-2] < patch:  # only the last two of an axis overlap
                last = np.moveaxis(found, axis, -1)[..., -2:]
                last |= last.any(-1, keepdims=True)
        return found.ravel()


def _for_each_axis(value: int | Sequence[int], size: tuple[int, ...]) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(size)
    whole = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
    if not size or not whole or len(values) != len(size):
        raise DiffemError(
            f"patch: must be a number of pixels, or one for each of the {len(size)} axes that are not channels, got {value!r}"
        )
    return values


class Patches:
    """An array (N, channels, *size), read as patches (N times as many, channels, *patch); the last ones of an item stand before the
    first one of the next. Only what is read is cut. What does not lie like the items is that of the item, for every patch.

    Arguments:
        array: Anything that is indexed by rows.
        grid: The places.
        layout: How items lie in the array, and then patches, too; as models see them by default.
    """

    def __init__(self, array: Any, grid: Grid, layout: Layout | None = None) -> None:
        self.array, self.grid, self.layout = array, grid, layout
        first = self._part(array[0], grid.places[0])
        self.shape = (len(array) * len(grid.places), *first.shape)
        self.ndim, self.dtype = len(self.shape), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        found = np.empty((rows.size, *self.shape[1:]), self.dtype)
        item, last = None, -1
        for k, row in enumerate(rows.ravel()):
            number, place = divmod(int(row), len(self.grid.places))
            if number != last:  # what it takes to read an item is taken once for its patches
                item, last = self.array[number], number
            found[k] = self._part(item, self.grid.places[place])
        return found.reshape(*rows.shape, *self.shape[1:])

    def _part(self, item: Any, place: Place) -> Any:
        if self.layout is None:
            return self.grid.part(item, place)
        return self.layout.to_user(self.grid.part(self.layout.to_model(item), place))
