"""Large images, series and volumes in patches: grids of places that cover an item, and arrays read patch by patch."""

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

    They are `step` apart. The last one along an axis ends where the item ends, so its overlap may be larger.

    Arguments:
        size: The spatial shape of the item.
        patch: The spatial shape of a place: one number for each axis, or one for all.
        step: The distance from one place to the next, in the same form; `patch` by default.

    Attributes:
        starts: Where places begin, for each axis.
        places: All places; the last axis varies fastest.

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
        """The part of an array or tensor (channels, *size) at a place. Axes of length 1 are kept. Arrays of other
        shapes are returned whole."""
        spatial = tuple(item.shape[1:])
        if len(spatial) != len(self.size) or any(a not in (1, n) for a, n in zip(spatial, self.size, strict=True)):
            return item
        return item[(slice(None), *(p if a > 1 else slice(None) for a, p in zip(spatial, place, strict=True)))]

    def rows(self, items: np.ndarray) -> np.ndarray:
        """The rows of the patches of some items, in an array of the patches of all items, item by item."""
        return (items[:, None] * len(self.places) + np.arange(len(self.places))).ravel()

    def touched(self, rows: np.ndarray, items: int) -> np.ndarray:
        """Which patches of `items` items overlap the patches `rows`, including these: bool, one for each patch. For
        `step` equal to `patch`."""
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
    """An array (N, channels, *size), read as patches (N * places, channels, *patch), item by item.

    Only the rows that are read are cut. If entries of the array do not have the spatial shape of items, every patch
    gets the whole entry of its item.

    Arguments:
        array: Anything that is indexed by rows.
        grid: The places.
        layout: The layout of items in the array, and of the patches; by default that of models.
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
            if number != last:  # an item is read once for all of its patches
                item, last = self.array[number], number
            found[k] = self._part(item, self.grid.places[place])
        return found.reshape(*rows.shape, *self.shape[1:])

    def _part(self, item: Any, place: Place) -> Any:
        if self.layout is None:
            return self.grid.part(item, place)
        return self.layout.to_user(self.grid.part(self.layout.to_model(item), place))
