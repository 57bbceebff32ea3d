"""The collapse watch where the prior is known: silent if it is right, and each number finds the fault that it is there for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from diffem import seeding
from diffem.corruptions import BlackBox, Corruption, GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.data import Dataset, Observations
from diffem.diagnostics import score
from diffem.diagnostics.collapse import NUMBERS, collapse_watch
from diffem.mixtures import Mixture
from diffem.samplers import MixtureSampler, draw_many, prior_samples, sample_prior
from diffem.units import Units

FEATURES, N, UNITS = 8, 180, Units(1.0, 2.0)
CASES = {"mask": RandomMask(0.5, 0.2), "projection": RandomProjection(3, 0.2), "noise": GaussianNoise(0.8)}


def model(corruption: Corruption, kinds: tuple[float, float] = (0.3, 0.7)) -> MixtureSampler:
    """The exact posterior of two Gaussians of rank 2, with these weights."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(2, FEATURES, generator=generator)
    factor = 0.4 * torch.randn(2, FEATURES, 2, generator=generator)
    mixture = Mixture(torch.tensor(kinds).log(), mean, factor, torch.full((2, FEATURES), 0.02))
    return MixtureSampler(corruption.scaled(UNITS), (FEATURES,), mixture)


def items(seeds: torch.Tensor) -> torch.Tensor:
    """Draws from the prior, in the units of y."""
    return UNITS.restore(sample_prior(model(CASES["mask"]), seeds))


def observed(corruption: Corruption, seed: int, n: int = 2 * N) -> Dataset:
    x = items(seeding.item_seeds(1000 + seed, 0, "data", torch.arange(n)))
    y, params = corruption.observe(x, torch.Generator().manual_seed(seed))
    return Dataset(Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()}, formula=True), UNITS)


def watch(name: str, seed: int = 0, samples=lambda z, training: z, sampler=None, factor: float = 1.0) -> dict:
    """The numbers of the exact posterior and prior, of another sampler, or of samples that something was done to."""
    corruption, rows = CASES[name], np.arange(N)
    data, right = observed(corruption, seed), sampler or model(corruption)
    x = draw_many(right, data, np.arange(2 * N), 1, seed)[0]
    z = samples(prior_samples(right, N, seed), x[N:])
    return collapse_watch(x[:N], z, x[N:], data, rows, seed)


def warned(table: dict) -> set[str]:
    return {name for name, row in table.items() if row["warning"]}


def narrowed(z: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    return z.mean(0) + 0.7 * (z - z.mean(0))


def repeated(z: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    return z[:20].repeat(9, 1) + 0.005 * torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(0))


def copied(z: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    return training + 0.005 * torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_silent_while_all_is_well(name):
    tables = [watch(name, seed) for seed in range(20)]
    assert sum(bool(warned(table)) for table in tables) <= 1  # several numbers in each, judged at three standard errors
    for number in tables[0]:
        away = np.array([(t[number]["value"] - t[number]["healthy"]) / t[number]["error"] for t in tables])
        assert np.abs(away).max() < 4, number
        assert abs(away.mean()) < 1, number  # nothing but what the standard errors say
        assert (away**2).mean() < 2.5, number


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("change", "finds"),
    [(narrowed, {"prior_diversity", "neighbours"}), (repeated, {"neighbours", "duplicates"}), (copied, {"memorised"})],
)
def test_priors_that_are_narrow_or_repeat_or_copy(name, change, finds):
    found = warned(watch(name, samples=change))
    assert finds & found if change is narrowed else finds <= found
    assert not found & {"diversity", "nearest"}  # the reconstructions are right


@pytest.mark.parametrize("name", CASES)
def test_a_kind_is_lost(name):
    found = warned(watch(name, sampler=model(CASES[name], (1e-30, 1.0))))
    assert found & {"prior_diversity", "neighbours"}
    if name == "noise":  # elsewhere the posterior still follows what it was shown, and only the prior has lost it
        assert found == {"diversity", "prior_diversity", "nearest"}


class Narrow(MixtureSampler):
    """Draws that are 30 % too near to the exact mean."""

    def draw(self, y, params, seeds, withheld=None):
        x = super().draw(y, params, seeds, withheld)
        likelihood = self.corruption.likelihood(y, params)
        mean = self.mixture.posterior(likelihood if withheld is None else likelihood.withheld(withheld)).mean
        return mean + 0.7 * (x - mean)


@pytest.mark.parametrize("sampler", [MixtureSampler, Narrow])
def test_spread_of_a_narrow_posterior(sampler):
    corruption = CASES["mask"]
    data, rows = observed(corruption, 0), np.arange(N)
    drawn = sampler(corruption.scaled(UNITS), (FEATURES,), model(corruption).mixture)
    found = score(drawn, data, rows, 0, splits=8)
    x = draw_many(drawn, data, rows, 1, 0)[0]
    table = collapse_watch(x, None, x, data, rows, 0, (found.ratio, found.ratio_error))
    assert ("spread" in warned(table)) == (sampler is Narrow)
    assert list(table) == ["spread", "diversity", "nearest"]


def test_a_prior_of_one_item_and_a_black_box():
    box = BlackBox(lambda x: x.clamp(-1, 1))
    z = items(seeding.item_seeds(0, 0, "data", torch.arange(3 * N)))
    data = Dataset(Observations(z[:N].clamp(-1, 1).numpy(), box), UNITS)
    z = UNITS.scale(z)
    right = collapse_watch(z[:N], z[N : 2 * N], z[2 * N :], data, np.arange(N), 0)
    assert not warned(right)
    table = collapse_watch(z[:N], z[:1].expand(N, -1), z[2 * N :], data, np.arange(N), 0)
    assert {"prior_diversity", "neighbours", "duplicates"} <= warned(table)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert table["duplicates"]["warning"] == (
        "the prior repeats itself: 100% of its samples nearly repeat another one, where 5% would; do not rely on their variety"
    )
    assert set(table) == set(NUMBERS) - {"spread", "nearest", "outside"}


@pytest.mark.parametrize("assumed", [1.0, 1.3])
def test_a_blur_that_is_taken_for_a_wider_one(assumed):
    """The exact posterior of a wide prior: what it draws predicts the observations, and leaves the range."""
    n, shape, units = 200, (1, 16, 16), Units(8.0, 8.0)
    clean = (8 + 3 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))).clamp(0, 16)
    y, _ = GaussianBlur(1.0, 0.005).observe(clean, torch.Generator().manual_seed(1))
    corruption = GaussianBlur(assumed, 0.005)
    data = Dataset(Observations(y.numpy(), corruption, range=(0, 16)), units)
    white = torch.full((1, 256), (3 / 8) ** 2)
    prior = Mixture(torch.zeros(1), torch.zeros(1, 256), torch.zeros(1, 256, 0), white, corruption.basis(shape))
    x = draw_many(MixtureSampler(data.corruption, shape, prior), data, np.arange(n), 1, 0)[0]
    row = collapse_watch(x, None, x, data, np.arange(n), 0)["outside"]
    beyond = x.abs().sub(1).clamp(min=0)
    assert row["value"] == pytest.approx(beyond.square().mean().sqrt().item(), rel=1e-5)
    assert row["error"] < 0.1 * row["value"]
    assert (row["warning"] is not None) == (assumed == 1.3)
    if row["warning"]:
        assert row["warning"] == (
            f"the reconstructions lie outside the stated range of the data, by {row['value']:.2f} of half of it; "
            "is the declared corruption the true one?"
        )
