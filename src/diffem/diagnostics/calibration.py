r"""Whether posterior and prior fit each other: simulation-based calibration and coverage.

Draw :math:`x \sim p`, :math:`y \sim Q(\cdot \mid x)`, and :math:`x_1 \dots x_M \sim q(\cdot \mid y)`. If q is the
posterior of p, then x and the draws have the same distribution given y and are exchangeable. For any scalar
:math:`f(x, y)`, the rank

.. math:: r = \#\{ j : f(x_j, y) < f(x, y) \} \quad \text{is uniform on } \{0, \dots, M\}

(ties are broken at random). If draws are too narrow, ranks pile up at both ends; if too wide, in the middle; if biased,
at one end. The test quantities f are:

* **SBC** (Talts et al., 2018): random projections of x, and its squared norm, which do not depend on y; and
  the log likelihood :math:`\log Q(y \mid x)`, which does (Modrak et al., 2023).
* **TARP** (Lemos et al., 2023): the distance of x to a reference point that does not depend on x. The expected coverage
  is the share of x whose credible ball around its reference has level below :math:`\alpha`; it is :math:`\alpha` for
  all :math:`\alpha`. In many dimensions, draws that are too narrow miss x on every side, and the coverage falls below
  the diagonal; draws that are too wide lift it above.

What these tests can and cannot show:

* A small p-value shows that q is not the posterior of this p under this Q. It does not say which of them is wrong.
* Self-consistency is not truth. If p is wrong and q is its exact posterior, all tests pass. Whether simulated
  observations look like the real ones is tested in :mod:`diffem.diagnostics.divergence`.
* A posterior that ignores y and returns the prior passes all tests whose quantity does not depend on y: projections,
  norm and TARP. Only the log likelihood detects it; a black box has none.
* If clean items are known and their observations were simulated, the same tests (:func:`calibration` of :class:`Trials`
  made of them) compare with the truth, with the same blind spots.

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
from diffem.corruptions.base import NOISE_FLOOR
from diffem.errors import DiffemError
from diffem.samplers import BATCH, Sampler, draw_from, prior_samples

NUMBERS = 2**27
PROJECTIONS = 4
BINS = 8  # of a histogram of ranks: more bins show finer faults, and need more items
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
        coverage: The share of items inside their credible region of that level, shape (21,).
        deviation: The difference coverage - alpha of largest absolute value; negative if draws are too narrow.
        p_value: Of the Kolmogorov-Smirnov test that the deviation is 0.
    """

    levels: Tensor
    coverage: Tensor
    deviation: float
    p_value: float


def ranks(draws: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    """How many draws (M, *) are smaller than the truth (*), ties broken at random: integers 0 .. M, shape (*)."""
    ties = (draws == truth).sum(0)
    chance = torch.rand(truth.shape, generator=generator, dtype=torch.float64)  # rank among the 1 + ties equal values
    return (draws < truth).sum(0) + (chance * (1 + ties)).long()


def histogram(ranks: Tensor, draws: int, bins: int = BINS) -> tuple[Tensor, Tensor]:
    """Counts of ranks (n,) in at most `bins` bins of 0 .. draws, and the expected counts of uniform ranks, both
    (bins,).

    Bins are as equal as possible; if draws + 1 is not a multiple of their number, the expected counts differ.
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
        generator: Breaks ties, and spreads the M + 1 ranks evenly over [0, 1], so that the p-value is exact.
    """
    distance = lambda a: (a.double() - references.double()).norm(dim=-1)  # noqa: E731
    rank = ranks(distance(draws), distance(truth), generator)
    level = (rank + torch.rand(rank.shape, generator=generator, dtype=torch.float64)) / (len(draws) + 1)
    found = stats.kstest(level.numpy(), "uniform")  # the sign of empirical minus uniform, that is coverage - alpha
    alpha = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)
    coverage = (level[:, None] <= alpha).double().mean(0)
    return Coverage(alpha, coverage, float(found.statistic_sign * found.statistic), float(found.pvalue))


def simulate(posterior: Sampler, prior: Sampler, n: int, draws: int, seed: int, batch: int = BATCH) -> Trials:
    """Items from the prior, an observation of each by the posterior's corruption, and `draws` posterior draws given each.

    Raises:
        DiffemError: If the items of the prior and of the posterior differ in shape.
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
    """The quantities that are ranked: by name, their values for the draws (M, n) and for the items (n,).

    Random projections; the squared norm; and the log likelihood, except for a black box, which has none, and for
    observations without noise, which the items fit exactly, while draws assume a least noise.
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
        `items` and `draws`, their numbers; under `sbc`, for each quantity, the `counts` of its ranks, the `expected`
        counts, and `p_value`; under `tarp`, `levels`, `coverage`, `deviation` and `p_value` (see :class:`Coverage`);
        and a joint `p_value`, by Bonferroni.
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
    """:func:`calibration` of a posterior under its prior, on simulated observations only.

    Arguments:
        posterior: The posterior to test.
        prior: The prior that it should be the posterior of.
        seed: Seed of the run.
        n: Number of items; fewer if all draws together would exceed :data:`NUMBERS` numbers.
        draws: Draws for each item; n * draws in all.
        batch: Items at a time.
    """
    n = memory.at_once(draws * math.prod(posterior.shape), n, NUMBERS)
    return calibration(simulate(posterior, prior, n, draws, seed, batch), seed)


def _log_likelihood(trials: Trials, x: Tensor) -> Tensor:
    """log Q(y | x) of items (n, *shape), up to a term that does not depend on x; (n,)."""
    corruption = trials.corruption
    assert isinstance(corruption, LinearCorruption)
    error = (corruption.forward(x, trials.params) - trials.y) / corruption.noise_std(trials.y, trials.params)
    return -error.double().square().flatten(1).sum(1) / 2
