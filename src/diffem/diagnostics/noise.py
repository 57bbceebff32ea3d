r"""Estimation of unknown noise from the observations themselves.

There are two models: white Gaussian noise with one standard deviation, or photon noise with read-out noise, whose
variance is a line,

.. math:: \mathrm{variance} = \mathrm{gain} \cdot \mathrm{signal} + \mathrm{read}^2 .

Patches are cut into cells of two pixels per axis (eight samples, for series). The Hadamard transform of a cell gives
its details. For white noise they are independent and have its variance; an image contributes least to the detail that
changes sign along every axis (the last one). Among patches of similar brightness, those whose first half of cells
varies least are kept (Liu et al., 2013, also choose patches by texture): as many as possible while, in the second half,
the other details are no larger than the last one. The halves share no pixel, so that the choice does not bias the
measurement. If no patch passes, neighbours are correlated: by texture, or by noise that is not white.

The variances over brightness are fitted as in Foi et al. (2008), Practical Poissonian-Gaussian noise modeling and
fitting for single-image raw data, IEEE TIP 17(10): the model clips values at the ends of the range, as the data are
clipped. Rounding to integers adds 1/12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import hadamard
from scipy.optimize import least_squares
from scipy.stats import norm, poisson

from diffem.errors import DiffemError

SIDE = {
    1: (32, 16),
    2: (8, 4),
    3: (4, 4),
}  # side of patches, by the number of axes; the second if an item has fewer than four such patches along an axis
CELL = {1: 8, 2: 2, 3: 2}  # the side of cells
BINS, PER_BIN = 16, 150  # the largest number of brightness bins, and the smallest number of patches in each
LEAST = 128  # the smallest number of details for a decision on a bin
WHITE = 1.1  # how much larger the other details may be, in addition to twice their standard error
CLIPPED = 1e-3  # a larger share of values at the minimum or maximum marks an end of the range
BRIGHT = 0.999  # the quantile of brightness that is reported as bright
OUTLIER = 20.0  # a patch whose variance is this many times the median has a dead pixel
UNSURE = 0.01  # error of the share of values inside of the ends, in addition to chance: signals differ within a bin
HALF = 0.6  # below this share of values inside of the ends, the signal is at the lower end: about half is cut off
INSIDE = 0.4  # below this share of values inside of the ends, the noise cannot be estimated
DIFFERS = 1.1  # standard deviations within this factor (dark and bright, or channels) count as equal
SURE = 5.0  # standard errors
BY_PIXEL = ("GaussianNoise", "Mask", "RandomMask")  # where photon noise is `PoissonGaussian` instead
COUNTS = 100  # with more photons, their noise counts as Gaussian


@dataclass(frozen=True)
class Noise:
    """The noise of observations.

    Attributes:
        variance: The variance at a signal of 0; negative if zero photons do not give the value 0.
        gain: The increase of the variance with the signal, in the units of y; 0 if the noise is the same everywhere.
        variance_error, gain_error: Standard errors.
        ends: The smallest and the largest observed signal.
        channels: The standard deviation of each channel, if they differ.
        reach: The largest signal at which the noise was measured; beyond it no patch is flat.
    """

    variance: float
    gain: float
    variance_error: float
    gain_error: float
    ends: tuple[float, float]
    channels: tuple[float, ...] = ()
    reach: float = math.inf

    def std(self, signal: float = 0.0) -> float:
        """The standard deviation of the noise at a signal."""
        return math.sqrt(max(self.variance + self.gain * signal, 0.0))

    @property
    def only_dark(self) -> bool:
        """Whether one standard deviation was found, but only in the dark half of the signals: photon noise would look the same."""
        return not self.gain and self.reach < sum(self.ends) / 2

    @property
    def error(self) -> float:
        """The standard error of :meth:`std` where the signal is 0."""
        return self.variance_error / (2 * max(self.std(), math.sqrt(self.variance_error), 1e-300))

    @property
    def offset(self) -> float:
        """The value at which the variance would be 0, if it is surely above 0; else 0. Without read noise this is the value of y
        for zero photons; with read noise r that value is r^2 / gain higher."""
        return -self.variance / self.gain if self.gain and self.variance < -SURE * self.variance_error else 0.0

    @property
    def arguments(self) -> dict[str, float | list[float]]:
        """The noise as arguments in corruption.yaml."""
        if self.channels:
            return {"noise": [_short(level) for level in self.channels]}
        return {**({"gain": _short(self.gain)} if self.gain else {}), "noise": _short(self.std())}

    @property
    def text(self) -> str:
        """The estimate in words."""
        where = "whatever the signal"
        if self.only_dark:
            where = f"where the signal is below {self.reach:.3g}; there are no flat patches up to {self.ends[1]:.3g}, where photon noise would be larger"
        if self.channels:
            return f"the noise has a standard deviation of {', '.join(f'{v:.3g}' for v in self.channels)} in the channels, {where}"
        if not self.gain:
            return f"the noise has a standard deviation of {self.std():.3g} +- {self.error:.2g}, {where}"
        line = f"{self.gain:.3g} * signal + {self.std():.3g}^2"
        if self.offset:
            line = f"{self.gain:.3g} * (signal - {self.offset:.3g})"
        errors = f"gain +- {self.gain_error:.2g}" + ("" if self.offset else f", read noise +- {self.error:.2g}")
        return f"the noise grows with the signal: variance = {line} ({errors}), a standard deviation of {self.std(self.ends[0]):.3g} in the dark and {self.std(self.ends[1]):.3g} in the bright"


def described(config: dict[str, Any], noise: Noise) -> dict[str, Any]:
    """A corruption.yaml with this noise; other settings are kept from the present one, `config`.

    Raises:
        DiffemError: If no corruption of that name has such noise.
    """
    name = config.get("name", "GaussianNoise")
    if noise.offset:
        raise DiffemError(
            f"no corruption.yaml is right while zero photons are not at 0: subtract the dark level of the camera from y.npy, and estimate again; it is at least {noise.offset:.3g}, and (read noise)^2 / gain higher"
        )
    if noise.gain and name not in ("GaussianNoise", "Mask", "PoissonGaussian"):
        raise DiffemError(
            f"name: {name} has noise that does not depend on the signal; only `name: PoissonGaussian` does"
        )
    if noise.only_dark and name in (*BY_PIXEL, "PoissonGaussian"):
        raise DiffemError(
            f"no corruption.yaml is written: {noise.text}; with one noise for all signals write `name: {name.replace('PoissonGaussian', 'GaussianNoise')}` and `noise: {_short(noise.std())}`, for photons `name: PoissonGaussian` with the gain of the camera"
        )
    kept = {key: value for key, value in config.items() if key not in ("name", "gain", "noise")}
    return {
        "name": "PoissonGaussian" if noise.gain else name.replace("PoissonGaussian", "GaussianNoise"),
        **noise.arguments,
        **kept,
    }


def estimate(y: np.ndarray, seen: np.ndarray | None = None) -> Noise:
    """The noise of observations, estimated from neighbours that were observed together.

    Arguments:
        y: Observations (N, channels, *spatial).
        seen: Which of their entries were observed, same shape; by default those that are finite.

    Raises:
        DiffemError: If the noise cannot be estimated, with the reason.
    """
    if y.ndim < 3:
        raise DiffemError("rows of a table have no neighbours that would tell their noise; state it")
    seen = np.isfinite(y) if seen is None else seen
    y = np.where(seen, y, 0)
    while y.ndim > 2 + max(SIDE):  # slices along an extra axis count as items
        y, seen = (array.swapaxes(1, 2).reshape(-1, array.shape[1], *array.shape[3:]) for array in (y, seen))
    parts = [_Bins.of(y[:, c], seen[:, c]) for c in range(y.shape[1])]
    parts = [part for part in parts if part is not None]
    if not parts:
        raise DiffemError("too few neighbours were observed together to tell the noise; state it")
    kept = [part for part in parts if len(part.mean)]
    if not kept:
        raise DiffemError(
            "even the flattest patches vary less from pixel to pixel than over a few: the noise is correlated between neighbours (interpolated, demosaiced, JPEG), or no patch is flat; no number can be given, state it, or add images with an even background"
        )
    apart = [part.fit() for part in kept]
    if any(noise.gain for noise in apart) or len(kept) == 1:
        return _Bins.joined(kept).fit()
    level = np.array([noise.std() for noise in apart])
    error = np.array([noise.error for noise in apart])
    if len(kept) == y.shape[1] and level.max() > DIFFERS * level.min() + SURE * error.max():
        mean, spread = float(np.square(level).mean()), float(2 * (level * error).max())
        reach = min(noise.reach for noise in apart)
        return Noise(mean, 0.0, spread, 0.0, apart[0].ends, tuple(level.tolist()), reach)
    return _Bins.joined(kept).fit(line=False)


@dataclass(frozen=True)
class _Patches:
    """Patches, each cut into halves that share no pixel, all (patches,).

    Attributes:
        sorted: First half, used to choose patches: its brightness.
        flat: First half: how much it varies.
        bright: Second half, used to measure: its brightness.
        inside: Second half: the share of its values inside of the ends.
        number: Second half: how many of its cells were fully observed.
        last: Second half: the sum of squares of the details that change sign along every axis.
        others: Second half: the same for the mean of all details that are nearly as fine.
        size: How many pixels a patch has.
    """

    sorted: np.ndarray
    flat: np.ndarray
    bright: np.ndarray
    inside: np.ndarray
    number: np.ndarray
    last: np.ndarray
    others: np.ndarray
    size: int

    @classmethod
    def of(cls, y: np.ndarray, seen: np.ndarray, low: float, high: float) -> _Patches | None:
        """The patches of one channel, (N, *spatial), whose values end at `low` and `high`; None if there are none."""
        axes = y.ndim - 1
        side = SIDE[axes][min(y.shape[1:]) < 4 * SIDE[axes][0]]
        if min(y.shape[1:]) < side:
            return None
        cells, observed = _cells(y, side), _cells(seen, side)
        full = np.all(observed, axis=2)
        second = np.indices((side // CELL[axes],) * axes).sum(0).ravel() % 2 == 1
        use = full[:, ~second].any(1) & full[:, second].any(1)
        if not use.any():
            return None
        cells, observed, full = cells[use], observed[use], full[use]
        changes = np.array([i.bit_count() for i in range(cells.shape[2])])  # axes along which a detail changes sign
        rows = hadamard(len(changes))[changes >= changes.max() - 1] / math.sqrt(len(changes))
        detail = np.square(cells @ rows.T) * full[..., None]
        others, last = detail[..., :-1].mean(2), detail[..., -1]
        inside, count = ((cells > low) & (cells < high) & observed).sum(2), observed.sum(2)
        total = np.where(observed, cells, 0).sum(2)
        return cls(
            sorted=total[:, ~second].sum(1) / count[:, ~second].sum(1),
            flat=(others + last)[:, ~second].sum(1) / full[:, ~second].sum(1),
            bright=total[:, second].sum(1) / count[:, second].sum(1),
            inside=inside[:, second].sum(1) / count[:, second].sum(1),
            number=full[:, second].sum(1),
            last=last[:, second].sum(1),
            others=others[:, second].sum(1),
            size=side**axes,
        )

    def flattest(self, part: np.ndarray) -> tuple[float, ...] | None:
        """The estimate from the flattest of some patches, a row of :class:`_Bins`; empty if none is flat, None if most
        values are clipped."""
        part = part[self.flat[part].argsort(kind="stable")]
        typical = np.median(self.last[part] / self.number[part]) or math.inf
        part = part[self.last[part] <= OUTLIER * typical * self.number[part]]
        n = self.number[part].cumsum()
        largest = self.last[part].cumsum() * (WHITE + 2 * np.sqrt(2 / n))
        failed = np.flatnonzero((self.others[part].cumsum() > largest) & (n >= LEAST))
        kept = part[: failed[0]] if len(failed) else part
        share = float(self.inside[part[: max(len(kept), 1)]].mean())
        if share < INSIDE:
            return None
        number = self.number[kept]
        if number.sum() < LEAST:
            return ()
        variance = float(self.last[kept].sum() / number.sum())
        scatter = float(np.sqrt(np.square(self.last[kept] - variance * number).sum())) / number.sum()
        error = max(math.sqrt(2 / number.sum()), scatter / (variance or 1.0))  # textures scatter more than chance
        share_error = math.sqrt(share * (1 - share) / (len(kept) * self.size / 2)) + UNSURE
        return float(self.bright[kept].mean()), variance, error, share, share_error


@dataclass(frozen=True)
class _Bins:
    """Variances of the noise by brightness, all (bins,): mean brightness, variances and their relative errors, and the
    shares of values inside of the ends and their errors.

    `low` and `high` are the values at which the data are clipped (infinite if they are not); `whole` is true for
    integer data; `bright` is the signal of the brightest patches.
    """

    mean: np.ndarray
    variance: np.ndarray
    error: np.ndarray
    inside: np.ndarray
    inside_error: np.ndarray
    low: float
    high: float
    whole: bool
    bright: float

    @classmethod
    def of(cls, y: np.ndarray, seen: np.ndarray) -> _Bins | None:
        """The bins of one channel, (N, *spatial); None if no patch has an observed cell in both halves."""
        values = y[seen]
        if not len(values):
            return None
        ends = [float(end) if (values == end).mean() > CLIPPED else math.nan for end in (values.min(), values.max())]
        low, high = (end if end == end else beyond for end, beyond in zip(ends, (-math.inf, math.inf), strict=True))
        patches = _Patches.of(y, seen, low, high)
        if patches is None:
            return None
        order = patches.sorted.argsort(kind="stable")
        parts = np.array_split(order, np.clip(len(order) // PER_BIN, 1, BINS))
        tried = [row for row in map(patches.flattest, parts) if row is not None]
        found = [row for row in tried if row]
        table = np.reshape(found if 2 * len(found) >= len(tried) else [], (-1, 5)).T.astype(np.float64)
        whole = bool((values == np.rint(values)).all()) and bool((np.abs(values) > 1.5).any())
        return cls(*table, low=low, high=high, whole=whole, bright=float(np.quantile(patches.bright, BRIGHT)))

    @classmethod
    def joined(cls, parts: list[_Bins]) -> _Bins:
        """The bins of all channels together."""
        names = "mean", "variance", "error", "inside", "inside_error"
        table = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
        low, high, bright = min(p.low for p in parts), max(p.high for p in parts), max(p.bright for p in parts)
        return cls(*table, low=low, high=high, whole=all(p.whole for p in parts), bright=bright)

    def fit(self, line: bool = True) -> Noise:
        """A line if the standard deviation surely differs between dark and bright, else a constant."""
        rounding, darkest = self.whole / 12, self.mean.argmin()
        dark = self.low if math.isfinite(self.low) and self.inside[darkest] < HALF else float(self.mean[darkest])
        if line and len(self.mean) > 2:
            (variance, gain), (error, gain_error) = self._least_squares([[1.0, 1.0], [0.1, 2.0]])
            noise = Noise(variance - rounding, gain, error, gain_error, (dark, self.bright))
            if gain > SURE * gain_error and noise.std(self.bright) > DIFFERS * noise.std(dark):
                return noise
        (variance,), (error,) = self._least_squares([[1.0]])
        reach = float(self.mean.max())
        return Noise(max(variance - rounding, 0.0), 0.0, error, 0.0, (dark, self.bright), reach=reach)

    def _least_squares(self, starts: list[list[float]]) -> tuple[list[float], list[float]]:
        """The variance at a signal of 0 (and the gain, if the starts have two numbers), and their standard errors.

        The numbers of a start are the variances at the darkest and the brightest signal, in units of the median.
        """
        low, high = float(self.mean.min()), float(self.mean.max())
        span = max(high - low, 1e-9 * abs(high) + 1e-30)
        line = np.array([[high, -low], [-1.0, 1.0]]) / span if len(starts[0]) > 1 else np.ones((1, 1))
        line *= float(np.median(self.variance)) + self._least
        signal = np.linspace(max(low - span / 2, self.low), high + span / 2, 100)

        def residual(t: np.ndarray) -> np.ndarray:
            variance, inside = self._expected(signal, *(line @ t))
            ratio = np.log(np.maximum(self.variance, self._least) / variance) / self.error
            return np.concatenate([ratio, (self.inside - inside) / self.inside_error])

        fits = [least_squares(residual, t, loss="soft_l1", f_scale=2.0, diff_step=1e-3) for t in starts]
        fit = min(fits, key=lambda fit: fit.cost)
        misfit = max(1.0, 2 * fit.cost / max(len(self.mean) - len(line), 1))
        covariance = line @ np.linalg.pinv(fit.jac.T @ fit.jac) @ line.T * misfit
        return (line @ fit.x).tolist(), np.sqrt(covariance.diagonal()).tolist()

    @property
    def _least(self) -> float:
        """A variance that counts as zero."""
        return 1e-6 * float(self.variance.max()) + 1e-30

    def _expected(self, signal: np.ndarray, variance: float, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The expected variances, and shares inside of the ends, at the observed means, (bins,)."""
        least = self._least
        if not np.isfinite([self.low, self.high]).any():
            return np.maximum(variance + gain * self.mean, least), np.ones(len(self.mean))
        offset = -variance / gain if variance < least and gain > 0 else 0.0
        ends = self.low, self.high, self.whole / 2
        mean, spread, inside = clipped(signal, max(variance, least), gain, *ends, offset=offset)
        order = mean.argsort(kind="stable")
        spread, inside = (np.interp(self.mean, mean[order], value[order]) for value in (spread, inside))
        return np.maximum(spread, least), inside


