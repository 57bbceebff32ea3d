"""Corruptions of single entries that are not linear, or whose noise depends on the signal.

An entry of y depends on the same entry of x only, and y has the shape of x. A subclass defines how entries are
distorted; the mask of observed entries and thinning are inherited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Diagonal
from diffem.units import Units

from .base import Params, register_corruption
from .thinning import Masked

ROUNDING = 1e-5  # tolerance for rounding to single precision, relative to the largest values
FEWEST_PHOTONS = 0.1  # per entry, for the variance of an observation
CHECKED = 1024  # number of observations whose values are checked before training


class EntrywiseCorruption(Masked):
    """y = M D(x), with :meth:`distort` given by a subclass, and a mask M (mask.npy, true = observed)."""

    by_entry = True
    noise: float = 0.0  # type: ignore[bad-override-mutable-attribute]

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of y for items x (B, *shape), in the units of the data."""
        raise NotImplementedError

    def variance(self, y: Tensor, params: Params) -> Tensor:
        """The variance of y given x, roughly: one value for each observation, shape (B, 1, ...), in squared units of y.

        A run with a subclass that defines it starts from a mixture, fitted as if y were x plus Gaussian noise of this
        variance. It is a mean over entries: an entry's own variance would be estimated from its own noise, and entries
        that are low by chance would be trusted more.
        """
        raise NotImplementedError

    def mean(self, y: Tensor, params: Params) -> Tensor:
        """The mean of the observed entries of each observation, shape (B, 1, ...)."""
        seen, axes = self.seen(y, params).to(y).expand_as(y), tuple(range(1, y.ndim))
        return (y * seen).sum(axes, keepdim=True) / seen.sum(axes, keepdim=True).clamp(min=1)

    def exact(self, shape: tuple[int, ...]) -> bool:
        base, kind = EntrywiseCorruption, type(self)
        return kind.variance is not base.variance or kind.likelihood is not base.likelihood

    def likelihood(self, y: Tensor, params: Params) -> Diagonal:
        precision = torch.where(self.seen(y, params), 1 / self.variance(y, params), 0.0)
        return Diagonal(y.flatten(1), precision.expand_as(y).flatten(1), varied=True)

    def impossible(self, y: np.ndarray) -> np.ndarray | bool:
        """Which values of y cannot be observed for any x: boolean, broadcasts against y. By default all values can."""
        return False

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = super().check(y, params, shape)
        some = np.asarray(y[:CHECKED], np.float64)
        seen = np.asarray(params["mask"][:CHECKED], bool) if "mask" in params else True
        wrong = some[np.broadcast_to(self.impossible(some) & np.isfinite(some) & seen, some.shape)]
        if wrong.size:
            told = ", ".join(f"{k} {v:g}" for k, v in self.config.items() if isinstance(v, int | float))
            raise DiffemError(f"y.npy: holds {wrong[0]:g}, which {type(self).__name__} never makes with {told}")
        return shape

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return self.shown(self.distort(x, generator), params)

    def interval(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Unbounded where y was not observed, else :meth:`initial`."""
        x, seen = self.initial(y, params), self.seen(y, params)
        return torch.where(seen, x, -torch.inf), torch.where(seen, x, torch.inf)

    def measured(self, x: Tensor, params: Params) -> Tensor:
        return self.shown(x, params)

    def apart(self, shape: tuple[int, ...]) -> bool:
        return True

    def scale_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        return self.shown(units.scale(y), params)

    def restore_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        return self.shown(units.restore(y), params)


@register_corruption
class PoissonGaussian(EntrywiseCorruption):
    """Photon noise and read noise: y = gain Poisson(x / gain) + N(0, noise^2). Values of x below 0 count as 0.

    Arguments:
        gain: Units of y per photon (electron).
        noise: Standard deviation of the read noise, in the units of y.
    """

    def __init__(self, gain: float, noise: float = 0.0) -> None:
        _positive(self, gain=gain)
        _not_negative(self, noise=noise)
        self.gain, self.noise = float(gain), float(noise)

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        rate = (x.clamp(min=0) / self.gain).to(generator.device)
        return (self.gain * torch.poisson(rate, generator) + self.noise * _normal(rate, generator)).to(x)

    def variance(self, y: Tensor, params: Params) -> Tensor:
        photons = self.mean(y, params) / self.gain
        return self.gain**2 * photons.clamp(min=FEWEST_PHOTONS) + self.noise**2

    def possible(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    def impossible(self, y: np.ndarray) -> np.ndarray:
        if self.noise:
            return np.zeros(y.shape, dtype=bool)
        photons = np.asarray(y, np.float64) / self.gain
        return (photons < 0) | (np.abs(photons - np.rint(photons)) > np.maximum(1e-3, 1e-6 * photons))


@register_corruption
class Speckle(EntrywiseCorruption):
    """Multiplicative noise: y = x (1 + N(0, std^2)).

    Arguments:
        std: Standard deviation of the noise, relative to the signal.
    """

    def __init__(self, std: float) -> None:
        _positive(self, std=std)
        self.std = float(std)

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x * (1 + self.std * _normal(x, generator))

    def variance(self, y: Tensor, params: Params) -> Tensor:
        return self.std**2 / (1 + self.std**2) * self.mean(y.square(), params)


@register_corruption
class SaltAndPepper(EntrywiseCorruption):
    """Some entries are replaced, half of them by the lowest value, half by the highest. Which ones is not known.

    Arguments:
        rate: The fraction of entries that is replaced, in (0, 1).
        low: The lowest value.
        high: The highest value.
    """

    def __init__(self, rate: float, low: float, high: float) -> None:
        if not 0 < rate < 1:
            raise DiffemError(f"SaltAndPepper: rate is the fraction replaced, in (0, 1), got {rate}")
        _ordered(self, low, high)
        self.rate, self.low, self.high = float(rate), float(low), float(high)

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand(x.shape, generator=generator, device=generator.device).to(x)
        y = torch.where(u < self.rate / 2, self.low, x)
        return torch.where(u >= 1 - self.rate / 2, self.high, y)


@register_corruption
class Quantise(EntrywiseCorruption):
    """Rounds to the nearest of equidistant levels.

    Arguments:
        levels: The number of levels, at least 2.
        low: The lowest level.
        high: The highest level.
    """

    def __init__(self, levels: int, low: float, high: float) -> None:
        if levels < 2 or levels != int(levels):
            raise DiffemError(f"Quantise: levels must be a whole number of at least 2, got {levels}")
        _ordered(self, low, high)
        self.levels, self.low, self.high = int(levels), float(low), float(high)
        self.step = (self.high - self.low) / (self.levels - 1)

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.low + self.step * ((x - self.low) / self.step).round().clamp(0, self.levels - 1)

    def variance(self, y: Tensor, params: Params) -> Tensor:
        one = y.flatten(1)[:, :1].view(-1, *(1,) * (y.ndim - 1))  # len() would fix the size of a program
        return torch.full_like(one, self.step**2 / 12)  # of a uniform distribution

    def impossible(self, y: np.ndarray) -> np.ndarray:
        nearest = self.low + self.step * np.rint((y - self.low) / self.step).clip(0, self.levels - 1)
        return np.abs(y - nearest) > 1e-3 * self.step


@register_corruption
class Saturate(EntrywiseCorruption):
    """Clipping after noise: y = min(x + N(0, noise^2), level); also for censored values, e.g. beyond a detection limit.

    Arguments:
        level: The largest value that is recorded.
        noise: Standard deviation of the noise.
        low: The smallest value that is recorded; no limit by default.
    """

    def __init__(self, level: float, noise: float = 0.0, low: float | None = None) -> None:
        _not_negative(self, noise=noise)
        if low is not None and not low < level:
            raise DiffemError(f"Saturate: low must be below level, got {low} and {level}")
        self.level, self.noise, self.low = float(level), float(noise), low

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return (x + self.noise * _normal(x, generator)).clamp(*self.limits)

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value that is recorded."""
        return -math.inf if self.low is None else self.low, self.level

    def impossible(self, y: np.ndarray) -> np.ndarray:
        (low, high), rounding = self.limits, ROUNDING * np.abs(y)
        return (y > high + rounding) | (y < low - rounding)

    def interval(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        ends, (low, high) = super().interval(y, params), self.limits
        rounding = ROUNDING * y.abs().amax(tuple(range(1, y.ndim)), keepdim=True)
        return (
            torch.where(y <= low + rounding, -torch.inf, ends[0]),
            torch.where(y >= high - rounding, torch.inf, ends[1]),
        )


@register_corruption
class Gamma(EntrywiseCorruption):
    """A display or camera curve: y = high (x / high)^gamma + N(0, noise^2), for x in [0, high].

    Arguments:
        gamma: The exponent.
        high: The value that the curve leaves unchanged.
        noise: Standard deviation of the noise.
    """

    def __init__(self, gamma: float, high: float = 1.0, noise: float = 0.0) -> None:
        _positive(self, gamma=gamma, high=high)
        _not_negative(self, noise=noise)
        self.gamma, self.high, self.noise = float(gamma), float(high), float(noise)

    def distort(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.high * (x.clamp(min=0) / self.high) ** self.gamma + self.noise * _normal(x, generator)

    def initial(self, y: Tensor, params: Params) -> Tensor:
        return self.high * (y.clamp(min=0) / self.high) ** (1 / self.gamma)


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x)


def _positive(of: object, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise DiffemError(f"{type(of).__name__}: {name} must be > 0, got {value}")


def _not_negative(of: object, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise DiffemError(f"{type(of).__name__}: {name} must be a standard deviation >= 0, got {value}")


def _ordered(of: object, low: float, high: float) -> None:
    if not low < high:
        raise DiffemError(f"{type(of).__name__}: low must be below high, got {low} and {high}")
