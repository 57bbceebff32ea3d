r"""Scores of a posterior sampler on held-out observations.

An observation is split into two parts that are independent given x (:meth:`Corruption.thin`); x is drawn
given the one, pushed through the forward operator, and compared with the other, entry by entry:

.. math:: \mathrm{CRPS} = \frac1M \sum_j |d_j - y| - \frac{1}{2 M (M - 1)} \sum_{i, j} |d_i - d_j|
    \qquad
    \mathrm{ratio} = \frac{V + C}{E}

    V = \mathrm{mean} \left[ \mathrm{Var}(d) + s^2 \right] \qquad C = \mathrm{mean}\, \mathrm{Var}(d) / M
    \qquad E = \mathrm{mean}\, (\bar d - y)^2

CRPS is proper: its expectation is least for the true posterior (it is given here with its standard error
over observations), but it hardly sees over-confidence. The ratio does: it is 1 for calibrated draws and below 1 for
over-confident ones. So does the log score of a Gaussian with the pooled variance V,

.. math:: \log V + (E - C) / V

(Dawid and Sebastiani, 1999, with pooled moments: those of a few draws of one entry are too noisy to divide by). E - C is
the error of the mean of all draws, not of M: with E in its place the least would be at draws that are too
narrow. This score sees two moments only, CRPS the shape of a distribution: iterations are compared by

.. math:: \log \mathrm{CRPS} + \tfrac12 \left[ \log V + (E - C) / V \right]

of which both parts are least, in expectation, at the truth, and weigh the same: where all errors shrink by one
factor, each falls by its logarithm. The draws d get observation noise before the CRPS. A black box cannot be split: its
score is the energy distance of re-corrupted reconstructions from the observations, and there is no ratio.

Where the corruption is not linear, draws d are simulated observations of draws of x, noise and all, and s = 0.

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

PREDICTIONS, MOST_SPLITS = 1024, 8  # a final score is of some 1,024 predictions, at most 8 of each observation
SPLIT = 256  # observations whose hidden parts are drawn at once, or fewer large ones; what is hidden depends on it
SMALLEST = 1e-12  # of a CRPS: few draws estimate it without bias, so that it may be 0

OVER_CONFIDENT, UNDER_CONFIDENT = 0.75, 1.25  # calibration ratios beyond which draws are called so


@dataclass(frozen=True)
class Score:
    """A score of held-out observations.

    Attributes:
        name: `crps` or `energy_distance`.
        items: One value per observation, shape (n,); smaller is better.
        spread: What each observation adds to V, shape (n,): V is the mean. None for a black box.
        error: E likewise.
        excess: C likewise.
    """

    name: str
    items: Tensor
    spread: Tensor | None = None
    error: Tensor | None = None
    excess: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What rebuilds it, beside its name."""
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
        """Whether all draws agree and are wrong: no log score is worse."""
        return self.spread is not None and self.error is not None and bool(self.spread.sum() == 0 < self.error.sum())

    @property
    def criterion(self) -> float:
        """What iterations are compared by; the energy distance of a black box."""
        if self.certain:
            return math.inf
        return self.mean if self.log_score is None else math.log(max(self.mean, SMALLEST)) + self.log_score / 2

    def difference(self, other: Score) -> tuple[float, float]:
        """The paired difference of the means, self - other, and its standard error."""
        delta = self.items - other.items
        return delta.mean().item(), standard_error(delta)

    def criterion_difference(self, other: Score) -> tuple[float, float]:
        """That of the criteria, and its standard error (the delta method, in pairs)."""
        return self.criterion - other.criterion, standard_error(self._influence() - other._influence())

    def _moments(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.spread is None or self.error is None or self.excess is None:
            return None
        defined = self.error.sum() > 0 and self.spread.sum() > 0
        return (self.spread, self.error, self.excess) if defined else None

    def _influence(self) -> Tensor:
        """How much the criterion changes with each observation."""
        if (moments := self._moments()) is None:
            return self.items
        v, e, c = (m.mean() for m in moments)
        on_log_score = (1 / v - (e - c) / v**2) * moments[0] + (moments[1] - moments[2]) / v
        return self.items / self.items.mean() + on_log_score / 2


def final_splits(n: int) -> int:
    """How often each of n observations is split for a final score."""
    return min(max(PREDICTIONS // n, 1), MOST_SPLITS)


def _ratio_influence(spread: Tensor, error: Tensor, excess: Tensor) -> Tensor:
    """How much the logarithm of a ratio changes with each observation."""
    above = spread + excess
    return above / above.mean() - error / error.mean()


def standard_error(items: Tensor) -> float:
    """Of the mean of items (n,)."""
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

    Most of the error of a difference is that of the draws. To lower it, raise `splits` first: that adds draws and other
    hidden parts.

    Arguments:
        sampler: What is scored.
        data: The observations.
        indices: The held-out ones that are used.
        seed: Seed of the run: equal seeds give scores that can be compared in pairs.
        draws: Number M of draws per split, at least 2.
        splits: How often each observation is split anew; its value is the mean.
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
    entries = count.mean().clamp(min=1)  # of an observation: V and E are means over entries, not over observations
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
        """The share of entries within the central interval of a level: that level, if calibrated.

        The interval is made of whole ranks; M + 1 times (1 - level) / 2 should be one: 39 draws give 0.5, 0.8 and 0.95.
        """
        return float(self._inside(level).sum() / self.counts.sum())

    def standard_error(self, level: float) -> float:
        """Of that share, over observations: the entries of one are not independent (the delta method)."""
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

    Arguments are those of :func:`score`. An entry is compared with draws that have the observation noise, so
    that its rank among them is uniform if the posterior is right.
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
    """Splits observations, and predicts what was hidden; yields which of the indices, and the predictions."""
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
            n = len(some)  # draws at once, of each observation
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
    """All rows of a, and all of them again, n times."""
    return a.repeat(n, *(1,) * (a.ndim - 1))
