"""Magnetic resonance: k-space of one or several coils, usually undersampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Params, register_corruption
from .linear import LinearCorruption


@register_corruption
class Fourier(LinearCorruption):
    """The orthonormal Fourier transform of every coil's image, with the zero frequency in the middle, plus noise.

    y is complex, (N, coils, *spatial), or has real and imaginary parts as pairs of channels, (N, 2 coils, *spatial).
    The mask broadcasts against y: for Cartesian lines it is (N, 1, 1, width). With several coils, their sensitivity
    maps are a parameter, coils.npy, in the shape of y, or (1, ...) if they are the same for all observations.

    Arguments:
        items: Whether images are `complex` (2 channels) or `real` (1 channel).
        noise: Standard deviation of the noise on each real and imaginary part; see :class:`diffem.LinearCorruption`.
    """

    parameters = ("coils", "mask", "noise")
    same_units = False
    aligned = False

    def __init__(self, items: str = "complex", noise: float | Sequence[float] | None = None) -> None:
        super().__init__(noise)
        if items not in ("complex", "real"):
            raise DiffemError(f"Fourier: items must be complex or real, got {items!r}")
        self.items, self.complex_items = items, items == "complex"

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        if y.ndim < 3 or y.shape[1] % 2:
            raise DiffemError(f"y.npy: shape {y.shape} is not that of k-space: real and imaginary parts are channels")
        if "coils" in params and params["coils"].shape[1:] != y.shape[1:]:
            raise DiffemError(f"coils.npy: shape {params['coils'].shape} does not fit y's {y.shape}")
        if "coils" not in params and y.shape[1] != 2:
            raise DiffemError(f"coils.npy: missing; y.npy has {y.shape[1] // 2} coils, whose maps must be known")
        return super().check(y, params, shape)

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2 if self.items == "complex" else 1, *shape[1:])

    def A(self, x: Tensor, params: Params) -> Tensor:
        z = _complex(x) if self.items == "complex" else x
        if "coils" in params:
            z = z * _complex(params["coils"].to(x))
        axes = tuple(range(2, x.ndim))
        z = torch.fft.fftn(torch.fft.ifftshift(z, axes), dim=axes, norm="ortho")
        return _channels(torch.fft.fftshift(z, axes))

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        axes = tuple(range(2, y.ndim))
        z = torch.fft.ifftn(torch.fft.ifftshift(_complex(y), axes), dim=axes, norm="ortho")
        z = torch.fft.fftshift(z, axes)
        if "coils" in params:
            z = (z * _complex(params["coils"].to(y)).conj()).sum(1, keepdim=True)
        return _channels(z) if self.items == "complex" else z.real


def _complex(x: Tensor) -> Tensor:
    """Pairs of channels (B, 2 C, ...) as complex channels (B, C, ...)."""
    return torch.complex(x[:, ::2], x[:, 1::2])


def _channels(z: Tensor) -> Tensor:
    """The inverse of :func:`_complex`."""
    return torch.stack((z.real, z.imag), 2).flatten(1, 2)
