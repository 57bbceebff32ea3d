r"""Corruptions that are diagonal in an orthonormal basis :math:`B`.

.. math:: y = B^T \, m \odot (h \odot B x + s \, e) \, , \qquad e \sim \mathcal{N}(0, I)

with gains :math:`h` and a mask :math:`m` (true = observed). Masks and noise act on the entries
(:math:`B = I, h = 1`). A blur with reflecting borders acts on cosines: the matrix of each axis is
symmetric, so one eigendecomposition per axis serves all items.

Thinning hides a further part of the observed coefficients. The measured part and the posteriors are in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Basis, Diagonal

from .base import NOISE_FLOOR, Params, register_corruption
from .linear import SPREAD, LinearCorruption
from .thinning import Masked

WIDEST = 1000  # standard deviation of a kernel, in pixels
LEAST_GAIN = 1e-3  # a coefficient that the blur weakens more than this counts as unseen


class DiagonalCorruption(LinearCorruption):
    """See the module docstring; subclasses define the gains, the basis and the masks."""

    diagonal = True
    by_entry = True

    def gains(self, shape: tuple[int, ...]) -> tuple[Basis | None, Tensor | float]:
        """The basis and the gains h (shape of an item), for items of `shape`."""
        return None, 1.0

    def basis(self, shape: tuple[int, ...]) -> Basis | None:
        return self.gains(shape)[0]

    def apart(self, shape: tuple[int, ...]) -> bool:
        return self.by_entry or len(shape) > 1

    def A(self, x: Tensor, params: Params) -> Tensor:
        return self._weigh(x, {}, lambda gain: gain)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        return self._weigh(y, {}, lambda gain: gain)

    def forward(self, x: Tensor, params: Params) -> Tensor:
        return self._weigh(x, params, lambda gain: gain)

    def adjoint(self, y: Tensor, params: Params) -> Tensor:
        return self._weigh(y, params, lambda gain: gain)  # B^T diag(m h) B is symmetric

    def shown(self, y: Tensor, params: Params) -> Tensor:
        return self._weigh(y, params, torch.ones_like) if "mask" in params else y

    def _weigh(self, x: Tensor, params: Params, weight: Callable[[Tensor], Tensor]) -> Tensor:
        """B^T diag(m w) B x, with weights w = weight(gains) in the shape of an item or of a batch."""
        basis, gain = self.gains(tuple(x.shape[1:]))
        factor = weight(torch.as_tensor(gain).to(x))
        if "mask" in params:
            factor = factor * params["mask"].to(x)
        if basis is None:
            return factor * x
        return basis.synthesise((factor * basis.analyse(x.flatten(1)).view_as(x)).flatten(1)).view_as(x)

    def measured(self, x: Tensor, params: Params) -> Tensor:
        noise = self.noise_std(x, params).clamp(min=NOISE_FLOOR) / SPREAD
        return self._weigh(x, params, lambda gain: gain.square() / (gain.square() + noise.square()))

    def likelihood(self, y: Tensor, params: Params) -> Diagonal:
        basis, gain = self.gains(tuple(y.shape[1:]))
        z = y.flatten(1)
        if basis is not None:
            z = basis.analyse(z)
        gain = (gain.flatten() if isinstance(gain, Tensor) else torch.tensor(gain)).to(y)
        visible = gain > LEAST_GAIN
        z = torch.where(visible, z / gain, 0.0)
        noise = self.noise_std(y, params).clamp(min=NOISE_FLOOR).expand_as(y).flatten(1)
        precision = torch.where(visible, (gain / noise).square(), 0.0)
        if "mask" in params:
            precision = precision * params["mask"].to(y).expand_as(y).flatten(1)
        return Diagonal(z, precision, basis, varied=self.noise is None)

    def initial(self, y: Tensor, params: Params) -> Tensor:
        return y

    def compared(self, y: Tensor) -> Tensor:
        basis, _ = self.gains(tuple(y.shape[1:]))
        return y if basis is None else basis.analyse(y.flatten(1)).view_as(y)

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        return [*Masked.condition(self, y, params), *self.noise_of(y, params)]


@register_corruption
class Mask(DiagonalCorruption):
    """Deletes entries, and adds white noise to the others. The mask is known.

    Arguments:
        noise: Standard deviation of the noise on the remaining entries: a number, one for each channel or column, or
            None: then it is a parameter, noise.npy.
    """

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        if "mask" not in params:
            name = type(self).__name__
            raise DiffemError(f"mask.npy: missing; {name} needs to know which entries were observed (true = observed)")
        return super().check(y, params, shape)

    @property
    def law(self) -> dict[str, object]:
        return {"name": "Mask", **({"noise": self.config["noise"]} if "noise" in self.config else {})}


@register_corruption
class RandomMask(Mask):
    """A mask that deletes pixels at random, in all their channels. If the data have masks, those are used instead.

    Arguments:
        rate: The fraction of the pixels that is deleted, in [0, 1).
        noise: Standard deviation of the noise on the remaining entries; see :class:`Mask`.
        block: Edge length of the square blocks that are deleted as a whole; 1 for single pixels.
    """

    def __init__(self, rate: float, noise: float | Sequence[float] | None = None, block: int = 1) -> None:
        super().__init__(noise)
        if not 0 <= rate < 1:
            raise DiffemError(f"RandomMask: rate is the fraction deleted, in [0, 1), got {rate}")
        if block < 1:
            raise DiffemError(f"RandomMask: block must be at least 1, got {block}")
        self.rate, self.block = float(rate), int(block)

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        spatial = shape if len(shape) == 1 else shape[1:]
        coarse = [-(-size // self.block) for size in spatial]
        mask = torch.rand(n, *coarse, generator=generator, device=generator.device) >= self.rate
        for axis, size in enumerate(spatial, start=1):
            mask = mask.repeat_interleave(self.block, axis).narrow(axis, 0, size) if self.block > 1 else mask
        return {"mask": mask if len(shape) == 1 else mask[:, None]}


@register_corruption
class GaussianNoise(DiagonalCorruption):
    """Adds white noise.

    Arguments:
        noise: Its standard deviation; see :class:`Mask`.
    """


@register_corruption
class GaussianBlur(DiagonalCorruption):
    """Blurs every spatial axis with a Gaussian kernel (borders reflect), then adds white noise.

    Arguments:
        std: Standard deviation of the kernel, in pixels.
        noise: Standard deviation of the noise: a number, one for each channel, or None: then it is a parameter,
            noise.npy, with one number for each observation, or for each of its channels.
    """

    by_entry = False
    parameters = ("noise",)  # no mask.npy: the masks that thinning makes for a blur are masks of cosine coefficients
    instead = {"kernel": "Blur", "mask": "Compose"}  # noqa: RUF012

    def __init__(self, std: float, noise: float | Sequence[float] | None = None) -> None:
        super().__init__(noise)
        if not 0 < std <= WIDEST:
            raise DiffemError(f"GaussianBlur: std of the kernel must be > 0 and at most {WIDEST:,} pixels, got {std}")
        self.std = float(std)
        self._cache: dict[tuple[int, ...], tuple[Basis, Tensor]] = {}

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        if "noise" in params and math.prod(params["noise"].shape[2:]) > 1:
            raise DiffemError("noise.npy: a blur needs one number for each observation, or for each of its channels")
        return super().check(y, params, shape)

    def gains(self, shape: tuple[int, ...]) -> tuple[Basis, Tensor]:
        if shape not in self._cache:
            matrices: list[Tensor | None] = [None] if len(shape) > 1 else []
            gain = torch.ones(shape, dtype=torch.float64)
            for axis in range(len(matrices), len(shape)):
                values, vectors = torch.linalg.eigh(blur_matrix(shape[axis], self.std))
                matrices.append(vectors.T)
                gain = gain * values.clamp(min=0).view(-1, *(1,) * (len(shape) - 1 - axis))
            self._cache[shape] = Basis(matrices, shape), gain
        return self._cache[shape]


def blur_matrix(size: int, std: float) -> Tensor:
    """The symmetric matrix (size, size) of a convolution with a normalised Gaussian and reflecting borders."""
    radius = max(1, round(4 * std))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / std).square())
    kernel = kernel / kernel.sum()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    position = torch.arange(size)
    for offset, weight in zip(range(-radius, radius + 1), kernel, strict=True):
        source = (position + offset) % (2 * size)
        source = torch.where(source < size, source, 2 * size - 1 - source)
        matrix.index_put_((position, source), weight.expand(size), accumulate=True)
    return matrix
