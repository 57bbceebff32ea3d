r"""Whether re-corrupted samples could be observations: two-sample tests of real against simulated observations.

EM lowers :math:`\mathrm{KL}(P_Y \,\|\, \pi_Y)`, where :math:`\pi_Y` is the distribution of
:math:`y' \sim Q(\cdot \mid x')`, with new operator parameters, for items :math:`x'` from a prior, or from a posterior
given each of the observations. The two samples, y and y', are compared without any density:

.. math:: \mathcal{E} = 2 \, E|y - y'| - E|y - \tilde y| - E|y' - \tilde y'|

as a share of :math:`E|y - \tilde y|`. The p-value comes from a permutation test, which exchanges the labels of the
samples: p = (1 + #{exchanged >= observed}) / (1 + exchanges) is exact at any sample size.

**Prior samples** are independent of the observations, and any labels may be exchanged. **Reconstructions** are not
independent: x' was drawn given y. But if the prior is right and the posterior exact, then

.. math:: p(y, y') = \int p(y) \, q(x' \mid y) \, Q(y' \mid x') \, dx' = \int p(x') \, Q(y \mid x') \, Q(y' \mid x') \, dx'

is symmetric, so that y and y' may be exchanged within every pair. This test is exact, too. It uses every observation on
both sides, and cancels what a pair has in common, so it is more sensitive than a test of reconstructions of one half of
the observations against the other half. If only the distributions of y and y' agree, it is valid for many pairs, like a
wild bootstrap.

**Rows.** The compared rows are y in model units (half the range of the data is 1), with zeros where a mask hides an
entry. If zero were far from the mean of an entry, the masks, which have equal distributions on both sides, would
outweigh the values. So every entry is centred on the mean of its observed values. The masks themselves are left out for
the same reason. Random projections are mapped back to the space of items, :math:`A^T y`, since y alone does not contain
the direction of measurement.

**Three distances.** The energy distance of whole rows is most sensitive to location and scale. In many dimensions it
misses the shape of an entry's distribution, weakly varying entries, and, if few entries are observed together, their
dependence. So there are two more: the mean energy distance of single standardised entries, and the mean squared
difference of the second moments of all pairs of entries. The latter is a maximum mean discrepancy: the same formula
with a kernel as distance (Sejdinovic et al., 2013). On masked digits each finds faults that the others miss.

A small p-value says that prior, posterior *or corruption* are wrong. A large one says that this many observations do
not show it: what the corruption hides is hidden from these tests, too.

References:
    | Energy statistics: A class of statistics based on distances (Szekely & Rizzo, 2013)
    | Equivalence of distance-based and RKHS-based statistics in hypothesis testing (Sejdinovic et al., 2013)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffem import seeding
from diffem.corruptions import Corruption
from diffem.data import Dataset
from diffem.errors import DiffemError
from diffem.samplers import BATCH

PERMUTATIONS = 499
CONSTANT = 1e-6  # in model units: smaller variations are rounding errors
COMPARISONS = {  # of :func:`divergence`, in words
    "energy_distance": "energy distance of whole observations",
    "entries": "energy distance of single entries",
    "pairs": "second moments of pairs of entries",
}


@dataclass(frozen=True)
class Comparison:
    """Of two samples: their distance, and its p-value under equal distributions."""

    statistic: float
    p_value: float


def energy_test(
    u: Tensor,
    v: Tensor,
    generator: torch.Generator,
    permutations: int = PERMUTATIONS,
    paired: bool = False,
    distance: str = "rows",
) -> Comparison:
    """The unbiased energy distance of two samples, and its p-value.

    Arguments:
        u: Rows (N, d).
        v: Rows (M, d).
        generator: Draws the exchanges.
        permutations: How many exchanges.
        paired: Whether u_i and v_i belong together: exchanged only with each other, and their distance not used.
        distance: The distance of two rows: Euclidean for `rows`; the mean distance of their `entries`; or minus the
            mean product over `pairs` of different entries, which gives the mean squared difference of E[u_i u_j].
    """
    n, m = _sizes(u, v, paired)
    rows = torch.cat((u, v)).double()  # distances of near neighbours cancel in single precision
    apart = DISTANCES[distance](rows).fill_diagonal_(0)
    if paired:
        apart[:n, n:].fill_diagonal_(0)
        apart[n:, :n].fill_diagonal_(0)
    labels = _labels(n, m, permutations, generator, paired)
    to_first = labels @ apart
    first, across = (to_first * labels).sum(1), (to_first * (1 - labels)).sum(1)
    second = apart.sum() - first - 2 * across
    return _judged(2 * across / (n * (m - paired)) - first / (n * (n - 1)) - second / (m * (m - 1)))


def _pairs(rows: Tensor) -> Tensor:
    # The sum over i != j of a_i a_j b_i b_j is a square without its diagonal.
    d = rows.shape[1]
    return ((rows.square() @ rows.square().T) - (rows @ rows.T).square()) / max(d * (d - 1), 1)


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda rows: torch.cdist(rows, rows),
    "entries": lambda rows: torch.cdist(rows, rows, p=1) / rows.shape[1],
    "pairs": _pairs,
}


def observe_anew(x: Tensor, data: Dataset, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Comparable rows of the items x (n, *shape), observed anew, and of the observations `indices`; see the module.

    Returns:
        The rows of the items (n, d), those of the observations (m, d), and a mask of the observed entries of both
        (n + m, d).
    """
    u, shown = _simulated(x, data.corruption, seed)
    v, looked = _observed(data, indices)
    rows, seen = torch.cat((u, v)), torch.cat((shown, looked))
    # Centred on the mean of both samples together, for the reason given in `divergence`.
    rows = torch.where(seen, rows - (rows * seen).sum(0) / seen.sum(0).clamp(min=1), 0.0)
    return rows[: len(x)], rows[len(x) :], seen


