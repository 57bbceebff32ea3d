r"""Whether posterior and prior fit each other: simulation-based calibration and coverage.

Draw :math:`x \sim p`, :math:`y \sim Q(\cdot \mid x)`, and :math:`x_1 \dots x_M \sim q(\cdot \mid y)`. If q is the posterior of p,
then x and the draws have one law given y and are exchangeable, and for any number :math:`f(x, y)` the rank

.. math:: r = \#\{ j : f(x_j, y) < f(x, y) \} \quad \text{is uniform on } \{0, \dots, M\}

(ties are broken at random). Draws that are too narrow make ranks heap up at both ends, too wide ones in the middle,
biased ones at one end. The numbers:

* **SBC** (Talts et al., 2018): random projections of x, and its squared norm, which do not look at y; and
  the log likelihood :math:`\log Q(y \mid x)`, which does (Modrak et al., 2023).
* **TARP** (Lemos et al., 2023): the distance of x to a reference point that does not depend on x. The share of x whose
  credible ball around its reference has level below :math:`\alpha`, the expected coverage, is :math:`\alpha` for all
  :math:`\alpha`. In many dimensions narrow draws fall short of x on every side, and the coverage falls below the
  diagonal; wide draws lift it above.

What this can prove, and what not:

* A small p-value proves that q is not the posterior of this p under this Q. It does not say which one is wrong.
* Self-consistency is not truth. If p is wrong and q its exact posterior, all passes. Whether simulated
  observations look like the real ones is for :mod:`diffem.diagnostics.divergence` to say.
* A posterior that ignores y and returns the prior passes everything that does not look at y: projections, norm and TARP.
  Only the log likelihood finds it out; a black box has none.
* Where clean items are known and their observations were simulated, the same numbers (:func:`calibration` of
  :class:`Trials` with those) do judge against the truth, up to the same blindness.

References:
    | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018), arXiv 1804.06788
    | Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity
      (Modrak et al., 2023), arXiv 2211.02383
    | Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos et al., 2023), arXiv 2302.03026
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from diffem import memory, seeding
from diffem.corruptions import Corruption, LinearCorruption, Params
from diffem.corruptions.linear import NOISE_FLOOR
from diffem.errors import DiffemError
from diffem.samplers import BATCH, Sampler, draw_from, prior_samples

NUMBERS = 2**27
PROJECTIONS = 4
BINS = 8  # of a histogram of ranks: more of them see finer faults, and need more items
LEVELS = 20  # of the coverage curve, 0.05 apart


@dataclass(frozen=True)
class Trials:
    """n items, an observation of each, and M posterior draws given each observation; all in model units.

    Attributes:
        x: Items (n, *shape).
        y: Their observations (n, *y shape).
        params: Operator parameters of the observations.
        draws: Draws (M, n, *shape).
        corruption: The corruption in model units.
    """

    x: Tensor
    y: Tensor
    params: Params
    draws: Tensor
    corruption: Corruption


@dataclass(frozen=True)
class Coverage:
    """Expected coverage.

    Attributes:
        levels: Credible levels alpha, shape (21,).
        coverage: The share of items that their credible region of that level holds, shape (21,).
        deviation: The difference coverage - alpha that is largest in size, over all alpha; below 0 for narrow draws.
        p_value: Of the Kolmogorov-Smirnov test that it is 0.
    """

    levels: Tensor
    coverage: Tensor
    deviation: float
    p_value: float


def ranks(draws: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    """How many draws (M, *) are smaller than the truth (*), ties broken at random: integers 0 .. M, shape (*)."""
    ties = (draws == truth).sum(0)
    chance = torch.rand(truth.shape, generator=generator, dtype=torch.float64)  # rank among 1 + ties that are equal
    return (draws < truth).sum(0) + (chance * (1 + ties)).long()


def histogram(ranks: Tensor, draws: int, bins: int = BINS) -> tuple[Tensor, Tensor]:
    """Counts of ranks (n,) in at most `bins` bins of 0 .. draws, and what is expected of uniform ones, both (bins,).

    Bins are as even as they can be; where draws + 1 is no multiple of them the expected counts differ.
    """
    bins = min(bins, draws + 1)
    place = torch.arange(draws + 1) * bins // (draws + 1)
    expected = len(ranks) * torch.bincount(place, minlength=bins).double() / (draws + 1)
    return torch.bincount(place[ranks], minlength=bins), expected


def uniformity(ranks: Tensor, draws: int, bins: int = BINS) -> float:
    """The p-value of the chi-squared test that ranks (n,) are uniform on 0 .. draws."""
    counts, expected = histogram(ranks, draws, bins)
    return float(stats.chisquare(counts.numpy(), expected.numpy()).pvalue)


def tarp_coverage(draws: Tensor, truth: Tensor, references: Tensor, generator: torch.Generator) -> Coverage:
    """Expected coverage of balls around reference points.

    Arguments:
        draws: Draws (M, n, d).
        truth: The items (n, d).
        references: One point for each (n, d), which must not depend on the item.
        generator: Breaks ties, and spreads the M + 1 ranks over [0, 1] evenly, so that the law of the p-value is exact.
    """
    distance = lambda a: (a.double() - references.double()).norm(dim=-1)  # noqa: E731
    rank = ranks(distance(draws), distance(truth), generator)
    level = (rank + torch.rand(rank.shape, generator=generator, dtype=torch.float64)) / (len(draws) + 1)
    found = stats.kstest(level.numpy(), "uniform")  # its sign is of empirical minus uniform, which is coverage - alpha
    alpha = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)
    coverage = (level[:, None] <= alpha).double().mean(0)
    return Coverage(alpha, coverage, float(found.statistic_sign * found.statistic), float(found.pvalue))


def simulate(posterior: Sampler, prior: Sampler, n: int, draws: int, seed: int, batch: int = BATCH) -> Trials:
    """Items from the prior, an observation of each by the posterior's corruption, and `draws` posterior draws given each.

    Raises:
        DiffemError: If the prior and the posterior are not of items of one shape.
    """
    if prior.shape != posterior.shape:
        raise DiffemError(f"prior: makes items of shape {prior.shape}, the posterior {posterior.shape}")
    seed, corruption = seeding.fold(seed, *b"calibration"), posterior.corruption
    items = prior_samples(prior, n, seed, batch)
    y, params, drawn = [], [], []
    for number, rows in enumerate(torch.arange(n).split(BATCH)):
        observed, p = corruption.observe(items[rows], seeding.generator(seed, number, "data"))
        keys = (seeding.item_seeds(seed, j, "user", rows) for j in range(draws))
        drawn.append(torch.stack([draw_from(posterior, observed, p, k, batch) for k in keys]))
        y.append(observed)
        params.append(p)
    joined = {name: torch.cat([p[name] for p in params]) for name in params[0]}
    return Trials(items, torch.cat(y), joined, torch.cat(drawn, 1), corruption)


def quantities(trials: Trials, generator: torch.Generator, projections: int = PROJECTIONS) -> dict[str, tuple]:
    """The numbers that are ranked: by name, those of the draws (M, n) and of the items (n,).

    Random projections; the squared norm; and the log likelihood, where there is one: a black box has none, and one without
    noise is met by the items exactly, by draws with an assumed least noise not.
    """
    truth, draws = trials.x.flatten(1).double(), trials.draws.flatten(2).double()
    directions = torch.randn(truth.shape[1], projections, generator=generator, dtype=torch.float64)
    along, drawn = truth @ directions, draws @ directions
    found: dict[str, tuple] = {f"projection_{k}": (drawn[..., k], along[..., k]) for k in range(projections)}
    found["squared_norm"] = draws.square().sum(-1), truth.square().sum(-1)
    corruption = trials.corruption
    if isinstance(corruption, LinearCorruption) and bool(
        (corruption.noise_std(trials.y, trials.params) >= NOISE_FLOOR).all()
    ):
        likelihood = torch.stack([_log_likelihood(trials, x) for x in trials.draws])
        found["log_likelihood"] = likelihood, _log_likelihood(trials, trials.x)
    return found


def sbc(trials: Trials, seed: int) -> dict[str, tuple[Tensor, float]]:
    """Simulation-based calibration: for each of the :func:`quantities` its ranks (n,) and their p-value."""
    seed, draws = seeding.fold(seed, *b"sbc"), len(trials.draws)
    generator = seeding.generator(seed, 0, "user")
    numbers = quantities(trials, generator)
    found = {name: ranks(drawn, truth, generator) for name, (drawn, truth) in numbers.items()}
    return {name: (r, uniformity(r, draws)) for name, r in found.items()}


def tarp(trials: Trials, seed: int) -> Coverage:
    """Expected coverage with reference points that are uniform on the range of the data, [-1, 1] in model units."""
    generator = seeding.generator(seeding.fold(seed, *b"tarp"), 0, "user")
    references = 2 * torch.rand(trials.x.flatten(1).shape, generator=generator) - 1
    return tarp_coverage(trials.draws.flatten(2), trials.x.flatten(1), references, generator)


def calibration(trials: Trials, seed: int) -> dict:
    """SBC and TARP of trials, ready for JSON and for plots.

    Returns:
        `items` and `draws`, how many; under `sbc`, by quantity, its `counts` of ranks, what is `expected` of each, and
        `p_value`; under `tarp`, `levels`, `coverage`, `deviation` and `p_value` (see :class:`Coverage`); and `p_value`
        of them all, by Bonferroni.
    """
    n, draws = len(trials.x), len(trials.draws)
    table = {}
    for name, (rank, p_value) in sbc(trials, seed).items():
        counts, expected = histogram(rank, draws)
        table[name] = {"counts": counts.tolist(), "expected": expected.tolist(), "p_value": p_value}
    found = tarp(trials, seed)
    least = min(found.p_value, *(row["p_value"] for row in table.values()))
    return {
        "items": n,
        "draws": draws,
        "sbc": table,
        "tarp": {
            "levels": [round(a, 2) for a in found.levels.tolist()],
            "coverage": found.coverage.tolist(),
            "deviation": found.deviation,
            "p_value": found.p_value,
        },
        "p_value": min(1.0, (len(table) + 1) * least),
    }


def self_consistency(
    posterior: Sampler, prior: Sampler, seed: int, n: int = 256, draws: int = 15, batch: int = BATCH
) -> dict:
    """:func:`calibration` of a posterior under its prior, on simulated observations; nothing real enters.

    Arguments:
        posterior: What is judged.
        prior: Whose posterior it should be.
        seed: Seed of the run.
        n: Items, or fewer if they are so large that all draws would be more than :data:`NUMBERS` numbers.
        draws: Draws for each; it takes n * draws draws in all.
        batch: Items at a time.
    """
    n = memory.at_once(draws * math.prod(posterior.shape), n, NUMBERS)
    return calibration(simulate(posterior, prior, n, draws, seed, batch), seed)


def _log_likelihood(trials: Trials, x: Tensor) -> Tensor:
    """log Q(y | x) of items (n, *shape), up to what does not depend on x; (n,)."""
    corruption = trials.corruption
    assert isinstance(corruption, LinearCorruption)
    error = (corruption.forward(x, trials.params) - trials.y) / corruption.noise_std(trials.y, trials.params)
    return -error.double().square().flatten(1).sum(1) / 2
