"""Ranks and coverage against their exact laws; posteriors that are exact, narrow, wide, or blind."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffem.corruptions import BlackBox, Corruption, GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.diagnostics import calibration
from diffem.diagnostics.calibration import Trials, histogram, ranks, self_consistency, simulate, tarp_coverage
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.samplers import MixtureSampler, ObservationSampler
from diffem.units import Units

FEATURES = 8
UNITS = Units(1.0, 2.0)
CASES = {
    "mask": RandomMask(0.5, 0.2),
    "projection": RandomProjection(3, 0.4),
    "noise": GaussianNoise(0.8),
    "blur": GaussianBlur(0.8, 0.4),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def mixture(corruption: Corruption, shift: float = 0.0) -> Mixture:
    """Two Gaussians of rank 2, of weights 0.3 and 0.7, in model units."""
    basis = corruption.gains((FEATURES,))[0] if isinstance(corruption, GaussianBlur) else None
    weights = torch.tensor([0.3, 0.7]).log()
    mean, factor = 0.5 * normal(2, FEATURES, seed=1) + shift, 0.4 * normal(2, FEATURES, 2, seed=2)
    return Mixture(weights, mean, factor, torch.full((2, FEATURES), 0.05), basis=basis)


def exact(name: str, shift: float = 0.0) -> MixtureSampler:
    return MixtureSampler(CASES[name].scaled(UNITS), (FEATURES,), mixture(CASES[name], shift))


class Stretched(MixtureSampler):
    """Draws about the exact mean, by a factor too far from it; the prior stays what it is."""

    factor = 1.0

    def draw(self, y, params, seeds, withheld=None):
        x = super().draw(y, params, seeds, withheld)
        if withheld is None:
            withheld = torch.zeros(len(y), dtype=torch.bool)
        mean = self.mixture.posterior(self.corruption.likelihood(y, params).withheld(withheld)).mean
        return torch.where(withheld[:, None], x, mean + self.factor * (x - mean))


class Blind(MixtureSampler):
    """The prior, whatever was observed."""

    def draw(self, y, params, seeds, withheld=None):
        return super().draw(y, params, seeds, torch.ones(len(y), dtype=torch.bool))


def p_values(table: dict) -> dict[str, float]:
    return {**{name: row["p_value"] for name, row in table["sbc"].items()}, "tarp": table["tarp"]["p_value"]}


# --- ranks ---------------------------------------------------------------------------------------------


def test_ranks_count_the_smaller_draws():
    draws, truth = normal(7, 50, 3, seed=0), normal(50, 3, seed=1)
    found = ranks(draws, truth, generator(0))
    for i in range(50):
        for k in range(3):
            assert found[i, k] == sum(d < truth[i, k] for d in draws[:, i, k])


def test_ties_are_broken_at_random():
    n = 20_000
    draws = torch.tensor([0.0, 1.0, 1.0, 2.0])[:, None].expand(4, n)
    for value, possible in ((-1.0, [0]), (0.0, [0, 1]), (1.0, [1, 2, 3]), (2.0, [3, 4]), (3.0, [4])):
        counts = torch.bincount(ranks(draws, torch.full((n,), value), generator(0)), minlength=5).numpy()
        assert set(np.flatnonzero(counts)) == set(possible)
        assert stats.chisquare(counts[possible]).pvalue > 0.01 or len(possible) == 1


def test_ranks_among_equals_in_law_are_uniform_with_ties_or_without():
    integers = torch.randint(3, (6, 20_000), generator=generator(0))  # four of five ranks are ties
    for numbers in (integers, normal(6, 20_000, seed=1)):
        counts = torch.bincount(ranks(numbers[1:], numbers[0], generator(2)), minlength=6)
        assert stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize(("draws", "bins", "sizes"), [(15, 8, [2] * 8), (9, 4, [3, 2, 3, 2]), (3, 8, [1] * 4)])
def test_histogram_expects_what_a_bin_holds(draws, bins, sizes):
    every = torch.arange(draws + 1).repeat(10)
    counts, expected = histogram(every, draws, bins)
    assert counts.tolist() == expected.tolist() == [10 * size for size in sizes]


def test_uniformity_has_uniform_p_values():
    found = [
        calibration.uniformity(torch.randint(16, (400,), generator=generator(k)), 15) for k in range(300)
    ]  # chi-squared of counts of 50: close to its limit
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert calibration.uniformity(torch.arange(16).repeat(20).clamp(min=3), 15) < 1e-6


# --- coverage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 15])
def test_coverage_of_exact_draws_is_on_the_diagonal(draws):
    p_values = []
    for k in range(200):
        x, references = normal(draws + 1, 40, 5, seed=k), 3 + normal(40, 5, seed=10_000 + k)
        found = tarp_coverage(x[1:], x[0], references, generator(k))
        p_values.append(found.p_value)
        assert (found.coverage - found.levels).abs().max() <= abs(found.deviation) + 1e-12
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("factor", "sign"), [(0.7, -1), (1.5, 1)])
def test_coverage_of_narrow_and_of_wide_draws(factor, sign):
    x, references = normal(32, 300, 16, seed=0), 2 * torch.rand(300, 16, generator=generator(1)) - 1
    found = tarp_coverage(factor * x[1:], x[0], references, generator(2))
    assert found.p_value < 1e-3
    assert sign * found.deviation > 0.1
    assert (sign * (found.coverage - found.levels)[4:-4] > 0).all()
    assert found.coverage[[0, -1]].tolist() == found.levels[[0, -1]].tolist() == [0, 1]
    assert found.levels.diff().numpy() == pytest.approx(0.05)


def test_coverage_is_a_share_of_balls():
    # one dimension, references below everything: the ball of level alpha is what lies below the alpha quantile
    truth, draws = normal(500, 1, seed=0), normal(99, 500, 1, seed=1) - 0.5
    found = tarp_coverage(draws, truth, torch.full((500, 1), -50.0), generator(2))
    expected = torch.special.ndtr(torch.special.ndtri(found.levels) - 0.5)  # P(truth < that quantile of the draws)
    assert found.coverage.numpy() == pytest.approx(expected.numpy(), abs=0.06)
    assert found.deviation == pytest.approx(2 * stats.norm.cdf(-0.25) - 1, abs=0.06)


# --- samplers ------------------------------------------------------------------------------------------


def test_trials_are_in_model_units():
    sampler = exact("mask")
    trials = simulate(sampler, sampler, 300, 3, 0)
    assert trials.x.shape == (300, FEATURES)
    assert trials.draws.shape == (3, 300, FEATURES)
    assert trials.params["mask"].shape == (300, FEATURES)
    model = sampler.mixture
    expected = (model.log_weights.exp()[:, None] * model.mean).sum(0)
    error = trials.x.std(0) / 300**0.5
    assert ((trials.x.mean(0) - expected).abs() < 4 * error).all()
    noise = (trials.y - trials.x)[trials.params["mask"]]
    assert noise.std().item() == pytest.approx(0.2 / 2, rel=0.1)
    assert not trials.y[~trials.params["mask"]].any()
    assert (trials.draws[0] != trials.draws[1]).all()


@pytest.mark.parametrize("name", CASES)
def test_exact_posterior_is_consistent_with_its_prior(name):
    found: list[dict[str, float]] = []
    for seed in range(30):
        found.append(p_values(self_consistency(exact(name), exact(name), seed, n=100, draws=7)))
    for quantity in found[0]:
        assert stats.kstest([p[quantity] for p in found], "uniform").pvalue > 0.01
    assert self_consistency(exact(name), exact(name), 0)["p_value"] > 0.05


@pytest.mark.parametrize(("factor", "sign"), [(0.7, -1), (1.5, 1)])
@pytest.mark.parametrize("name", ["mask", "projection"])
def test_narrow_and_wide_posteriors_are_found_out(name, factor, sign):
    sampler = Stretched(CASES[name].scaled(UNITS), (FEATURES,), mixture(CASES[name]))
    sampler.factor = factor
    table = self_consistency(sampler, sampler, 0, n=400)
    assert table["p_value"] < 1e-3
    # the truth lies outside narrow draws too often, and inside wide ones
    ends = [(row["counts"][0] + row["counts"][-1]) / 100 for k, row in table["sbc"].items() if "projection" in k]
    assert all(-sign * (share - 1) > 0.1 for share in ends)
    assert table["sbc"]["projection_0"]["p_value"] < 1e-3
    assert table["tarp"]["p_value"] < 1e-3
    assert sign * table["tarp"]["deviation"] > 0
    coverage, levels = np.array(table["tarp"]["coverage"]), np.array(table["tarp"]["levels"])
    assert sign * (coverage - levels).mean() > 0.02


def test_only_the_likelihood_finds_a_posterior_that_does_not_look():
    sampler = Blind(CASES["mask"].scaled(UNITS), (FEATURES,), mixture(CASES["mask"]))
    table = self_consistency(sampler, exact("mask"), 0, n=400)
    found = p_values(table)
    likelihood = found.pop("log_likelihood")
    assert min(found.values()) > 0.01
    assert likelihood < 1e-20
    counts = table["sbc"]["log_likelihood"]["counts"]
    assert counts[-1] == max(counts)  # the truth explains the observation better than most draws do


def test_a_posterior_of_another_prior_is_found_out_and_a_wrong_prior_alone_is_not():
    assert self_consistency(exact("mask", 0.3), exact("mask"), 0)["p_value"] < 1e-3
    assert self_consistency(exact("mask", 0.3), exact("mask", 0.3), 0)["p_value"] > 0.05


def test_known_items_judge_the_prior_too():
    # what benchmarks do: observations of clean items, which the posterior's prior did not make
    x = 0.5 * normal(300, FEATURES, seed=3) + 0.3
    y = x + 0.4 * normal(300, FEATURES, seed=4)

    def table(mean: float) -> dict:
        sampler = MixtureSampler(
            GaussianNoise(0.4),
            (FEATURES,),
            Mixture(
                torch.zeros(1),
                torch.full((1, FEATURES), mean),
                torch.zeros(1, FEATURES, 0),
                torch.full((1, FEATURES), 0.25),
            ),
        )
        seeds = torch.arange(300)
        draws = torch.stack([sampler.draw(y, {}, 1000 * j + seeds) for j in range(15)])
        return calibration.calibration(Trials(x, y, {}, draws, sampler.corruption), 0)

    assert table(0.3)["p_value"] > 0.05
    assert table(-0.3)["p_value"] < 1e-3


def test_log_likelihood_is_that_of_the_noise():
    sampler = exact("projection")
    trials = simulate(sampler, sampler, 10, 2, 0)
    drawn, truth = calibration.quantities(trials, generator(0))["log_likelihood"]
    for values, x in ((drawn[1], trials.draws[1]), (truth, trials.x)):
        for i in range(10):
            mean = trials.params["matrix"][i] @ x[i]
            density = torch.distributions.Normal(mean, 0.4 / 2).log_prob(trials.y[i]).sum()
            constant = -3 * math.log(0.2 * math.sqrt(2 * math.pi))
            assert values[i] == pytest.approx(density.item() - constant, rel=1e-3, abs=1e-4)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize("corruption", [BlackBox(double), GaussianNoise(0.0)])
def test_no_likelihood_of_a_black_box_or_without_noise(corruption):
    sampler = ObservationSampler(corruption.scaled(UNITS), (4,))
    prior = MixtureSampler(GaussianNoise(0.1).scaled(UNITS), (4,), Mixture.standard(4))
    table = self_consistency(sampler, prior, 0, n=64, draws=3)
    assert list(table["sbc"]) == ["projection_0", "projection_1", "projection_2", "projection_3", "squared_norm"]


def test_what_is_given_for_json():
    table = self_consistency(exact("mask"), exact("mask"), 5, n=70, draws=9)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert (table["items"], table["draws"]) == (70, 9)
    for row in table["sbc"].values():
        assert sum(row["counts"]) == 70
        assert sum(row["expected"]) == pytest.approx(70)
    assert table["tarp"]["levels"] == [round(0.05 * k, 2) for k in range(21)]
    assert table["p_value"] == min(1, 7 * min(p_values(table).values()))
    assert table == self_consistency(exact("mask"), exact("mask"), 5, n=70, draws=9)
    other = self_consistency(exact("mask"), exact("mask"), 6, n=70, draws=9)
    assert other["tarp"]["coverage"] != table["tarp"]["coverage"]


def test_prior_of_other_items():
    with pytest.raises(DiffemError, match=r"shape \(4,\)"):
        simulate(exact("mask"), ObservationSampler(CASES["mask"].scaled(UNITS), (4,)), 8, 2, 0)
