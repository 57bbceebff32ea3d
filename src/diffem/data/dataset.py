"""Observations and items in model units: units are converted here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffem import devices, files, seeding
from diffem.corruptions import Corruption, Observed, Params
from diffem.units import Units

from .layout import Layout
from .observations import CHUNK, Observations


class Dataset:
    """Observations in model units.

    Arguments:
        observations: The observations, in their own units.
        units: The conversion to model units.
        rows: If parameters are stored in files, the observations from which new ones take theirs; all by default.

    Attributes:
        shape: The shape of an item.
    """

    def __init__(self, observations: Observations, units: Units, rows: np.ndarray | None = None) -> None:
        self.observations, self.units, self.shape = observations, units, observations.shape
        self.rows = np.arange(len(observations)) if rows is None else rows

    @cached_property
    def corruption(self) -> Corruption:
        """The corruption, in model units."""
        corruption = self.observations.corruption.scaled(self.units)
        if self.observations.params and not self.observations.formula:
            corruption = corruption.with_file_parameters(self.parameters)
        return corruption

    def __len__(self) -> int:
        return len(self.observations)

    def batch(self, rows: Tensor | np.ndarray | Sequence[int], device: torch.device | str = "cpu") -> Observed:
        """Observations `rows` and their parameters, on a device; unobserved entries are 0."""
        y, params = self.observations.batch(rows)
        y, params = devices.put(y, device), {k: devices.put(v, device) for k, v in params.items()}
        corruption = self.observations.corruption
        return corruption.scale_y(y, params, self.units), corruption.scale_params(params, self.units)

    def parameters(self, n: int, generator: torch.Generator) -> Params:
        """Parameters of n of the observations, drawn with replacement."""
        params = self.observations.parameters(self.rows[seeding.integers(len(self.rows), n, generator)])
        params = self.observations.corruption.scale_params(params, self.units)
        return {k: devices.put(v, generator.device) for k, v in params.items()}

    def items(self, array: np.ndarray) -> Items:
        """Wraps an array of items, stored in the units and the layout of y, for access in model units."""
        return Items(array, self.units, self.observations.item_layout)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of an array with one item for each observation, in the layout of y."""
        return len(self), *self.observations.item_layout.users(self.shape)

    def chunks(self, rows: np.ndarray | None = None, size: int = CHUNK) -> Iterator[np.ndarray]:
        """The rows (all by default) in chunks of `size`; the last one may be shorter."""
        return self.observations.chunks(rows, size)


class Items:
    """An array of items in the units and the layout of the data, read and written in model units.

    Arguments:
        array: Shape (N, ...), in the units and the layout of the data; usually a memory map.
        units: The conversion to model units.
        layout: The layout of the array; by default that of models.
    """

    def __init__(self, array: np.ndarray, units: Units, layout: Layout | None = None) -> None:
        self.array, self.units = array, units
        self.layout = layout or Layout.usual(array.ndim)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        x = self.layout.to_model(self.array[rows])
        x = self.units.scale(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)))
        files.release(self.array)
        return x

    def __setitem__(self, rows: np.ndarray, x: Tensor) -> None:
        self.array[rows] = self.layout.to_user(self.units.restore(x).cpu().numpy())
        files.release(self.array)
