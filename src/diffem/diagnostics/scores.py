r"""Scores of a posterior sampler on held-out observations.

An observation is split into two parts that are independent given x (:meth:`Corruption.thin`). x is drawn given the
first part, passed through the forward operator, and compared with the second part, entry by entry:

.. math:: \mathrm{CRPS} = \frac1M \sum_j |d_j - y| - \frac{1}{2 M (M - 1)} \sum_{i, j} |d_i - d_j|
    \qquad
    \mathrm{ratio} = \frac{V + C}{E}

    V = \mathrm{mean} \left[ \mathrm{Var}(d) + s^2 \right] \qquad C = \mathrm{mean}\, \mathrm{Var}(d) / M
    \qquad E = \mathrm{mean}\, (\bar d - y)^2

Here y is a hidden entry, d_j its predictions from M draws of x, and s the standard deviation of its noise. CRPS is
proper: its expectation is smallest for the true posterior (it is given with its standard error over observations). But
it hardly detects over-confidence. The ratio does: it is 1 for calibrated draws and below 1 for over-confident ones. So
does the log score of a Gaussian with the pooled variance V,

.. math:: \log V + (E - C) / V

(Dawid and Sebastiani, 1999, with pooled moments: those of a few draws of one entry are too noisy to divide by). E - C is
the error of the mean of infinitely many draws instead of M; with E in its place, the minimum would be at draws that are
too narrow. This score depends on two moments only, CRPS on the shape of a distribution. Iterations are compared by
both,

.. math:: \log \mathrm{CRPS} + \tfrac12 \left[ \log V + (E - C) / V \right] \, .

Both parts are smallest, in expectation, at the truth, and have equal weight: if all errors shrink by a factor, each
part falls by the logarithm of it. The draws d get observation noise before the CRPS. A black box cannot be split: its
score is the energy distance of re-corrupted reconstructions from the observations, and there is no ratio.

If the corruption is not linear, the draws d are simulated observations of draws of x, including noise, and s = 0.

Scores are in model units (half the range of the data is 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffem import memory, seeding
from diffem.corruptions import LinearCorruption
from diffem.data import Dataset
from diffem.diagnostics.calibration import ranks
from diffem.diagnostics.divergence import energy_items
from diffem.errors import DiffemError
from diffem.samplers import BATCH, Sampler, draw_from, draw_many

PREDICTIONS, MOST_SPLITS = 1024, 8  # a final score is of about 1,024 predictions, at most 8 of each observation
SPLIT = 256  # observations that are split at once (fewer if they are large); the choice of hidden parts depends on it
SMALLEST = 1e-12  # lower bound of a CRPS: its unbiased estimate from few draws may be 0

OVER_CONFIDENT, UNDER_CONFIDENT = 0.75, 1.25  # calibration ratios beyond which draws are called that


@dataclass(frozen=True)
class Score:
    """A score of held-out observations.

    Attributes:
        name: `crps` or `energy_distance`.
        items: One value per observation, shape (n,); smaller is better.
        spread: The contribution of each observation to V, shape (n,); V is the mean. None for a black box.
        error: The contributions to E.
        excess: The contributions to C.
    """

    name: str
    items: Tensor
    spread: Tensor | None = None
    error: Tensor | None = None
    excess: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that, with the name, define the score."""
        return {k: v for k in ("items", "spread", "error", "excess") if (v := getattr(self, k)) is not None}

    @property
    def mean(self) -> float:
        return self.items.mean().item()

    @property
    def standard_error(self) -> float:
        return standard_error(self.items)

    @property
    def ratio(self) -> float | None:
        """The calibration ratio, or None."""
        moments = self._moments()
        return moments and ((moments[0] + moments[2]).mean() / moments[1].mean()).item()

    @property
    def ratio_error(self) -> float | None:
        """The standard error of the logarithm of the ratio, over observations (the delta method)."""
        moments = self._moments()
        return moments and standard_error(_ratio_influence(*moments))

    @property
    def log_score(self) -> float | None:
        """The log score of a Gaussian with the pooled variance, or None."""
        if (moments := self._moments()) is None:
            return None
        v, e, c = (m.mean() for m in moments)
        return (v.log() + (e - c) / v).item()

    @property
    def certain(self) -> bool:
        """Whether all draws agree and are wrong: the log score is infinite."""
        return self.spread is not None and self.error is not None and bool(self.spread.sum() == 0 < self.error.sum())

    @property
    def criterion(self) -> float:
        """The number by which iterations are compared; for a black box, the energy distance."""
        if self.certain:
            return math.inf
        return self.mean if self.log_score is None else math.log(max(self.mean, SMALLEST)) + self.log_score / 2

    def difference(self, other: Score) -> tuple[float, float]:
        """The paired difference of the means, self - other, and its standard error."""
        delta = self.items - other.items
        return delta.mean().item(), standard_error(delta)

    def criterion_difference(self, other: Score) -> tuple[float, float]:
        """The paired difference of the criteria, self - other, and its standard error (the delta method)."""
        return self.criterion - other.criterion, standard_error(self._influence() - other._influence())

    def _moments(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.spread is None or self.error is None or self.excess is None:
            return None
        defined = self.error.sum() > 0 and self.spread.sum() > 0
        return (self.spread, self.error, self.excess) if defined else None

    def _influence(self) -> Tensor:
        """The influence of each observation on the criterion, (n,)."""
        if (moments := self._moments()) is None:
            return self.items
        v, e, c = (m.mean() for m in moments)
        on_log_score = (1 / v - (e - c) / v**2) * moments[0] + (moments[1] - moments[2]) / v
        return self.items / self.items.mean() + on_log_score / 2


def final_splits(n: int) -> int:
    """How many times each of n observations is split for a final score."""
    return min(max(PREDICTIONS // n, 1), MOST_SPLITS)


def _ratio_influence(spread: Tensor, error: Tensor, excess: Tensor) -> Tensor:
    """The influence of each observation on the logarithm of a ratio, (n,)."""
    above = spread + excess
    return above / above.mean() - error / error.mean()


def standard_error(items: Tensor) -> float:
    """The standard error of the mean of items (n,)."""
    return (items.std() / len(items) ** 0.5).item()


def crps(draws: Tensor, y: Tensor) -> Tensor:
    """The continuous ranked probability score of each entry: draws (M, *), y (*) -> (*)."""
    M = len(draws)
    ordered = draws.sort(0).values
    weight = (2 * torch.arange(1, M + 1).to(draws) - M - 1).view(-1, *(1,) * y.ndim)
    return (draws - y).abs().mean(0) - (weight * ordered).sum(0) / (M * (M - 1))


def score(
    sampler: Sampler,
    data: Dataset,
    indices: np.ndarray,
    seed: int,
    draws: int = 4,
    splits: int = 1,
    batch: int = BATCH,
) -> Score:
    """Scores a sampler on observations, with random numbers that depend on the arguments only.

    Most of the error of a difference comes from the draws. To lower it, raise `splits` first: that adds both draws and
    new hidden parts.

    Arguments:
        sampler: The sampler to score.
        data: The observations.
        indices: The held-out observations that are used.
        seed: Seed of the run: equal seeds give scores that can be compared in pairs.
        draws: Number M of draws per split, at least 2.
        splits: How many times each observation is split; its value is the mean over splits.
        batch: Observations at a time.
    """
    if not data.corruption.predictable:
        x = draw_many(sampler, data, indices, 1, seed, "score", batch)[0]
        return Score("energy_distance", energy_items(x, data, indices, seed))
    values, variance, excess, error, count = torch.zeros(5, len(indices))
    for rows, hidden in _hidden(sampler, data, indices, seed, draws, splits, batch):
        seen, d = hidden.seen, hidden.draws
        each = (crps(hidden.noisy, hidden.target) * seen).sum(1) / seen.sum(1).clamp(min=1)
        values[rows] += each / splits
        variance[rows] += ((d.var(0) + hidden.noise.square()) * seen).sum(1)
        excess[rows] += (d.var(0) * seen).sum(1) / draws
        error[rows] += ((d.mean(0) - hidden.target).square() * seen).sum(1)
        count[rows] += seen.sum(1)
    entries = count.mean().clamp(min=1)  # per observation: V and E are means over entries, not over observations
    return Score("crps", values, variance / entries, error / entries, excess / entries)


@dataclass(frozen=True)
class Coverage:
    """How often hidden entries lie within the central intervals of their posterior draws.

    Attributes:
        counts: How many hidden entries of each observation had 0, 1, ..., M draws below them, shape (n, M + 1).
    """

    counts: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """The counts of all observations, shape (M + 1,); flat if calibrated."""
        return self.counts.sum(0)

    @property
    def observations(self) -> int:
        return len(self.counts)

    def __call__(self, level: float) -> float:
        """The share of entries within the central interval of a level; equal to the level if calibrated.

        The interval consists of whole ranks, so (M + 1) (1 - level) / 2 should be an integer: 39 draws give 0.5, 0.8
        and 0.95.
        """
        return float(self._inside(level).sum() / self.counts.sum())

    def standard_error(self, level: float) -> float:
        """The standard error of that share, over observations, since entries of one observation are not independent
        (the delta method)."""
        entries = self.counts.sum(1)
        influence = (self._inside(level) - self(level) * entries) / entries.mean()
        return float(influence.std(ddof=1) / len(influence) ** 0.5)

    def _inside(self, level: float) -> np.ndarray:
        ranks = self.counts.shape[1]
        out = round(ranks * (1 - level) / 2)
        return self.counts[:, out : ranks - out].sum(1)


def coverage(
    sampler: Sampler,
    data: Dataset,
    indices: np.ndarray,
    seed: int,
    draws: int = 39,
    batch: int = BATCH,
) -> Coverage | None:
    """Coverage of the hidden parts of observations; None for a black box, which cannot be split.

    Arguments as for :func:`score`. An entry is compared with draws that include the observation noise, so that its
    rank among them is uniform if the posterior is right.
    """
    if not data.corruption.predictable:
        return None
    counts = torch.zeros(len(indices), draws + 1, dtype=torch.long)
    generator = seeding.generator(seeding.fold(seed, *b"ties"), 0, "score")
    for rows, hidden in _hidden(sampler, data, indices, seed, draws, 1, batch):
        found = ranks(hidden.noisy, hidden.target, generator)
        counts[rows].scatter_add_(1, found, hidden.seen.long())
    return Coverage(counts.numpy())


@dataclass(frozen=True)
class _Hidden:
    """The hidden part of a batch of observations and its predictions, flattened: (M, B, n) and (B, n), on the CPU."""

    draws: Tensor
    noisy: Tensor  # the draws with observation noise
    target: Tensor
    seen: Tensor  # 1 where there is something to predict, else 0
    noise: Tensor  # its standard deviation


def _hidden(
    sampler: Sampler,
    data: Dataset,
    indices: np.ndarray,
    seed: int,
    draws: int,
    splits: int,
    batch: int,
) -> Iterator[tuple[slice, _Hidden]]:
    """Splits observations and predicts their hidden parts; yields slices of `indices` with the predictions."""
    corruption, size = data.corruption, memory.at_once(draws * math.prod(data.shape), SPLIT)
    for again, start in itertools.product(range(splits), range(0, len(indices), size)):
        chunk = indices[start : start + size]
        split = corruption.thin(*data.batch(chunk), seeding.generator(seed, start // size, "score", again))
        if split is None:
            name = corruption.config["name"]
            raise DiffemError(f"corruption {name}: thin() gave None; leave it out where observations cannot be split")
        (y, params), (hidden, hidden_params) = split
        target = corruption.compared(hidden)
        seen = corruption.seen(hidden, hidden_params).expand_as(target).float()
        linear = corruption if isinstance(corruption, LinearCorruption) else None
        std = torch.zeros(()) if linear is None else linear.noise_std(hidden, hidden_params)
        std = std.expand_as(target)
        predictions, noisy = [], []
        for some in torch.arange(again * draws, (again + 1) * draws).split(max(1, batch // len(chunk))):
            n = len(some)  # draws of each observation at once
            seeds = torch.cat([seeding.item_seeds(seed, int(j), "score", chunk) for j in some])
            x = draw_from(sampler, _tiled(y, n), {k: _tiled(v, n) for k, v in params.items()}, seeds, batch)
            if linear is not None:
                predicted = linear.forward(x, {k: _tiled(v, n) for k, v in hidden_params.items()})
                noise = _tiled(std, n) * seeding.normal(seeds, tuple(predicted.shape[1:]), stream=10_000)
            else:
                keys = (seeding.generator(seeding.fold(seed, int(j)), start // size, "score") for j in some)
                parts = x.split(len(chunk))
                predicted = torch.cat(
                    [corruption.apply(x, hidden_params, key) for x, key in zip(parts, keys, strict=True)]
                )
                noise = torch.zeros(())
            predicted = corruption.compared(predicted)
            predictions.append(predicted.reshape(n, len(chunk), -1))
            noisy.append((predicted + noise).reshape(n, len(chunk), -1))
        flat = [torch.cat(predictions), torch.cat(noisy), target.flatten(1), seen.flatten(1), std.flatten(1)]
        yield slice(start, start + len(chunk)), _Hidden(*flat)


def _tiled(a: Tensor, n: int) -> Tensor:
    """The rows of a, repeated n times as a block."""
    return a.repeat(n, *(1,) * (a.ndim - 1))
