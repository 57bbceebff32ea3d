"""Fewer pixels, or fewer colours: means of neighbouring pixels, and weighted sums of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import LARGEST_ITEM, Params, register_corruption
from .linear import LinearCorruption


@register_corruption
class Downsample(LinearCorruption):
    """Binning: every entry of y is the mean of a block of x, plus noise.

    Arguments:
        factor: Edge length of the blocks in pixels: a number, or one for each spatial axis.
        noise: Standard deviation of the noise; see :class:`diffem.LinearCorruption`.
    """

    def __init__(self, factor: int | Sequence[int], noise: float | Sequence[float] | None = None) -> None:
        super().__init__(noise)
        factors = factor if isinstance(factor, Sequence) else [factor]
        if not factors or any(f < 1 or f != int(f) for f in factors):
            raise DiffemError(f"Downsample: factor must be a whole number of pixels >= 1, got {factor}")
        self.factor = tuple(map(int, factor)) if isinstance(factor, Sequence) else int(factor)

    def _factors(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """The spatial axes of a batch of `shape`, and the factor of each."""
        axes = range(1 if len(shape) == 2 else 2, len(shape))
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,) * len(axes)
        if len(factors) != len(axes):
            raise DiffemError(f"Downsample: factor has {len(factors)} values for {len(axes)} spatial axes")
        return list(zip(axes, factors, strict=True))

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        item = [1, *shape]
        for axis, factor in self._factors(tuple(item)):
            item[axis] *= factor
        if math.prod(item) > LARGEST_ITEM:
            raise DiffemError(f"Downsample: factor {self.factor} makes items of shape {tuple(item[1:])}: too large")
        return tuple(item[1:])

    def apart(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1

    def A(self, x: Tensor, params: Params) -> Tensor:
        for axis, factor in self._factors(x.shape):
            if x.shape[axis] % factor:
                raise DiffemError(f"Downsample: items of shape {tuple(x.shape[1:])} are no multiple of {factor} pixels")
            x = x.unflatten(axis, (-1, factor)).mean(axis + 1)
        return x

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        for axis, factor in self._factors(y.shape):
            y = y.repeat_interleave(factor, axis) / factor
        return y


@register_corruption
class Grayscale(LinearCorruption):
    """Replaces several channels by one, their weighted sum, plus noise.

    Arguments:
        weights: The weight of each channel; by default the luma weights of red, green and blue (ITU-R BT.601).
        noise: Standard deviation of the noise; see :class:`diffem.LinearCorruption`.
    """

    def __init__(
        self, weights: Sequence[float] = (0.299, 0.587, 0.114), noise: float | Sequence[float] | None = None
    ) -> None:
        super().__init__(noise)
        self.weights = tuple(float(w) for w in weights)
        if not any(self.weights) or not all(map(math.isfinite, self.weights)):
            raise DiffemError(f"Grayscale: weights must be numbers, one for each channel, got {list(weights)}")

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) < 2 or shape[0] != 1:
            raise DiffemError(f"y.npy: shape (N, {', '.join(map(str, shape))}) is not that of gray images (N, 1, ...)")
        return (len(self.weights), *shape[1:])

    def _weights(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights).to(like).view(-1, *(1,) * (like.ndim - 2))

    def A(self, x: Tensor, params: Params) -> Tensor:
        return (x * self._weights(x)).sum(1, keepdim=True)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        return y * self._weights(y)
