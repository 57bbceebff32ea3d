"""Random projections: every observation has its own matrix, whose rows are uniform on the unit sphere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Rows

from .base import NOISE_FLOOR, Observed, Params, register_corruption
from .linear import LinearCorruption


@register_corruption
class RandomProjection(LinearCorruption):
    """y = A x + noise with A (rows, features), its rows drawn anew for each item, uniform on the unit sphere.

    Arguments:
        rows: The number of values measured of each item.
        noise: Standard deviation of the noise on each value, or None: then it is a parameter, noise.npy (N, 1).
    """

    parameters = ("matrix", "noise")  # no mask: rows of zeros stand for it
    same_units = False

    def __init__(self, rows: int, noise: float | None = None) -> None:
        super().__init__(noise)
        if rows < 1:
            raise DiffemError(f"RandomProjection: rows must be at least 1, got {rows}")
        self.rows = int(rows)

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        if "matrix" not in params:
            raise DiffemError("matrix.npy: missing; RandomProjection needs one matrix (rows, features) per observation")
        matrix = params["matrix"]
        if matrix.ndim != 3 or y.ndim != 2 or matrix.shape[:2] != y.shape:
            raise DiffemError(
                f"matrix.npy: shape {matrix.shape} does not fit y's {y.shape}; it must be (N, rows, features)"
            )
        if isinstance(self.noise, tuple) or ("noise" in params and params["noise"].shape[1:] != (1,)):
            raise DiffemError("noise: RandomProjection needs one number, or noise.npy of shape (N, 1)")
        super().check(y, params, shape)
        return (int(matrix.shape[2]),)

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        if len(shape) != 1:
            raise DiffemError(f"RandomProjection: items must have shape (features,), got {shape}")
        matrix = torch.randn(n, self.rows, *shape, generator=generator, device=generator.device)
        return {"matrix": matrix / matrix.norm(dim=-1, keepdim=True)}

    def A(self, x: Tensor, params: Params) -> Tensor:
        return (params["matrix"].to(x) @ x[..., None])[..., 0]

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        return (params["matrix"].to(y).mT @ y[..., None])[..., 0]

    def likelihood(self, y: Tensor, params: Params) -> Rows:
        noise = self.noise_std(y, params).clamp(min=NOISE_FLOOR).expand_as(y)[:, :1]
        return Rows(y, params["matrix"].to(y), noise)

    def thin(self, y: Tensor, params: Params, generator: torch.Generator) -> tuple[Observed, Observed]:
        # One row is hidden by setting it to zero: a zero row measures nothing.
        row = torch.randint(y.shape[1], (len(y), 1), generator=generator, device=generator.device).to(y.device)
        hide = torch.arange(y.shape[1], device=y.device) == row
        part = lambda keep: (y * keep, {**params, "matrix": params["matrix"] * keep[..., None]})  # noqa: E731
        return part(~hide), part(hide)

    def seen(self, y: Tensor, params: Params) -> Tensor:
        return (params["matrix"] != 0).any(-1)

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        noise = [noise[:, :1] for noise in self.noise_of(y, params)]
        return [y, params["matrix"].to(y).flatten(1), *noise]

    def entries(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        back = self.adjoint(y, params)
        return back, torch.ones_like(back, dtype=torch.bool)