def divergence(
    x: Tensor,
    data: Dataset,
    indices: np.ndarray,
    seed: int,
    paired: bool = False,
    permutations: int = PERMUTATIONS,
) -> dict[str, Comparison]:
    """Compares items, observed anew, with observations.

    Arguments:
        x: Items (n, *shape) in model units. They must be independent of the observations, unless `paired`.
        data: The observations, with their corruption.
        indices: The observations that are compared.
        seed: Seed of the new operator parameters and noise, and of the tests.
        paired: Whether item i was drawn given observation indices[i].
        permutations: Number of exchanges in every test.

    Returns:
        `energy_distance` and `pairs` of rows, and `entries` of standardised entries; `energy_distance` and `entries` as
        a share of the mean distance of two observations.

    Raises:
        DiffemError: If there are fewer than four items or observations.
        ValueError: If `paired`, and there is not one item for each observation.
    """
    if min(len(x), len(indices)) < 4:
        raise DiffemError(f"divergence: needs at least 4 items and observations, got {len(x)} and {len(indices)}")
    seed = seeding.fold(seed, *b"divergence")
    generator = lambda step: seeding.generator(seed, 0, "user", step)  # noqa: E731
    u, v, seen = observe_anew(x, data, indices, seed)
    # Moments of both samples together: exchanging labels does not change them, so the tests stay exact.
    rows, count = torch.cat((u, v)), seen.sum(0).clamp(min=1)
    spread = (rows.square().sum(0) / count).sqrt()
    standard = torch.where(spread > CONSTANT, rows / spread, 0.0)
    a, b = standard[: len(x)], standard[len(x) :]
    found = {
        "energy_distance": energy_test(u, v, generator(0), permutations, paired),
        "entries": energy_test(a, b, generator(1), permutations, paired, "entries"),
        "pairs": energy_test(u, v, generator(2), permutations, paired, "pairs"),
    }
    for name, distances in (("energy_distance", DISTANCES["rows"](v)), ("entries", DISTANCES["entries"](b))):
        apart = distances.sum().item() / (len(v) * (len(v) - 1))
        found[name] = replace(found[name], statistic=found[name].statistic / max(apart, CONSTANT))
    return found


