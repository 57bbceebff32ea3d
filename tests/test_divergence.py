"""Two-sample tests against brute force and their exact null distributions; what they find on digits."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffem.clean import datasets, metrics
from diffem.corruptions import BlackBox, Corruption, GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.data import Dataset, Observations, evenly
from diffem.diagnostics import divergence
from diffem.diagnostics.divergence import energy_test, sample_divergence
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.samplers import MixtureSampler, ObservationSampler, draw_many, prior_samples
from diffem.units import Units

DISTANCES = ("rows", "entries", "pairs")
TESTS = {
    **{name: lambda u, v, g, name=name, **k: energy_test(u, v, g, distance=name, **k) for name in DISTANCES},
}
NAMES = ["energy_distance", "entries", "pairs"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=generator(seed))


def observation_divergence(posterior, prior, data, held_out, seed: int, limit: int = 512) -> dict:
    """That of draws of a posterior and a prior."""
    rows = evenly(held_out, limit)
    x, samples = draw_many(posterior, data, rows, 1, seed)[0], prior and prior_samples(prior, len(rows), seed)
    return sample_divergence(x, samples, data, rows, seed)


def is_uniform(p_values: list[float], step: float, seed: int = 0) -> float:
    """The p-value that p-values on the grid step, 2 step, ..., 1 are uniform: spread over the steps they would be continuous."""
    spread = np.array(p_values) - step * np.random.default_rng(seed).random(len(p_values))
    return stats.kstest(spread, "uniform").pvalue


# --- two-sample tests ----------------------------------------------------------------------------------


def test_energy_distances_by_other_means():
    u, v = normal(30, 4, 0), 1.5 * normal(20, 4, 1) + 0.2
    found = {name: energy_test(u, v, generator(0), 0, distance=name).statistic for name in DISTANCES}
    assert found["rows"] == pytest.approx(metrics.energy_distance(u, v), rel=1e-4)
    entries = [metrics.energy_distance(u[:, i : i + 1], v[:, i : i + 1]) for i in range(4)]
    assert found["entries"] == pytest.approx(sum(entries) / 4, rel=1e-4)

    def second(i: int, j: int) -> float:
        """The squared difference of the moments of entries i and j, without bias."""
        a, b = (u[:, i] * u[:, j]).double(), (v[:, i] * v[:, j]).double()
        square = lambda m: (m.sum() ** 2 - (m**2).sum()) / (len(m) * (len(m) - 1))  # noqa: E731
        return (square(a) + square(b) - 2 * a.mean() * b.mean()).item()

    pairs = [second(i, j) for i, j in itertools.permutations(range(4), 2)]
    assert found["pairs"] == pytest.approx(sum(pairs) / 12, rel=1e-4)


def test_paired_energy_distance_leaves_out_the_pairs():
    u, v = normal(6, 3, 0), normal(6, 3, 1)
    brute = sum(
        math.dist(u[i], v[j]) + math.dist(v[i], u[j]) - math.dist(u[i], u[j]) - math.dist(v[i], v[j])
        for i, j in itertools.permutations(range(6), 2)
    )
    assert energy_test(u, v, generator(0), 0, paired=True).statistic == pytest.approx(brute / 30, rel=1e-5)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", TESTS)
def test_p_values_are_uniform_for_equal_laws(name, paired):
    found = []
    for k in range(400):
        shared = 2 * normal(9, 3, k) if paired else 0.0
        u, v = normal(9, 3, 1000 + k) + shared, normal(9 if paired else 7, 3, 2000 + k) + shared
        found.append(TESTS[name](u, v, generator(k), permutations=19, paired=paired).p_value)
    assert set(np.round(20 * np.array(found)).astype(int)) == set(range(1, 21))
    assert is_uniform(found, 1 / 20) > 0.01


@pytest.mark.parametrize("name", TESTS)
def test_p_value_is_the_share_of_the_partitions(name):
    u, v = normal(3, 2, 0), normal(3, 2, 1) + torch.tensor([9.0, 9.3])  # no other partition is as far apart, but
    found = TESTS[name](u, v, generator(0), permutations=4000).p_value  # with the samples exchanged it is the same one
    assert found == pytest.approx(2 / math.comb(6, 3), abs=0.02)


@pytest.mark.parametrize("name", TESTS)
def test_pairs_are_not_two_samples(name):
    # what the pairs share makes labels that are exchanged freely too cautious
    found = []
    for k in range(100):
        shared = 2 * normal(9, 3, k)
        u, v = normal(9, 3, 1000 + k) + shared, normal(9, 3, 2000 + k) + shared
        found.append(TESTS[name](u, v, generator(k), permutations=19).p_value)
    assert is_uniform(found, 1 / 20) < 1e-3


def test_p_value_of_samples_without_difference():
    same = torch.ones(10, 3)
    for test in TESTS.values():
        assert test(same, same, generator(0)).p_value == 1


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda v: v + 0.5, {"rows", "entries"}),
        (lambda v: 1.6 * v, {"rows", "entries"}),
        (lambda v: v[:, :1] + 0.5 * v, {"rows", "pairs"}),  # correlated, and wider
        (lambda v: v.sign() + 0.01 * v, {"entries"}),  # two values with the moments of a Gaussian
        (lambda v: v, set()),
    ],
)
def test_what_each_test_sees(change, seen):
    u, v = normal(160, 6, 0), change(normal(150, 6, 1))
    found = {name: test(u, v, generator(0)).p_value for name, test in TESTS.items()}
    assert {name for name, p in found.items() if p < 0.01} >= seen
    if not seen:
        assert min(found.values()) > 0.05


def test_pairs_find_a_small_shift_that_samples_hide():
    shared = 2 * normal(60, 5, 0)
    u, v = shared + 0.3 * normal(60, 5, 1), shared + 0.3 * normal(60, 5, 2) + 0.15
    assert energy_test(u, v, generator(0), paired=True).p_value < 0.01
    assert energy_test(u, v, generator(0)).p_value > 0.5


def test_pairs_need_equal_numbers():
    for test in TESTS.values():
        with pytest.raises(ValueError, match="as many rows"):
            test(normal(5, 2, 0), normal(6, 2, 0), generator(0), paired=True)


# --- observations --------------------------------------------------------------------------------------

FEATURES = 6
UNITS = Units(1.0, 2.0)
LINEAR = {
    "mask": RandomMask(0.5, 0.4),
    "projection": RandomProjection(1, 0.2),
    "blur": GaussianBlur(0.8, 0.3),
    "noise": GaussianNoise(0.5),
}


def gaussian(scale: float = 1.0) -> Mixture:
    """A Gaussian of rank 2 in model units, with a mean."""
    factor = scale * 0.7 * normal(FEATURES, 2, 5)
    mean = 0.3 * normal(1, FEATURES, 6)
    return Mixture(torch.zeros(1), mean, factor[None], torch.full((1, FEATURES), (0.2 * scale) ** 2))


def posterior(corruption: Corruption, scale: float = 1.0) -> MixtureSampler:
    prior = gaussian(scale)
    if isinstance(corruption, GaussianBlur):  # mixtures are written in the basis of the likelihood
        basis, _ = corruption.gains((FEATURES,))
        prior = Mixture(
            prior.log_weights,
            basis.analyse(prior.mean),
            basis.analyse(prior.factor.mT).mT,
            prior.variance,
            basis=basis,
        )
    return MixtureSampler(corruption.scaled(UNITS), (FEATURES,), prior)


def truth(n: int, seed: int) -> torch.Tensor:
    """Items in the units of y, by hand: no sampler that is tested draws them."""
    prior = gaussian()
    x = prior.mean + normal(n, 2, seed) @ prior.factor[0].T + 0.2 * normal(n, FEATURES, seed + 10_000)
    return UNITS.restore(x)


def observe(
    x: torch.Tensor, corruption: Corruption, seed: int, declared: Corruption | None = None, units: Units = UNITS
) -> Dataset:
    """Observations of items in the units of y."""
    params = corruption.draw(len(x), tuple(x.shape[1:]), generator(seed))
    y = corruption.apply(x, params, generator(seed + 1)).numpy()
    arrays = {k: v.numpy() for k, v in params.items()}
    return Dataset(Observations(y, declared or corruption, arrays, shape=tuple(x.shape[1:]), formula=True), units)


@pytest.mark.parametrize("name", LINEAR)
def test_reconstructions_of_the_exact_posterior_are_null(name):
    table: dict[str, list[float]] = {k: [] for k in NAMES}
    sampler, n = posterior(LINEAR[name]), 20
    for k in range(100):
        data = observe(truth(n, k), LINEAR[name], 3 * k)
        found = observation_divergence(sampler, None, data, np.arange(n), k)["reconstructions"]
        for key, values in table.items():
            values.append(found[f"{key}_p_value"])
    for values in table.values():
        assert is_uniform(values, 1 / (divergence.PERMUTATIONS + 1)) > 0.01


@pytest.mark.parametrize("name", LINEAR)
def test_prior_and_posterior_right_and_wrong(name):
    n, corruption = 300, LINEAR[name]
    data = observe(truth(n, 0), corruption, 1)
    right = observation_divergence(posterior(corruption), posterior(corruption), data, np.arange(n), 0)
    wrong = observation_divergence(posterior(corruption, 0.5), posterior(corruption, 0.5), data, np.arange(n), 0)
    assert min(table["p_value"] for table in right.values()) > 0.05
    assert max(table["p_value"] for table in wrong.values()) < 0.05
    for part, table in wrong.items():
        assert table["energy_distance"] > max(0, right[part]["energy_distance"])


def test_what_is_given_for_json():
    data = observe(truth(60, 0), LINEAR["mask"], 1)
    held_out, sampler = np.arange(20, 60), posterior(LINEAR["mask"])
    found = observation_divergence(sampler, sampler, data, held_out, 3, limit=30)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["reconstructions", "prior"]
    for table in found.values():
        assert list(table) == ["items", *(f"{n}{s}" for n in NAMES for s in ("", "_p_value")), "p_value"]
        assert table["items"] == 30
        least = min(table[f"{n}_p_value"] for n in NAMES)
        assert table["p_value"] == min(1, 5 * least)
    assert found == observation_divergence(sampler, sampler, data, held_out, 3, limit=30)
    other = observation_divergence(sampler, sampler, data, held_out, 4, limit=30)
    assert other["reconstructions"]["energy_distance"] != found["reconstructions"]["energy_distance"]
    data.observations.y[:20] = 1e9  # those that are not held out are not looked at
    assert found == observation_divergence(sampler, sampler, data, held_out, 3, limit=30)
    data.observations.y[-1] += 9 * data.observations.params["mask"][-1]  # those that are, from the first to the last
    assert found != observation_divergence(sampler, sampler, data, held_out, 3, limit=30)


def test_units_do_not_matter():
    x = truth(40, 0)
    data = observe(x, RandomMask(0.5, 0.4), 1)
    units = Units(10 * UNITS.centre, 10 * UNITS.half)
    larger = Observations(10 * data.observations.y, RandomMask(0.5, 4.0), data.observations.params, formula=True)
    tenfold = Dataset(larger, units)
    a = divergence.divergence(UNITS.scale(x), data, np.arange(40), 0, paired=True)
    b = divergence.divergence(units.scale(10 * x), tenfold, np.arange(40), 0, paired=True)
    for name in NAMES[:-1]:
        assert a[name].statistic == pytest.approx(b[name].statistic, rel=1e-3, abs=1e-5)


def fold(x: torch.Tensor) -> torch.Tensor:
    return (x[:, :4].abs() + 0.1 * torch.randn(len(x), 4)).float()


def test_black_box():
    corruption = BlackBox(fold)
    data = observe(truth(300, 0), corruption, 1)
    right = divergence.divergence(UNITS.scale(truth(200, 5)), data, np.arange(300), 0)
    wrong = divergence.divergence(UNITS.scale(truth(200, 5) + 0.7), data, np.arange(300), 0)
    assert min(c.p_value for c in right.values()) > 0.01
    assert wrong["energy_distance"].p_value < 0.01


def test_projections_remember_their_direction():
    # y alone has one law for all items of equal size: rows on the sphere look everywhere
    x, other = truth(500, 0), normal(500, FEATURES, 7)
    x = x - x.mean(0)
    other = other / other.norm(dim=1, keepdim=True) * x.norm(dim=1, keepdim=True)
    corruption, units = RandomProjection(2, 0.2), Units(0.0, 2.0)
    data = observe(x, corruption, 1, units=units)
    found = divergence.divergence(units.scale(other), data, np.arange(500), 0)
    alone = corruption.apply(other, corruption.draw(500, (FEATURES,), generator(3)), generator(4))
    assert energy_test(alone, torch.from_numpy(data.observations.y), generator(5)).p_value > 0.05
    assert found["pairs"].p_value < 0.01


def test_one_mask_for_all_channels():
    x = normal(80, 48, 0).view(80, 3, 4, 4)
    data = observe(x, RandomMask(0.5, 0.1), 1, units=Units())
    assert data.observations.params["mask"].shape == (80, 1, 4, 4)
    found = divergence.divergence(normal(80, 48, 9).view(80, 3, 4, 4), data, np.arange(80), 0)
    assert min(c.p_value for c in found.values()) > 0.01


def test_too_few():
    data = observe(truth(3, 0), LINEAR["mask"], 1)
    with pytest.raises(DiffemError, match="at least 4 items"):
        divergence.divergence(UNITS.scale(truth(9, 1)), data, np.arange(3), 0)


# --- digits --------------------------------------------------------------------------------------------

GREY = Units(8.0, 8.0)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    x = torch.from_numpy(datasets.load("digits").items).float()
    return x[torch.randperm(len(x), generator=generator(0))]


def compare(
    items: torch.Tensor, clean: torch.Tensor, corruption: Corruption, declared: Corruption | None = None
) -> dict[str, float]:
    """p-values of items against observations of other clean ones."""
    data = observe(clean, corruption, 1, declared, GREY)
    found = divergence.divergence(GREY.scale(items), data, np.arange(len(clean)), 0)
    return {name: c.p_value for name, c in found.items()}


def blurred(x: torch.Tensor) -> torch.Tensor:
    return GaussianBlur(0.5, 0.0).forward(x, {})


def shrunk(x: torch.Tensor) -> torch.Tensor:
    return x.mean(0) + 0.8 * (x - x.mean(0))


def like_gaussian(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(1)
    root = torch.linalg.cholesky(torch.cov(flat.T) + 1e-3 * torch.eye(64))
    return (flat.mean(0) + normal(len(x), 64, 3) @ root.T).view_as(x)


def independent(x: torch.Tensor) -> torch.Tensor:
    order = torch.rand(len(x), 64, generator=generator(4)).argsort(0)
    return x.flatten(1).gather(0, order).view_as(x)


@pytest.mark.parametrize(
    ("change", "by"),
    [
        (lambda x: x, None),
        (blurred, "energy_distance"),
        (shrunk, "energy_distance"),
        (like_gaussian, "entries"),
        (independent, "pairs"),
    ],
)
def test_masked_digits(digits, change, by):
    found = compare(change(digits[:180]), digits[180:360], RandomMask(0.75, 0.64))
    assert found[by] < 0.01 if by else min(found.values()) > 0.05


@pytest.mark.parametrize(
    ("corruption", "declared", "by"),
    [
        (RandomMask(0.75, 0.64), RandomMask(0.65, 0.64), "energy_distance"),
        (GaussianBlur(1.0, 0.64), None, None),
        (GaussianBlur(1.0, 0.64), GaussianBlur(1.3, 0.64), "energy_distance"),
        (GaussianBlur(1.0, 0.64), GaussianBlur(1.0, 0.83), "entries"),
        (GaussianNoise(4.0), None, None),
        (GaussianNoise(4.0), GaussianNoise(5.2), "energy_distance"),
    ],
)
def test_wrong_corruptions_of_right_digits(digits, corruption, declared, by):
    found = compare(digits[:180], digits[180:360], corruption, declared)
    assert found[by] < 0.01 if by else min(found.values()) > 0.05


def test_filling_with_the_middle_is_found_out(digits):
    data = observe(digits[:180], RandomMask(0.75, 0.64), 1, units=GREY)
    sampler = ObservationSampler(data.corruption, (1, 8, 8))
    found = observation_divergence(sampler, None, data, np.arange(180), 0)["reconstructions"]
    assert found["p_value"] < 0.01
    assert found["energy_distance"] > 0.03


def test_energy_items_are_those_of_the_test_in_pairs():
    x, y = normal(40, 5, 0), normal(40, 5, 1)
    data = Dataset(Observations(y.numpy(), GaussianNoise(1e-6)), UNITS)
    items = divergence.energy_items(UNITS.scale(x), data, np.arange(40), 0)
    expected = energy_test((x - y.mean(0)) / 2, (y - y.mean(0)) / 2, generator(0), 0, paired=True).statistic
    apart = torch.cdist(y, y).sum().item() / (40 * 39) / 2
    assert items.mean().item() == pytest.approx(expected / apart, rel=1e-3)


def test_energy_items_of_several_corruptions_differ_less():
    y = normal(100, 3, 0)
    data = Dataset(Observations(y.numpy(), GaussianNoise(2.0)), Units())
    wide, narrow = normal(100, 3, 1), 0.5 * normal(100, 3, 1)

    def difference(seed: int, times: int) -> float:
        a, b = (divergence.energy_items(x, data, np.arange(100), seed, times) for x in (wide, narrow))
        return (a - b).mean().item()

    once, often = (np.array([difference(seed, times) for seed in range(60)]) for times in (1, 4))
    assert often.std() / once.std() == pytest.approx(0.5, rel=0.3)
    assert often.mean() == pytest.approx(once.mean(), abs=3 * once.std() / 60**0.5)


def test_standard_error_of_energy_items_is_that_of_repetitions():
    found = []
    for k in range(60):
        y = normal(200, 3, k)
        x = 0.5 * y + 0.6 * normal(200, 3, 1000 + k)  # reconstructions that vary too little
        data = Dataset(Observations(y.numpy(), GaussianNoise(1e-6)), Units())
        items = divergence.energy_items(x, data, np.arange(200), 0)
        found.append((items.mean().item(), items.std().item() / 200**0.5))
    means, errors = np.array(found).T
    assert means.std() == pytest.approx(errors.mean(), rel=0.3)
    assert means.mean() > 2.5 * errors.mean()
