"""Large items by tiles: draws against the exact posterior of a texture, seams, and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffem import seeding
from diffem.corruptions import GaussianBlur, GaussianNoise, RandomMask
from diffem.data import Observations
from diffem.data.patches import Grid
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.posterior import Posterior
from diffem.samplers import MixtureSampler, ObservationSampler
from diffem.tiles import Tiled, tiled, untrained
from diffem.units import Units

TILE, WHOLE, RANK, DRAWS, NOISE = 16, 32, 96, 64, 0.1
LENGTH = 2.0  # of the correlation, in pixels


def covariance(n: int) -> torch.Tensor:
    """Of a stationary Gaussian texture of n x n pixels."""
    at = torch.arange(n, dtype=torch.float64)
    axis = torch.exp(-(at[:, None] - at).square() / (2 * LENGTH**2))
    return 0.25 * (0.98 * torch.kron(axis, axis) + 0.02 * torch.eye(n * n))


def texture(corruption=None) -> MixtureSampler:
    """The exact posterior of the texture, on a tile."""
    values, vectors = torch.linalg.eigh(covariance(TILE))
    factor = vectors[:, -RANK:] * (values[-RANK:] - 0.005).clamp(min=0).sqrt()
    variance = 0.25 - factor.square().sum(1)
    parts = torch.zeros(1), torch.zeros(1, TILE**2), factor[None].float(), variance[None].float()
    return MixtureSampler(corruption or RandomMask(0.5, NOISE), (1, TILE, TILE), Mixture(*parts))


@pytest.fixture(scope="module")
def drawn():
    """Draws by tiles of a masked texture, those of independent tiles, and the exact mean and covariance."""
    generator, n = torch.Generator().manual_seed(0), WHOLE**2
    prior = covariance(WHOLE)
    root = torch.linalg.cholesky(prior)
    x = (root @ torch.randn(n, generator=generator, dtype=torch.float64)).float().view(1, 1, WHOLE, WHOLE)
    mask = torch.rand(x.shape, generator=generator) > 0.5
    y = (x + NOISE * torch.randn(x.shape, generator=generator)) * mask
    seen = mask.flatten()
    gain = prior[:, seen] @ torch.linalg.inv(prior[seen][:, seen] + NOISE**2 * torch.eye(int(seen.sum())))
    mean, cov = gain @ y.flatten()[seen].double(), prior - gain @ prior[seen]
    sampler, many = texture(), (DRAWS, 1, -1, -1)
    seeds = seeding.item_seeds(0, 0, "user", range(DRAWS))
    draws = tiled(sampler, (1, WHOLE, WHOLE), 64).draw(y.expand(many), {"mask": mask.expand(many)}, seeds)
    apart = torch.zeros_like(draws)
    for k, place in enumerate(Grid((WHOLE, WHOLE), TILE).places):
        at = (slice(None), slice(None), *place)
        part = {"mask": mask.expand(many)[at]}
        apart[at] = sampler.draw(y.expand(many)[at], part, seeding.again(seeds, k + 1))
    return draws.flatten(1).double(), apart.flatten(1).double(), mean, cov


def test_draws_by_tiles_have_the_mean_and_the_variances_of_the_exact_posterior(drawn):
    draws, _, mean, cov = drawn
    std = cov.diagonal().sqrt()
    off = ((draws.mean(0) - mean) / std).square().mean().sqrt()
    assert off < 1.25 * DRAWS**-0.5  # the error of the mean of exact draws, and a quarter of it
    ratio = (draws - mean).square().mean(0) / std.square()
    assert abs(ratio.mean() - 1) < 0.04
    at = torch.arange(WHOLE) % (TILE // 2)
    near = ratio.view(WHOLE, WHOLE)[(at == 0) | (at == TILE // 2 - 1)].mean()
    assert abs(near - ratio.mean()) < 0.04


def test_draws_by_tiles_vary_together_as_the_exact_posterior_does(drawn):
    draws, _, mean, cov = drawn
    values, vectors = torch.linalg.eigh(cov)
    energy = ((draws - mean) @ vectors).square().mean(0) / values
    for part in (slice(-10, None), slice(-50, -10), slice(-200, -50)):  # smooth directions first
        assert 0.85 < energy[part].mean() < 1.15


def steps(draws: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> tuple[float, float]:
    """Squared differences of vertical neighbours over those that the exact posterior expects: across borders of tiles, and elsewhere."""
    down = torch.arange(WHOLE**2).view(WHOLE, WHOLE)
    above, below = down[:-1].flatten(), down[1:].flatten()
    expected = (mean[above] - mean[below]).square() + cov[above, above] + cov[below, below] - 2 * cov[above, below]
    found = (draws[:, above] - draws[:, below]).square().mean(0)
    row, border = above // WHOLE, TILE // 2
    across = row % border == border - 1
    return tuple(float(found[here].sum() / expected[here].sum()) for here in (across, ~across))


def test_a_seam_has_no_more_energy_than_elsewhere(drawn):
    draws, apart, mean, cov = drawn
    across, elsewhere = steps(draws, mean, cov)
    assert abs(across - elsewhere) < 0.06  # three standard errors, by draws of other seeds
    assert abs(elsewhere - 1) < 0.06
    across, elsewhere = steps(apart, mean, cov)
    assert across > elsewhere + 0.15  # independent tiles show one


@pytest.mark.parametrize("size", [(16, 16), (20, 33), (16, 47)])
def test_windows_sum_to_one(size):
    of = Tiled(untrained(texture()), (1, *size), 4)
    total = torch.zeros(size, dtype=torch.float64)
    for place in of.grid.places:
        total[place] += of._window(place)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_one_tile_without_variance_is_the_sampler_itself():
    sampler = untrained(texture(GaussianNoise(NOISE)))
    sampler.width = 0.0
    y, seeds = torch.randn(2, 1, TILE, TILE, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 4])
    torch.testing.assert_close(Tiled(sampler, (1, TILE, TILE), 1).draw(y, {}, seeds), sampler.draw(y, {}, seeds))


def test_draws_depend_on_keys_and_not_on_the_batch():
    y = np.random.default_rng(0).normal(size=(3, 1, 20, 24)).astype(np.float32)
    posterior = Posterior(texture(GaussianNoise(NOISE)), GaussianNoise(NOISE), Units())
    seeds = torch.tensor([5, 6, 7])
    draws = posterior.sample(y, n=2, seeds=seeds)
    assert draws.shape == (2, 3, 1, 20, 24)
    np.testing.assert_allclose(posterior.sample(y, n=2, seeds=seeds, batch=1), draws, atol=1e-4)
    np.testing.assert_allclose(posterior.sample(y[1:], n=2, seeds=seeds[1:], batch=5), draws[:, 1:], atol=1e-4)
    assert np.abs(draws[0] - draws[1]).mean() > 0.01
    observations = Observations(y, GaussianNoise(NOISE))
    of_rows = [posterior.reconstruct(observations, np.array([2]), n=2, seed=1, batch=b) for b in (3, 100)]
    torch.testing.assert_close(*of_rows, atol=1e-4, rtol=0)


def test_what_cannot_be_drawn_by_tiles_is_refused():
    shape = (1, TILE, TILE)
    said = f"where the model's have {shape}"
    larger = "items of shape (1, 16, 40), "
    cases = [
        (texture(), (1, TILE, 8), f"items of shape (1, 16, 8), {said}"),
        (texture(), (2, TILE, 40), f"items of shape (2, 16, 40), {said}"),
        (
            texture(GaussianBlur(1.0, NOISE)),
            (1, TILE, 40),
            f"{larger}{said}; larger ones can be drawn only where an entry of y is made of one of x",
        ),
        (
            ObservationSampler(GaussianNoise(NOISE), shape),
            (1, TILE, 40),
            f"{larger}{said}; observation draws no larger ones",
        ),
    ]
    for sampler, wanted, text in cases:
        with pytest.raises(DiffemError) as caught:
            tiled(sampler, wanted, 4)
        assert str(caught.value) == text
    posterior = Posterior(texture(GaussianNoise(NOISE)), GaussianNoise(NOISE), Units())
    with pytest.raises(
        DiffemError, match=r"^y: is of items of shape \(1, 8, 8\), where the model's have \(1, 16, 16\)$"
    ):
        posterior.sample(np.zeros((1, 1, 8, 8), np.float32))
