"""Model units, in which data span about [-1, 1]. Everything a user gives or gets is in the units of y instead.

Units are converted where observations are read and reconstructions written (:class:`diffem.data.Dataset`), and
in :class:`diffem.posterior.Posterior`. A nonlinear corruption is simulated in the units of the data: each call converts
(:class:`diffem.corruptions.base.Scaled`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Units:
    """Converts x in the units of the data to (x - centre) / half in model units, and back.

    Arguments:
        centre: A number, or one for each channel or column: an array that broadcasts against an item.
        half: A number or an array as for `centre`, > 0.
    """

    def __init__(self, centre: Any = 0.0, half: Any = 1.0) -> None:
        self.centre, self.half = np.asarray(centre, np.float64), np.asarray(half, np.float64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Units):
            return False
        pairs = (self.centre, other.centre), (self.half, other.half)
        return all(np.array_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def scale(self, x: Any) -> Any:
        """Converts a tensor, array or number from the units of the data to model units."""
        return (x - _like(self.centre, x)) / _like(self.half, x)

    def restore(self, x: Any) -> Any:
        """The inverse of :meth:`scale`."""
        return x * _like(self.half, x) + _like(self.centre, x)

    def scale_spread(self, std: Any) -> Any:
        """Converts a standard deviation to model units."""
        return std / _like(self.half, std)

    def restore_spread(self, std: Any) -> Any:
        """The inverse of :meth:`scale_spread`."""
        return std * _like(self.half, std)

    @property
    def config(self) -> list:
        """The arguments that rebuild it, ready for JSON."""
        return [self.centre.tolist(), self.half.tolist()]


def _like(value: np.ndarray, x: Any) -> Any:
    if not value.ndim:
        return float(value)
    return torch.as_tensor(value).to(x) if isinstance(x, Tensor) else value.astype(getattr(x, "dtype", np.float64))
