r"""Linear corruptions with Gaussian noise,

.. math:: y = M (A x + n) \, , \qquad n \sim \mathcal{N}(0, \mathrm{diag}(s^2)) \, ,

with a mask M of the entries of y (true = observed). A subclass defines A and its adjoint, and inherits all the rest:
noise per channel, entry or item, masks, thinning, a first reconstruction, the inputs of the network, and an exact start
for small items.

With c the spread of the data, and A masked, the measured part of an item and the first reconstruction are

.. math:: P x = A^T (A A^T + (s / c)^2)^{-1} A x \, , \qquad \hat x = A^T (A A^T + (s / c)^2)^{-1} y \, ,

computed by conjugate gradients (Hestenes and Stiefel, 1952), each item separately. The second is the posterior mean
under the prior N(0, c^2 I).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Likelihood, Rows
from diffem.units import Units

from .base import NOISE_FLOOR, Observed, Params
from .thinning import Masked, refuse_unless_it_broadcasts

SPREAD = 0.5  # the assumed standard deviation of data in model units; noise well above it hides the data
DENSE = 64  # the most features for which A is a dense matrix; an update of 100 items takes 0.1 s, with 256 features 9 s
ADJOINT = 1e-2  # a larger relative error of A_adjoint is a mistake, not rounding
STEPS = 200  # the most steps of conjugate gradients
FEW_STEPS = 8  # steps for the inputs of the network, made at every evaluation: the network can learn the rest


class LinearCorruption(Masked):
    """y = M (A x + N(0, noise^2)), with :meth:`A` and :meth:`A_adjoint` given by a subclass.

    Arguments:
        noise: The standard deviation of the noise: a number, or one for each channel of y (column, if it is a vector).
            If None, it is a parameter, noise.npy, that broadcasts against y.

    Attributes:
        aligned: Whether, if x and y have equal spatial shapes, their entries are at the same places: not so for
            k-space.
    """

    linear = True
    parameters: tuple[str, ...] | None = ("mask", "noise")
    aligned = True

    def __init__(self, noise: float | Sequence[float] | None = None) -> None:
        if noise is not None:
            level = np.asarray(noise, np.float64)
            if level.ndim > 1 or not (np.isfinite(level) & (level >= 0)).all():
                raise DiffemError(f"{type(self).__name__}: noise must be a standard deviation >= 0, got {noise}")
            self.noise = tuple(level.tolist()) if level.ndim else float(level)
        else:
            self.noise = None

    # --- definition ----------------------------------------------------------------------------------

    def A(self, x: Tensor, params: Params) -> Tensor:
        """A x without the mask, for x (B, *shape): shape (B, *y shape), of the same dtype."""
        raise NotImplementedError

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        """A^T y: shape (B, *shape)."""
        raise NotImplementedError

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of items whose y has `shape`; None if the user must state it (`shape:` in corruption.yaml)."""
        return None

    def forward(self, x: Tensor, params: Params) -> Tensor:
        """M A x."""
        return self.shown(self.A(x, params), params)

    def adjoint(self, y: Tensor, params: Params) -> Tensor:
        """A^T M y."""
        return self.A_adjoint(self.shown(y, params), params)

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        y = self.forward(x, params)
        noise = torch.randn(y.shape, generator=generator, device=generator.device).to(y)
        return y + self.noise_std(y, params) * self.shown(noise, params)

    def noise_std(self, y: Tensor, params: Params) -> Tensor:
        """The standard deviation of the noise on observations y (B, *y shape); broadcasts against y."""
        if "noise" in params:
            return params["noise"].to(y)
        if self.noise is None:  # there is no observation, as when the prior is sampled
            return torch.ones(()).to(y)
        level = torch.as_tensor(self.noise, dtype=y.dtype, device=y.device)
        return level.view(-1, *(1,) * (y.ndim - 2)) if level.ndim == 1 else level

    def noise_of(self, y: Tensor, params: Params) -> list[Tensor]:
        """The noise level as a network input, in the shape of y; none if it is the same for all observations."""
        return [] if self.noise is not None else [self.noise_std(y, params).expand_as(y)]

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        name, shape = type(self).__name__, super().check(y, params, shape)
        if self.noise is None and "noise" not in params:
            raise DiffemError(f"noise: {name} needs it: a standard deviation, or noise.npy")
        if self.noise is not None and "noise" in params:
            raise DiffemError(f"noise.npy: {name} has `noise: {self.noise}`, too; keep one of them")
        if isinstance(self.noise, tuple) and len(self.noise) != y.shape[1]:
            raise DiffemError(f"noise: has {len(self.noise)} values where y.npy has {y.shape[1]} channels (columns)")
        if "noise" in params:
            refuse_unless_it_broadcasts("noise", params["noise"], y)
        observed = tuple(y.shape[1:])
        item = self.item_shape(observed)
        if item is not None and shape not in (item, observed):
            raise DiffemError(f"shape: {name} makes y of shape {observed} of items of shape {item}, not {shape}")
        return item or shape

    def rehearse(self, observations: tuple[int, ...], x: Tensor, params: Params) -> None:
        super().rehearse(observations, x, params)
        if type(self).A is LinearCorruption.A:
            return
        generator = torch.Generator().manual_seed(1)
        drawn = params or self.draw(len(x), tuple(x.shape[1:]), generator)
        x = torch.randn(x.shape, generator=generator)
        image = self.forward(x, drawn)
        back = self.adjoint(image, drawn)
        name = self.config["name"]
        if back.shape != x.shape:
            raise DiffemError(
                f"corruption {name}: A_adjoint makes {tuple(back.shape)} of y, where items are {tuple(x.shape)}"
            )
        norm, again = float(image.square().sum()), float((x * back).sum())
        if abs(again - norm) > ADJOINT * norm:
            raise DiffemError(
                f"corruption {name}: A_adjoint is not the adjoint of A: |A x|^2 is {norm:.4g}, but x (A^T A x) is {again:.4g}"
            )

    # --- the measured part ---------------------------------------------------------------------------

    def measured(self, x: Tensor, params: Params) -> Tensor:
        return Symmetric.apply(x, lambda x: self._pull(self.forward(x, params), params))

    def initial(self, y: Tensor, params: Params) -> Tensor:
        return self._pull(y, params)

    def _pull(self, y: Tensor, params: Params, steps: int = STEPS) -> Tensor:
        """A^T (A A^T + (s / c)^2)^-1 y."""
        ridge = (self.noise_std(y, params).clamp(min=NOISE_FLOOR) / SPREAD).square()
        product = lambda u: self.forward(self.adjoint(u, params), params) + ridge * u  # noqa: E731
        return self.adjoint(solve(product, self.shown(y, params), steps), params)

    def exact(self, shape: tuple[int, ...]) -> bool:
        return type(self).likelihood is not LinearCorruption.likelihood or math.prod(shape) <= DENSE

    def likelihood(self, y: Tensor, params: Params) -> Likelihood:
        noise = self.noise_std(y, params).clamp(min=NOISE_FLOOR).expand_as(y).flatten(1)
        weight = _common(self.seen(y, params).expand_as(y).flatten(1) / noise)
        matrix = self.matrix(y, params) * weight[..., None]
        return Rows(self.shown(y, params).flatten(1) / noise, matrix, torch.ones_like(noise[:, :1]))

    def matrix(self, y: Tensor, params: Params) -> Tensor:
        """A without the mask, as matrices (B, entries of y, features), or (1, ...) if all observations share it."""
        own = {k: v for k, v in params.items() if k not in ("mask", "noise")}
        if all(_common(v).shape[0] == 1 for v in own.values()):  # len() would fix the size of a program
            y, own = y[:1], {k: v[:1] for k, v in own.items()}
        shape = self.adjoint(y, own).shape[1:]
        d, n = math.prod(shape), y.shape[0]
        units = torch.eye(d).to(y).view(d, *shape).repeat(n, *(1,) * len(shape))
        columns = self.forward(units, {k: v.repeat_interleave(d, 0) for k, v in own.items()})
        return columns.reshape(n, d, -1).mT

    # --- inputs of the network -----------------------------------------------------------------------

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        """An approximate first reconstruction; A^T w, with w = 1 / (1 + (s / c)^2) where y was observed and 0
        elsewhere, a measure of how well each entry of x was observed; if A has parameters, A^T w A applied to a point
        in the middle; and, for vectors or if x and y are aligned, y, its mask and its noise."""
        x, noise = self._pull(y, params, FEW_STEPS), self.noise_std(y, params) / SPREAD
        weight = self.shown(torch.ones_like(y), params) / (1 + noise.square())
        inputs = [x, self.adjoint(weight, params)]
        if set(self.parameters or ()) - {"mask", "noise"}:
            point = torch.zeros_like(x)
            point[(slice(None), slice(None), *(n // 2 for n in x.shape[2:]))[: x.ndim]] = 1.0
            inputs.append(self.adjoint(weight * self.forward(point, params), params))
        if y.ndim == 2 or (self.aligned and y.shape[2:] == x.shape[2:]):
            inputs += [*super().condition(y, params), *self.noise_of(y, params)]
        return inputs

    # --- thinning ------------------------------------------------------------------------------------

    @property
    def thins(self) -> bool:
        # a subclass that defines forward instead of A does not apply the masks by which thinning hides a part
        return type(self).A is not LinearCorruption.A or type(self).thin is not LinearCorruption.thin

    def thin(self, y: Tensor, params: Params, generator: torch.Generator) -> tuple[Observed, Observed] | None:
        if not self.thins:
            return None
        return super().thin(y, params, generator)

    # --- units ---------------------------------------------------------------------------------------

    def scaled(self, units: Units) -> LinearCorruption:
        other = copy.copy(self)
        if isinstance(self.noise, tuple) and units.half.ndim:
            other.noise = torch.from_numpy(np.reshape(self.noise, units.half.shape) / units.half)
        elif isinstance(self.noise, tuple):
            other.noise = tuple(level / float(units.half) for level in self.noise)
        elif self.noise is not None:
            level = self.noise / units.half
            other.noise = torch.from_numpy(level) if units.half.ndim else float(level)
        return other

    def scale_params(self, params: Params, units: Units) -> Params:
        return {**params, "noise": units.scale_spread(params["noise"])} if "noise" in params else params

    def scale_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        return units.scale_spread(y - self._of_centre(y, params, units))

    def restore_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        return units.restore_spread(y) + self._of_centre(y, params, units)

    def _of_centre(self, y: Tensor, params: Params, units: Units) -> Tensor:
        """A c, where c is the item that is 0 in model units."""
        return self.forward(units.restore(torch.zeros_like(self.adjoint(y, params))), params)


def _common(values: Tensor) -> Tensor:
    """Values (B, ...) of a batch of observations; (1, ...) if they are the same for all of them."""
    if torch.compiler.is_exporting():  # a program cannot look at values
        return values
    return values[:1] if bool((values == values[:1]).all()) else values


def solve(product: Callable[[Tensor], Tensor], b: Tensor, steps: int = STEPS) -> Tensor:
    """K^-1 b for each item of b (B, ...) by conjugate gradients; K is symmetric positive definite, K u = product(u).

    Each item stops on its own, when its residual is small or after `steps`, so that it does not depend on the batch.
    """
    dot = lambda a, b: (a * b).flatten(1).sum(1)  # noqa: E731
    each = lambda a: a.view(-1, *(1,) * (b.ndim - 1))  # noqa: E731
    x, residual, direction = torch.zeros_like(b), b, b
    size = dot(b, b)
    least = size * torch.finfo(b.dtype).eps ** (4 / 3)  # squared: the residual is 2e-5 of b in single precision
    for _ in range(steps):
        going = size > least
        if not (torch.compiler.is_exporting() or going.any()):  # a program takes all steps
            break
        image = product(direction)
        step = each(torch.where(going, size / dot(direction, image), 0.0))
        x, residual = x + step * direction, residual - step * image
        now = torch.where(going, dot(residual, residual), size)
        direction = residual + each(torch.where(going, now / size, 0.0)) * direction
        size = now
    return x


class Symmetric(torch.autograd.Function):
    """A symmetric linear map; its backward pass applies the map again instead of unrolling its iterations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return ctx.function(gradients[0]), None