def clipped(
    signal: np.ndarray, variance: float, gain: float, low: float, high: float, rounded: float = 0.0, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean and variance of gain * Poisson((signal - offset) / gain) + offset + N(0, variance), clipped to [low, high], and
    the share of values inside of the ends by more than `rounded`."""
    signal = signal - offset
    photons = np.maximum(signal, 0) / gain if gain > 0 else np.full(signal.shape, np.inf)
    std = np.sqrt(np.maximum(variance + gain * signal, 1e-3 * variance))
    moments = _clipped_normal(offset + signal, std, low, high, rounded)
    few = photons < COUNTS
    if few.any():
        k = np.arange(2 * COUNTS)
        each = _clipped_normal(offset + gain * k, np.full(k.shape, math.sqrt(variance)), low, high, rounded)
        moments[:, few] = each @ poisson.pmf(k[:, None], photons[few])
    mean, square, inside = moments
    return mean, square - mean**2, inside


def _clipped_normal(mean: np.ndarray, std: np.ndarray, low: float, high: float, rounded: float) -> np.ndarray:
    """First and second moments of N(mean, std^2), clipped to [low, high], and the share inside of the ends by more than
    `rounded`."""
    a, b = (low - mean) / std, (high - mean) / std
    below, above, dense_a, dense_b = norm.cdf(a), norm.sf(b), norm.pdf(a), norm.pdf(b)
    inside = norm.cdf(b - rounded / std) - norm.cdf(a + rounded / std)
    low, high = (end if math.isfinite(end) else 0.0 for end in (low, high))  # an infinite end is never reached
    first = mean * (1 - below - above) + std * (dense_a - dense_b) + low * below + high * above
    second = (mean**2 + std**2) * (1 - below - above) + std * ((mean + low) * dense_a - (mean + high) * dense_b)
    return np.stack([first, second + low**2 * below + high**2 * above, inside])


def _cells(y: np.ndarray, side: int) -> np.ndarray:
    """Patches of `side` pixels per axis, cut into cells: (patches, cells, entries of a cell)."""
    axes, cell = y.ndim - 1, CELL[y.ndim - 1]
    shape, crop = [len(y)], [slice(None)]
    for n in y.shape[1:]:
        shape += [n // side, side // cell, cell]
        first = min(1, n % side)  # shifted, so as not to coincide with JPEG blocks
        crop.append(slice(first, first + n // side * side))
    order = [0, *range(1, 3 * axes, 3), *range(2, 3 * axes, 3), *range(3, 3 * axes + 1, 3)]
    return y[tuple(crop)].reshape(shape).transpose(order).reshape(-1, (side // cell) ** axes, cell**axes)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
