r"""Linear corruptions with Gaussian noise,

.. math:: y = M (A x + n) \, , \qquad n \sim \mathcal{N}(0, \mathrm{diag}(s^2)) \, ,

with a mask M of the entries of y (true = observed). A class that says what A and its adjoint are has all the rest: noise by channel,
entry or item, masks, thinning, a first reconstruction, what the network is shown, and an exact start for small items.

With c the spread of the data, and A masked, what an observation measured and the first reconstruction are

.. math:: P x = A^T (A A^T + (s / c)^2)^{-1} A x \, , \qquad \hat x = A^T (A A^T + (s / c)^2)^{-1} y \, ,

by conjugate gradients (Hestenes and Stiefel, 1952), each item by itself. The second is the posterior mean under N(0, c^2 I).
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

from .base import Observed, Params
from .thinning import Masked, refuse_unless_it_broadcasts

NOISE_FLOOR = 1e-3  # in model units: keeps likelihoods of noise-free data finite
SPREAD = 0.5  # the assumed standard deviation of data in model units; noise well above it hides them
DENSE = 64  # features up to which A is written as a matrix: an update of a hundred items takes a tenth of a second, of 256 features nine
ADJOINT = 1e-2  # the relative error of an adjoint that is taken for a mistake; rounding stays far below
STEPS = 200  # of conjugate gradients at most
FEW_STEPS = 8  # for what the network is shown at every evaluation: it can do the rest


class LinearCorruption(Masked):
    """y = M (A x + N(0, noise^2)), with :meth:`A` and :meth:`A_adjoint` given by a subclass.

    Arguments:
        noise: The standard deviation of the noise: a number, or one for each channel of y (column, if it is a vector). Where
            there is none it is a parameter, noise.npy, that broadcasts against y.

    Attributes:
        aligned: Whether entries of y lie where entries of x do, if their spatial shapes are equal: not those of k-space.
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

    # --- what it is ----------------------------------------------------------------------------------

    def A(self, x: Tensor, params: Params) -> Tensor:
        """A x without the mask, for x (B, *shape): shape (B, *y shape), of the same dtype."""
        raise NotImplementedError

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        """A^T y: shape (B, *shape)."""
        raise NotImplementedError

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of items whose observations have `shape`; None if only the user can say (`shape:` in corruption.yaml)."""
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
        if self.noise is None:  # nothing was observed, as when the prior is sampled
            return torch.ones(()).to(y)
        level = torch.as_tensor(self.noise, dtype=y.dtype, device=y.device)
        return level.view(-1, *(1,) * (y.ndim - 2)) if level.ndim == 1 else level

    def noise_of(self, y: Tensor, params: Params) -> list[Tensor]:
        """What the network sees of the noise, in the shape of y: nothing, where it is the same for all observations."""
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

    # --- what was measured ---------------------------------------------------------------------------

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
        matrix = self.matrix(y, params) * self.seen(y, params).expand_as(y).flatten(1)[..., None]
        return Rows(self.shown(y, params).flatten(1) / noise, matrix / noise[..., None], torch.ones_like(noise[:, :1]))

    def matrix(self, y: Tensor, params: Params) -> Tensor:
        """A without the mask, as matrices (B, entries of y, features), or (1, ...) if it is the same for all."""
        own = {k: v for k, v in params.items() if k not in ("mask", "noise")}
        if all(bool((v == v[:1]).all()) for v in own.values()):
            y, own = y[:1], {k: v[:1] for k, v in own.items()}
        shape = self.adjoint(y, own).shape[1:]
        d, n = math.prod(shape), len(y)
        units = torch.eye(d).to(y).view(d, *shape).repeat(n, *(1,) * len(shape))
        columns = self.forward(units, {k: v.repeat_interleave(d, 0) for k, v in own.items()})
        return columns.reshape(n, d, -1).mT

    # --- what the network is shown -------------------------------------------------------------------

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        """The first reconstruction, nearly; A^T w, with w = 1 / (1 + (s / c)^2) where y was observed, which says how well each entry of x
        was; where A has parameters, what comes back of a point in the middle, A^T w A; and y and its mask, where they are aligned."""
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
        # a subclass that writes forward instead of A does not know the masks that hide a part
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
        """A c, c the item that is 0 in model units."""
        return self.forward(units.restore(torch.zeros_like(self.adjoint(y, params))), params)


def solve(product: Callable[[Tensor], Tensor], b: Tensor, steps: int = STEPS) -> Tensor:
    """K^-1 b of each item of b (B, ...) by conjugate gradients, with the symmetric positive K u = product(u).

    An item stops by itself, when its residual is small or after `steps`, so that it does not depend on its neighbours.
    """
    dot = lambda a, b: (a * b).flatten(1).sum(1)  # noqa: E731
    each = lambda a: a.view(-1, *(1,) * (b.ndim - 1))  # noqa: E731
    x, residual, direction = torch.zeros_like(b), b, b
    size = dot(b, b)
    least = size * torch.finfo(b.dtype).eps ** (4 / 3)  # of its square: 2e-5 of b in single precision
    for _ in range(steps):
        going = size > least
        if not going.any():
            break
        image = product(direction)
        step = each(torch.where(going, size / dot(direction, image), 0.0))
        x, residual = x + step * direction, residual - step * image
        now = torch.where(going, dot(residual, residual), size)
        direction = residual + each(torch.where(going, now / size, 0.0)) * direction
        size = now
    return x


class Symmetric(torch.autograd.Function):
    """A symmetric linear map, differentiated by itself: not through the steps by which it was found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return ctx.function(gradients[0]), None
