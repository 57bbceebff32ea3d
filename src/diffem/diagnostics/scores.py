r"""What can be known without clean data: scores of a posterior sampler on held-out observations.

An observation is split into two parts that are independent given x (:meth:`Corruption.thin`); x is drawn
given the one, pushed through the forward operator, and compared with the other, entry by entry:

.. math:: \mathrm{CRPS} = \frac1M \sum_j |d_j - y| - \frac{1}{2 M (M - 1)} \sum_{i, j} |d_i - d_j|
    \qquad
    \mathrm{ratio} = \frac{(1 + 1/M) \, \mathrm{mean\ Var}(d) + s^2}{\mathrm{mean}\, (\bar d - y)^2}

CRPS is proper: its expectation is least for the true posterior (it is given here with its standard error
over observations). The ratio is 1 for calibrated draws and below 1 for over-confident ones. The draws
d get observation noise before the CRPS. A black box cannot be split: its score is the energy distance between
re-corrupted reconstructions and the observations, and there is no ratio.

Scores are in model units (half the range of the data is 1).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffem import seeding
from diffem.corruptions import LinearCorruption
from diffem.observations import Observations
from diffem.posteriors import PosteriorSampler


@dataclass(frozen=True)
class Score:
    """A score of held-out observations.

    Attributes:
        name: `crps` or `energy_distance`.
        items: One value per observation, shape (n,); smaller is better.
        ratio: The calibration ratio, or None.
    """

    name: str
    items: Tensor
    ratio: float | None

    @property
    def mean(self) -> float:
        return self.items.mean().item()

    @property
    def standard_error(self) -> float:
        return (self.items.std() / len(self.items) ** 0.5).item()

    def difference(self, other: Score) -> tuple[float, float]:
        """The paired mean difference self - other and its standard error."""
        delta = self.items - other.items
        return delta.mean().item(), (delta.std() / len(delta) ** 0.5).item()


def crps(draws: Tensor, y: Tensor) -> Tensor:
    """The continuous ranked probability score of each entry: draws (M, *), y (*) -> (*)."""
    M = len(draws)
    ordered = draws.sort(0).values
    weight = (2 * torch.arange(1, M + 1).to(draws) - M - 1).view(-1, *(1,) * y.ndim)
    return (draws - y).abs().mean(0) - (weight * ordered).sum(0) / (M * (M - 1))


def score(
    sampler: PosteriorSampler,
    observations: Observations,
    indices: np.ndarray,
    seed: int,
    draws: int = 4,
    splits: int = 1,
    batch: int = 256,
) -> Score:
    """Scores a sampler on observations, with random numbers that depend on (seed, index) only.

    Which part of an observation is hidden matters more than the draws do: to score closely, raise `splits` first.

    Arguments:
        sampler: What is scored.
        observations: The observations.
        indices: The held-out ones that are used.
        seed: Seed of the run: equal seeds give scores that can be compared in pairs.
        draws: Number M of draws per split, at least 2.
        splits: How often each observation is split anew; its value is the mean.
        batch: Observations at a time.
    """
    corruption, (centre, half) = sampler.model_corruption, sampler.scaling
    if not isinstance(corruption, LinearCorruption):
        return _energy(sampler, observations, indices, seed, batch)
    total, spread, error = torch.zeros(len(indices)), 0.0, 0.0
    for repeat, start in itertools.product(range(splits), range(0, len(indices), batch)):
        chunk = indices[start : start + batch]
        y, params = observations.batch(chunk)
        split = sampler.corruption.thin(y, params, seeding.generator(seed, start // batch, "score", repeat))
        assert split is not None
        (given, given_params), (hidden, hidden_params) = split
        predictions, noisy = [], []
        for j in range(repeat * draws, (repeat + 1) * draws):
            x = sampler.sample(given, given_params, seeding.item_seeds(seed, j, "score", chunk))
            predicted = corruption.forward((x - centre) / half, hidden_params)
            noise = seeding.normal(
                seeding.item_seeds(seed, j, "score", chunk), tuple(predicted.shape[1:]), stream=10_000
            )
            predictions.append(corruption.compared(predicted))
            noisy.append(predictions[-1] + corruption.noise * noise)
        d = torch.stack(predictions)
        target = corruption.compared(corruption.scale_y(hidden, hidden_params, centre, half))
        seen = corruption.seen(hidden, hidden_params).expand_as(target).flatten(1)
        values = crps(torch.stack(noisy), target).flatten(1)
        total[start : start + len(chunk)] += ((values * seen).sum(1) / seen.sum(1).clamp(min=1)).cpu()
        spread += ((((1 + 1 / draws) * d.var(0) + corruption.noise**2).flatten(1)) * seen).sum().item()
        error += ((d.mean(0) - target).square().flatten(1) * seen).sum().item()
    return Score("crps", total / splits, spread / error if error > 0 else None)


def _energy(sampler: PosteriorSampler, observations: Observations, indices: np.ndarray, seed: int, batch: int) -> Score:
    centre, half = sampler.scaling
    real, fake = [], []
    for number, chunk in enumerate(observations.chunks(indices, batch)):
        y, params = observations.batch(chunk)
        x = sampler.sample(y, params, seeding.item_seeds(seed, 0, "score", chunk))
        again = sampler.corruption.apply(x, params, seeding.generator(seed, number, "score"))
        extra = [p.flatten(1).float() for p in params.values()]
        real.append(torch.cat([(y.flatten(1) - centre) / half, *extra], 1))
        fake.append(torch.cat([(again.flatten(1) - centre) / half, *extra], 1))
    u, v = torch.cat(fake), torch.cat(real)
    n = len(u)
    # Each item's share of 2 E|u - v| - E|u - u'| - E|v - v'|, so that differences can be paired.
    cross = torch.cdist(u, v).fill_diagonal_(0)  # an item and its own observation are not independent
    within = torch.cdist(u, u).sum(1) + torch.cdist(v, v).sum(1)
    items = (cross.sum(1) + cross.sum(0) - within) / (n - 1)
    return Score("energy_distance", items, None)