def energy_items(
    x: Tensor,
    data: Dataset,
    indices: np.ndarray,
    seed: int,
    times: int = 1,
) -> Tensor:
    """The contribution of each observation to the energy distance between re-corrupted reconstructions and
    observations, (n,).

    Their mean is the distance of the paired :func:`energy_test`, as a share of the mean distance of two observations,
    on rows in which every entry is centred on the mean of its observed values. Their standard deviation divided by
    sqrt(n) is its standard error (that of a U-statistic of two items, whose influence is twice an item's share). Equal
    seeds draw equal parameters and noise, so that two sets of reconstructions can be compared in pairs.

    Arguments:
        x: Items (n, *shape) in model units; item i was drawn given observation indices[i].
        data: The observations, with their corruption.
        indices: The observations that are compared.
        seed: Seed of the parameters and noise.
        times: How many times items are corrupted. Contributions are averaged, since most of their noise comes from the
            corruption.
    """
    v, seen = _observed(data, indices)
    centre = (v * seen).sum(0) / seen.sum(0).clamp(min=1)
    v = torch.where(seen, v - centre, 0.0).float()  # single precision is faster, and rounding averages out in the sums
    theirs = torch.cdist(v, v).sum(1)
    found = []
    for each in [seed] if times == 1 else [seeding.fold(seed, again) for again in range(times)]:
        u, shown = _simulated(x, data.corruption, seeding.fold(each, *b"energy"))
        u = torch.where(shown, u - centre, 0.0).float()
        cross = torch.cdist(u, v).fill_diagonal_(0)  # an item and its own observation are not independent
        shares = cross.sum(1) + cross.sum(0) - torch.cdist(u, u).sum(1) - theirs
        shares = shares / theirs.mean().clamp(min=CONSTANT)
        found.append(2 * shares - shares.mean())
    return torch.stack(found).mean(0)


def sample_divergence(
    x: Tensor,
    samples: Tensor | None,
    data: Dataset,
    rows: np.ndarray,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> dict[str, dict[str, float]]:
    """The divergence of a posterior's reconstructions, and of samples of a prior, from held-out observations.

    Arguments:
        x: A reconstruction of each of the observations `rows`, (n, *shape), in model units.
        samples: Prior samples (n, *shape), or None.
        data: The observations.
        rows: The held-out observations.
        seed: Seed of the new operator parameters and noise, and of the tests.
        permutations: Number of exchanges in every test.

    Returns:
        Under `reconstructions` and `prior`, ready for JSON: `items`, the number of items compared; for each comparison
        of :func:`divergence`, NAME and NAME_p_value; and a joint `p_value`, by Bonferroni.
    """
    table = {"reconstructions": divergence(x, data, rows, seed, True, permutations)}
    if samples is not None:
        table["prior"] = divergence(samples, data, rows, seed + 1, False, permutations)
    return {name: {"items": len(rows), **_flat(found)} for name, found in table.items()}


def _flat(found: dict[str, Comparison]) -> dict[str, float]:
    pairs = ({name: c.statistic, f"{name}_p_value": c.p_value} for name, c in found.items())
    least = min(c.p_value for c in found.values())
    return {key: value for pair in pairs for key, value in pair.items()} | {"p_value": min(1.0, len(found) * least)}


def _observed(data: Dataset, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """The compared entries of observations, (n, d), and a mask of the observed ones, (n, d) of bool."""
    return _joined(data.corruption.entries(*data.batch(chunk)) for chunk in data.chunks(indices, BATCH))


def _simulated(x: Tensor, corruption: Corruption, seed: int) -> tuple[Tensor, Tensor]:
    """The same for items, observed anew with generators of this seed."""
    return _joined(
        corruption.entries(*corruption.observe(chunk, seeding.generator(seed, number, "data")))
        for number, chunk in enumerate(x.split(BATCH))
    )


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    rows, seen = zip(*parts, strict=True)
    return torch.cat(rows).double(), torch.cat(seen)


def _sizes(u: Tensor, v: Tensor, paired: bool) -> tuple[int, int]:
    if paired and len(u) != len(v):
        raise ValueError(f"pairs need as many rows on both sides, got {len(u)} and {len(v)}")
    return len(u), len(v)


def _labels(n: int, m: int, permutations: int, generator: torch.Generator, paired: bool) -> Tensor:
    """Which of the n + m rows count as the first sample, (1 + permutations, n + m) of 0 and 1; row 0 has the true
    labels."""
    labels = torch.zeros(permutations + 1, n + m, dtype=torch.float64)
    labels[0, :n] = 1
    if paired:
        stay = torch.rand(permutations, n, generator=generator) < 0.5
        labels[1:] = torch.cat((stay, ~stay), 1).double()
    else:
        order = torch.rand(permutations, n + m, generator=generator).argsort(1)
        labels[1:].scatter_(1, order[:, :n], 1.0)
    return labels


def _judged(statistics: Tensor) -> Comparison:
    """The comparison from its statistic (the first) and the statistics with exchanged labels (all others)."""
    tie = 1e-10 * statistics.abs().max()  # equal in exact arithmetic, but not after rounding
    larger = (statistics[1:] >= statistics[0] - tie).sum().item()
    return Comparison(statistics[0].item(), (1 + larger) / len(statistics))
