"""Blur by known kernels: one for all observations, or one for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Params, register_corruption
from .linear import LinearCorruption

BORDERS = ("reflect", "zero", "circular")
POINTS = 16  # of a motion kernel, per pixel of its length


@register_corruption
class Blur(LinearCorruption):
    """y = k * x + noise: every channel is convolved with the kernel of its observation.

    The kernel is a parameter, kernel.npy, of shape (N, height, width) for images, (N, length) for series and vectors,
    and (N, depth, height, width) for volumes; with N = 1 it is the same for all. Its centre is entry size // 2 of each
    axis. It is not normalised: let it sum to 1 if the blur preserves means.

    Arguments:
        border: Values beyond the border: `reflect` (mirrored, with the edge entry repeated), `zero`, or `circular`.
        noise: Standard deviation of the noise; see :class:`diffem.LinearCorruption`.
    """

    parameters = ("kernel", "mask", "noise")

    def __init__(self, border: str = "reflect", noise: float | Sequence[float] | None = None) -> None:
        super().__init__(noise)
        if border not in BORDERS:
            raise DiffemError(f"Blur: border must be reflect, zero or circular, got {border!r}")
        self.border = border

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        spatial = y.shape[1:] if y.ndim == 2 else y.shape[2:]
        wanted = f"it must be (N, {', '.join(f'up to {n}' for n in spatial)})"
        if "kernel" not in params:
            raise DiffemError(f"kernel.npy: missing; Blur needs the kernel of each observation, or one; {wanted}")
        kernel = params["kernel"]
        if kernel.ndim != 1 + len(spatial) or any(k > n for k, n in zip(kernel.shape[1:], spatial, strict=True)):
            raise DiffemError(f"kernel.npy: shape {kernel.shape} does not fit y's {y.shape}; {wanted}")
        return super().check(y, params, shape)

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apart(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1

    def A(self, x: Tensor, params: Params) -> Tensor:
        if "kernel" not in params:  # there is no observation, as when the prior is sampled
            return x
        padded, kernel = x if x.ndim > 2 else x[:, None], params["kernel"].to(x)
        for axis, size in enumerate(kernel.shape[1:], start=2):
            padded = padded.index_select(axis, self._source(padded.shape[axis], size, x.device))
            padded = padded * self._inside(padded, axis, size) if self.border == "zero" else padded
        y = _convolved(padded, kernel[:, None], adjoint=False)
        for axis, size in enumerate(kernel.shape[1:], start=2):
            y = y.narrow(axis, size - 1, y.shape[axis] - size + 1)
        return y.reshape(x.shape)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        if "kernel" not in params:
            return y
        padded, kernel = y if y.ndim > 2 else y[:, None], params["kernel"].to(y)
        sizes = kernel.shape[1:]
        padded = torch.nn.functional.pad(padded, [n for size in reversed(sizes) for n in (size - 1, 0)])
        x = _convolved(padded, kernel[:, None], adjoint=True)
        for axis, size in enumerate(sizes, start=2):
            x = x * self._inside(x, axis, size) if self.border == "zero" else x
            n = x.shape[axis] - size + 1
            folded = x.new_zeros(*x.shape[:axis], n, *x.shape[axis + 1 :])
            x = folded.index_add_(axis, self._source(n, size, x.device), x)
        return x.reshape(y.shape)

    def _source(self, n: int, size: int, device: torch.device) -> Tensor:
        """For each of the n + size - 1 places that a kernel of `size` entries reaches, the index of the entry there."""
        place = torch.arange(n + size - 1, device=device) - (size - 1 - size // 2)
        if self.border == "circular":
            return place % n
        place = place % (2 * n)
        return torch.where(place < n, place, 2 * n - 1 - place)

    def _inside(self, padded: Tensor, axis: int, size: int) -> Tensor:
        place = torch.arange(padded.shape[axis], device=padded.device) - (size - 1 - size // 2)
        inside = (place >= 0) & (place <= padded.shape[axis] - size)
        return inside.view(-1, *(1,) * (padded.ndim - 1 - axis))


@register_corruption
class MotionBlur(Blur):
    """Images taken while the camera moved along a straight line, y = k * x + noise.

    kernel.npy holds the kernel of each observation, as for :class:`Blur`. The formula draws kernels for simulated
    observations: lines in random directions.

    Arguments:
        length: The length of the lines, in pixels.
        border: As for :class:`Blur`, and so is `noise`.
        noise: Its standard deviation.
    """

    def __init__(self, length: float, border: str = "reflect", noise: float | Sequence[float] | None = None) -> None:
        super().__init__(border, noise)
        if not 0 < length < math.inf:
            raise DiffemError(f"MotionBlur: length must be > 0 pixels, got {length}")
        self.length = float(length)

    @property
    def law(self) -> dict[str, object]:
        return {k: v for k, v in self.config.items() if k != "length"}

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        reach = math.ceil(self.length / 2)  # the kernel has 2 reach + 1 pixels along each axis
        if len(shape) != 3 or 2 * reach + 1 > min(shape[1:]):
            raise DiffemError(f"MotionBlur: length: {self.length:g} pixels do not fit items of shape {shape}")
        angle = torch.pi * torch.rand(n, generator=generator, device=generator.device)
        along = torch.linspace(-0.5, 0.5, math.ceil(POINTS * self.length) + 1, device=angle.device) * self.length
        direction = torch.stack([angle.sin(), angle.cos()], 1)
        # every point of the line goes to the four pixels around it, in parts by its distance to them
        pixels = torch.arange(-reach, reach + 1, device=angle.device)
        near = (1 - (direction[..., None, None] * along[:, None] - pixels).abs()).clamp(min=0)  # (n, 2, points, pixels)
        return {"kernel": torch.einsum("npy,npx->nyx", near[:, 0], near[:, 1]) / len(along)}


def _convolved(x: Tensor, kernel: Tensor, adjoint: bool) -> Tensor:
    """The circular convolution of x (B, C, *spatial) with kernels (B, 1, *smaller), or its adjoint."""
    shape, axes = x.shape[2:], tuple(range(2, x.ndim))
    transform = torch.fft.rfftn(kernel, s=shape, dim=axes)
    transform = transform.conj() if adjoint else transform
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * transform, s=shape, dim=axes)
