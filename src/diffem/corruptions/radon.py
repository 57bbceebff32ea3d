"""Tomography: projections of images along parallel beams."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Params, register_corruption
from .linear import LinearCorruption

MOST = 10_000  # angles


@register_corruption
class Radon(LinearCorruption):
    """The Radon transform of every channel (parallel beams), plus noise: y is (N, channels, angles, n) for images
    (N, channels, n, n).

    At angle a, a pixel at (x, y) from the centre, x to the right and y upwards, is projected onto the detector at
    x cos a + y sin a. Its value is shared between the two nearest of the n detector bins, which are as wide as a pixel.
    Values beyond the detector, e.g. from corners, are lost. If angles differ between observations, list all of them,
    and hide those that were not measured by mask.npy (N, 1, angles, 1).

    Arguments:
        angles: The number of angles, evenly spaced in [0, span) degrees; or a list of angles in degrees.
        span: The range of the angles in degrees, if their number is given.
        noise: Standard deviation of the noise on the projections; see :class:`diffem.LinearCorruption`.
    """

    same_units = False
    aligned = False

    def __init__(
        self, angles: int | Sequence[float], span: float = 180.0, noise: float | Sequence[float] | None = None
    ) -> None:
        super().__init__(noise)
        number = 0 if isinstance(angles, Sequence) else angles
        if (number < 1 and not (isinstance(angles, Sequence) and angles)) or number > MOST or number != int(number):
            raise DiffemError(
                f"Radon: angles must be a number of angles from 1 to {MOST:,}, or a list in degrees, got {angles}"
            )
        self.angles = tuple(map(float, angles)) if isinstance(angles, Sequence) else int(angles)
        self.span = float(span)
        self._cache: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict:
        return {**vars(self), "_cache": {}}  # torch cannot copy these matrices

    @property
    def degrees(self) -> list[float]:
        """The angles in degrees."""
        if isinstance(self.angles, tuple):
            return list(self.angles)
        return [self.span * k / self.angles for k in range(self.angles)]

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 3 or shape[1] != len(self.degrees):
            raise DiffemError(
                f"y.npy: shape (N, {', '.join(map(str, shape))}) is not (N, channels, {len(self.degrees)} angles, bins)"
            )
        return (shape[0], shape[2], shape[2])

    def A(self, x: Tensor, params: Params) -> Tensor:
        n = x.shape[-1]
        if x.ndim != 4 or x.shape[2] != n:
            raise DiffemError(f"Radon: items must be square images (channels, n, n), got {tuple(x.shape[1:])}")
        sums = (self.beams(n, x)[0] @ x.flatten(0, 1).flatten(1).T).T
        return sums.view(*x.shape[:2], -1, n)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        n = y.shape[-1]
        return (self.beams(n, y)[1] @ y.flatten(0, 1).flatten(1).T).T.view(*y.shape[:2], n, n)

    def beams(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A as a sparse matrix (angles * n, n * n), for images of n x n pixels, and its transpose."""
        key = n, like.dtype, like.device
        if key not in self._cache:
            middle = (n - 1) / 2
            row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
            angle = torch.tensor(self.degrees, dtype=torch.float64).deg2rad()[:, None]
            place = (column.flatten() - middle) * angle.cos() - (row.flatten() - middle) * angle.sin() + middle
            left = place.floor()
            where, weight = [], []
            for bins, share in ((left, 1 - (place - left)), (left + 1, place - left)):
                view, pixel = ((bins >= 0) & (bins < n)).nonzero(as_tuple=True)
                where.append(torch.stack((view * n + bins[view, pixel].long(), pixel)))
                weight.append(share[view, pixel])
            size = len(self.degrees) * n, n * n
            matrix = torch.sparse_coo_tensor(torch.cat(where, 1), torch.cat(weight), size, check_invariants=False)
            with warnings.catch_warnings():  # compressed rows are several times as fast
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                self._cache[key] = matrix.to(like).to_sparse_csr(), matrix.T.to(like).to_sparse_csr()
        return self._cache[key]
