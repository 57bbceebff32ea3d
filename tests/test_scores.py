"""Scores of held-out observations where the posterior is known: they are least at the truth, and their errors are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffem import samplers
from diffem.corruptions import BlackBox, Corruption, GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.data import Dataset, Observations
from diffem.diagnostics import Coverage, Score, coverage, crps, score
from diffem.mixtures import Mixture
from diffem.samplers import MixtureSampler, ObservationSampler
from diffem.units import Units

CASES = {
    "noise": GaussianNoise(0.3),
    "mask": RandomMask(0.5, 0.1),
    "blur": GaussianBlur(1.2, 0.1),
    "projection": RandomProjection(3, 0.1),
}
UNITS = Units(1.0, 2.0)
LEVELS = (0.5, 0.8, 0.95)


def sampler(corruption: Corruption, width: float = 1.0, shift: float = 0.0, related: bool = True) -> MixtureSampler:
    """The exact posterior of a Gaussian of six entries: that of the truth, or of one that is wrong in some way."""
    generator = torch.Generator().manual_seed(3)
    mean = 0.5 * torch.randn(1, 6, generator=generator) + shift
    factor, variance = torch.randn(1, 6, 2, generator=generator) / 2, torch.full((1, 6), 0.05)
    if not related:
        factor, variance = 0 * factor, variance + factor.square().sum(-1)
    basis = corruption.basis((6,))
    mixture = Mixture(torch.zeros(1), mean, width * factor, width**2 * variance, basis)
    return MixtureSampler(corruption.scaled(UNITS), (6,), mixture)


def observed(corruption: Corruption, n: int, seed: int = 0) -> Dataset:
    x = UNITS.restore(samplers.prior_samples(sampler(corruption), n, seed))
    y, params = corruption.observe(x, torch.Generator().manual_seed(5))
    return Dataset(Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()}), UNITS)


def test_crps_of_a_gaussian():
    generator = torch.Generator().manual_seed(0)
    y = 2 * torch.randn(20000, generator=generator)
    normal = torch.randn(8, 20000, generator=generator)
    value = {spread: crps(2 * spread * normal, y).mean().item() for spread in (0.5, 1.0, 2.0)}
    assert value[1.0] == pytest.approx(2 / math.sqrt(math.pi), rel=0.03)
    assert value[0.5] > 1.03 * value[1.0]
    assert value[2.0] > 1.03 * value[1.0]


@pytest.mark.parametrize("case", CASES)
def test_scores_are_least_at_the_truth(case):
    corruption, rows = CASES[case], np.arange(4000)
    data = observed(corruption, len(rows))
    right = score(sampler(corruption), data, rows, 0, draws=2)
    assert right.ratio is not None
    assert right.ratio_error is not None
    assert abs(math.log(right.ratio)) < 3 * right.ratio_error < 0.2
    for wrong in ({"width": 0.5}, {"width": 2.0}, {"shift": 0.3}, {"related": False}):
        other = score(sampler(corruption, **wrong), data, rows, 0, draws=2)
        for delta, error in (other.difference(right), other.criterion_difference(right)):
            assert delta > 3 * error > 0, wrong
        assert other.log_score > right.log_score + 0.02, wrong


@pytest.mark.parametrize("case", ["mask", "projection"])
def test_splits_lower_the_error_of_a_difference_more_than_draws_do(case):
    corruption, rows = CASES[case], np.arange(400)
    data, right, narrow = observed(corruption, len(rows)), sampler(corruption), sampler(corruption, 0.8)

    def found(draws: int, splits: int) -> tuple[float, float]:
        one, two = (score(s, data, rows, 0, draws=draws, splits=splits) for s in (narrow, right))
        return one.criterion_difference(two)

    (little, error), (split, of_splits), (drawn, of_draws) = found(2, 2), found(2, 16), found(16, 2)
    assert of_splits < 0.9 * of_draws < 0.9 * error
    assert abs(little - split) < 3 * error  # of one quantity, whatever the number of splits
    assert abs(drawn - split) < 3 * of_draws


def test_log_score_of_few_draws_does_not_reward_narrow_ones():
    # Were it that of the mean of two draws, the least would be where the variance is 2 / 3 of the right one.
    corruption, rows = CASES["noise"], np.arange(20_000)
    data = observed(corruption, len(rows))
    narrow, right = (score(sampler(corruption, width), data, rows, 0, draws=2) for width in (0.8, 1.0))
    assert narrow.log_score > right.log_score + 0.01


def test_ratio_tells_narrow_draws_from_wide_ones():
    corruption, rows = CASES["mask"], np.arange(2000)
    data = observed(corruption, len(rows))
    narrow, right, wide = (score(sampler(corruption, width), data, rows, 0).ratio for width in (0.5, 1.0, 2.0))
    assert narrow < 0.75 * right < right < 0.75 * wide


def test_standard_errors_are_those_of_repetitions():
    corruption, parts = CASES["mask"], np.arange(6000).reshape(60, 100)
    data = observed(corruption, parts.size)
    pairs = [
        (score(sampler(corruption), data, rows, 0), score(sampler(corruption, 0.7), data, rows, 0)) for rows in parts
    ]
    logs = torch.tensor([a.ratio for a, _ in pairs]).log()
    assert logs.std() == pytest.approx(np.mean([a.ratio_error for a, _ in pairs]), rel=0.3)
    for compare in (Score.difference, Score.criterion_difference):
        found = torch.tensor([compare(b, a) for a, b in pairs])
        assert found[:, 0].std() == pytest.approx(found[:, 1].mean().item(), rel=0.3)


def test_formulas():
    parts = (torch.tensor([0.1, 0.3]), torch.tensor([0.4, 0.2]), torch.tensor([0.05, 0.15]))
    found = Score("crps", torch.tensor([0.5, 0.7]), *parts)
    assert found.ratio == pytest.approx((0.2 + 0.1) / 0.3)
    assert found.log_score == pytest.approx(math.log(0.2) + (0.3 - 0.1) / 0.2)
    assert found.criterion == pytest.approx(math.log(0.6) + found.log_score / 2)
    assert Score(found.name, **found.tensors).criterion_difference(found) == (0, 0)


def test_criterion_falls_by_twice_the_logarithm_of_a_factor_that_shrinks_all_errors():
    parts = (torch.tensor([0.1, 0.3]), torch.tensor([0.4, 0.2]), torch.tensor([0.05, 0.15]))
    large, small = (Score("crps", k * torch.tensor([0.5, 0.7]), *(k**2 * p for p in parts)) for k in (1.0, 0.9))
    assert small.criterion - large.criterion == pytest.approx(2 * math.log(0.9))


def test_black_box_has_no_ratio():
    box = BlackBox(lambda x: x + torch.randn_like(x))
    data = Dataset(Observations(np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32), box), Units())
    shown = ObservationSampler(data.corruption, (6,))
    one = score(shown, data, np.arange(50), 0)
    assert (one.name, one.ratio, one.ratio_error, one.log_score) == ("energy_distance", None, None, None)
    assert list(one.tensors) == ["items"]
    other = Score(one.name, one.items + torch.linspace(0, 1, 50))
    assert other.criterion_difference(one) == pytest.approx(other.difference(one))
    assert coverage(shown, data, np.arange(50), 0) is None


@pytest.mark.parametrize("case", CASES)
def test_coverage_is_the_level_at_the_truth(case):
    corruption, rows = CASES[case], np.arange(2000)
    data = observed(corruption, len(rows))
    for width, low, high in ((1.0, -0.03, 0.03), (0.5, -1.0, -0.06), (2.0, 0.02, 1.0)):
        found = coverage(sampler(corruption, width), data, rows, 0)
        assert found is not None
        assert found.observations == 2000
        assert all(low < found(level) - level < high for level in LEVELS[:2]), width
        assert len(found.ranks) == 40


def test_coverage_of_ranks():
    ranks = np.zeros(40, dtype=int)
    ranks[[0, 1, 3, 4, 20, 35, 36, 39]] = 1
    assert [Coverage(ranks[None])(level) for level in LEVELS] == [1 / 8, 3 / 8, 6 / 8]
    assert [Coverage(np.ones((1, 40)))(level) for level in LEVELS] == [0.5, 0.8, 0.95]


def test_standard_error_of_coverage_is_that_of_repetitions():
    corruption, parts = CASES["mask"], np.arange(6000).reshape(60, 100)
    data = observed(corruption, parts.size)
    found = [coverage(sampler(corruption), data, rows, 0) for rows in parts]
    for level in LEVELS[:2]:
        errors = [c.standard_error(level) for c in found if c is not None]
        assert np.std([c(level) for c in found if c is not None]) == pytest.approx(np.mean(errors), rel=0.3)
