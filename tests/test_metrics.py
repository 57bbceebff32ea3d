"""Metrics against closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffem.clean import metrics
from diffem.data import Items
from diffem.units import Units


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("d", [1, 40])
def test_energy_distance_of_equal_laws(d):
    values = torch.tensor([metrics.energy_distance(normal(300, d, k), normal(400, d, 50 + k)) for k in range(50)])
    error = values.std() / 50**0.5
    assert values.mean().abs() < 4 * error  # without bias: it is 0 on average
    assert (values < 0).any()
    assert error < 0.01


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (1.0, 0.3), (3.0, 2.0)])
def test_energy_distance_of_shifted_gaussians(shift, scale):
    quantiles = torch.special.ndtri((torch.arange(4000) + 0.5) / 4000)[:, None]  # a sample without luck
    u, v = scale * quantiles, scale * quantiles + shift
    s = scale * math.sqrt(2)  # u - v is N(-shift, s^2)
    across = s * math.sqrt(2 / math.pi) * math.exp(-((shift / s) ** 2) / 2) + shift * math.erf(shift / s / math.sqrt(2))
    within = 2 * scale / math.sqrt(math.pi)
    assert metrics.energy_distance(u, v) == pytest.approx(2 * (across - within), rel=0.01)


def test_frechet_distance_of_diagonal_gaussians():
    def sample(n: int, mean: list[float], std: list[float], seed: int) -> torch.Tensor:
        x = normal(n, 3, seed).double()
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # moments are exactly 0 and I
        return x * torch.tensor(std) + torch.tensor(mean)

    u, v = sample(500, [0, 1, 2], [1.0, 2.0, 0.5], 0), sample(300, [1, 1, 0], [3.0, 2.0, 0.1], 1)
    assert metrics.frechet_distance(u, v) == pytest.approx(1 + 4 + 2**2 + 0 + 0.4**2, rel=1e-6)
    assert metrics.frechet_distance(u, u) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch", [7, 1024])
def test_nearest_by_brute_force(batch):
    u, v = normal(50, 4, 0), normal(80, 4, 1)
    brute = [min(math.dist(a, b) for b in v.tolist()) for a in u.tolist()]
    np.testing.assert_allclose(metrics.nearest(u, v, batch), brute, rtol=1e-4)


def test_nearest_of_an_item_that_is_there():
    u = normal(300, 16, 0) + 3
    assert metrics.nearest(u, u).max() < 1e-5  # products of float32 would say 1e-2
    assert metrics.nearest(u + 1e-3, u).mean() == pytest.approx(4e-3, rel=0.01)


def test_psnr():
    clean = torch.zeros(4, 2, 3, 3)
    assert metrics.psnr(clean + 0.2, clean, 2.0) == pytest.approx(20)
    x = clean.clone()
    x[0] = 0.2  # the square error is averaged over all items first
    assert metrics.psnr(x, clean, 2.0) == pytest.approx(20 + 10 * math.log10(4))
    assert metrics.psnr(clean, clean, 2.0) == math.inf


def test_compare_is_in_model_units():
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (50, 1, 2, 2), dtype=np.uint8)
    x = clean.astype(np.float32) + 25.5
    found = metrics.compare(*(Items(a, Units(127.5, 127.5))[np.arange(50)] for a in (x, clean)))
    assert found["psnr"] == pytest.approx(20, abs=1e-4)
    u, v = (torch.from_numpy((a.astype(np.float32) - 127.5) / 127.5) for a in (x, clean))
    assert found == {
        "psnr": metrics.psnr(u, v, 2.0),
        "energy_distance": metrics.energy_distance(u, v, of_one_row=True),
        **metrics.manifold_overlap(u[::2], v[1::2]),
    }
    features = lambda a: a.flatten(1)[:, :2].square()  # noqa: E731
    frechet = metrics.frechet_distance(features(u), features(v))
    assert metrics.compare(u, v, features) == {**found, "frechet": frechet}


def test_energy_distance_of_estimates_of_the_same_rows():
    """It has the mean that independent rows have, less error than halves of the rows, and no gain from being near its row."""
    own, halves, naive = [], [], []
    for k in range(60):
        v = normal(200, 8, k)
        u = 0.6 * v + 0.8 * normal(200, 8, 1000 + k)  # in law as v is
        own.append(metrics.energy_distance(u, v, of_one_row=True))
        halves.append(metrics.energy_distance(*metrics.apart(u, v)))
        naive.append(metrics.energy_distance(u, v))
    own, halves, naive = (torch.tensor(a) for a in (own, halves, naive))
    assert abs(own.mean()) < 3 * own.std() / 60**0.5
    assert own.std() < 0.7 * halves.std()
    assert naive.mean() < -5 * naive.std() / 60**0.5


def test_sinkhorn_divergence():
    u = 0.3 * normal(60, 2, 0)
    assert metrics.sinkhorn_divergence(u, u, 0.05) == pytest.approx(0, abs=1e-6)
    assert metrics.sinkhorn_divergence(u, u.flip(0), 0.05) == pytest.approx(0, abs=1e-6)
    shift = torch.tensor([0.6, -0.8])
    assert metrics.sinkhorn_divergence(u, u + shift, 0.05) == pytest.approx(1, rel=1e-3)
    assert metrics.sinkhorn_divergence(u, u + 0.1 * shift, 0.05) == pytest.approx(0.01, rel=1e-2)
    assert metrics.sinkhorn_divergence(u, u + shift) == pytest.approx(1, rel=0.02)
    other = torch.cat((u, u + shift))  # half of the mass has to move: sizes may differ
    assert metrics.sinkhorn_divergence(u, other, 0.05) == pytest.approx(0.5, rel=0.3)


def test_distances():
    x, clean = normal(30, 8, 0).view(30, 2, 2, 2), normal(40, 8, 1).view(40, 2, 2, 2)
    u, v = x.flatten(1), clean.flatten(1)
    apart = (u[:, None] - v).norm(dim=2)
    assert metrics.distances(x, clean) == {
        "energy_distance": metrics.energy_distance(u[::2], v[1::2]),
        "nearest_clean": pytest.approx(apart.amin(1).mean().item(), rel=1e-4),
        "nearest_item": pytest.approx(apart.amin(0).mean().item(), rel=1e-4),
        **metrics.manifold_overlap(u[::2], v[1::2]),
    }


def brute_force_overlap(u: np.ndarray, v: np.ndarray, k: int) -> dict[str, float]:
    """The definitions, with a point at a time."""

    def radius(a: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(a[i] - a[j]) for j in range(len(a)) if j != i)[k - 1]

    real, fake = [radius(v, j) for j in range(len(v))], [radius(u, i) for i in range(len(u))]
    inside = np.array([[np.linalg.norm(a - b) < r for b, r in zip(v, real, strict=True)] for a in u])
    around = np.array([[np.linalg.norm(a - b) < r for b in v] for a, r in zip(u, fake, strict=True)])
    return {
        "precision": np.mean([row.any() for row in inside]),
        "recall": np.mean([column.any() for column in around.T]),
        "density": sum(row.sum() for row in inside) / (k * len(u)),
        "coverage": np.mean([column.any() for column in inside.T]),
    }


@pytest.mark.parametrize("neighbours", [1, 5])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.7, 0.5), (0.7, 2.0)])
def test_manifold_overlap_by_brute_force(shift, scale, neighbours):
    u, v = scale * normal(40, 3, 0) + shift, normal(60, 3, 1)
    found = metrics.manifold_overlap(u, v, neighbours)
    expected = brute_force_overlap(u.double().numpy(), v.double().numpy(), neighbours)
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(found.values())) > 1  # they are not one thing
    images = metrics.manifold_overlap(u.view(40, 1, 1, 3), v.view(60, 1, 1, 3), neighbours)
    assert images == found


def modes(n: int, chosen: list[int], seed: int) -> torch.Tensor:
    """n points of ten narrow modes that are far apart, of the chosen ones alone."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.tensor(chosen)[torch.randint(len(chosen), (n,), generator=generator)]
    return 10 * torch.eye(10)[which] + 0.1 * torch.randn(n, 10, generator=generator)


def test_manifold_overlap_of_equal_laws():
    found = metrics.manifold_overlap(modes(500, list(range(10)), 0), modes(500, list(range(10)), 1))
    assert min(found["precision"], found["recall"], found["coverage"]) > 0.9
    assert found["density"] == pytest.approx(1, abs=0.1)


def test_manifold_overlap_of_collapsed_modes():
    # every item looks real, but 7 of the 10 kinds are never made
    found = metrics.manifold_overlap(modes(500, [0, 1, 2], 0), modes(500, list(range(10)), 1))
    assert found["precision"] > 0.9
    assert found["density"] > 0.8
    assert found["recall"] == pytest.approx(0.3, abs=0.05)
    assert found["coverage"] == pytest.approx(0.3, abs=0.05)
    # the other way round: three kinds are all there, but most of what is made is none of them
    found = metrics.manifold_overlap(modes(1500, list(range(10)), 0), modes(400, [0, 1, 2], 1))
    assert found["precision"] == pytest.approx(0.3, abs=0.05)
    assert found["density"] < 0.5
    assert min(found["recall"], found["coverage"]) > 0.8


def test_manifold_overlap_of_too_few_items():
    few, many = normal(5, 2, 0), normal(6, 2, 1)
    for found in (metrics.manifold_overlap(few, many), metrics.manifold_overlap(many, few)):
        assert list(found) == ["precision", "recall", "density", "coverage"]
        assert all(math.isnan(value) for value in found.values())
    assert all(math.isfinite(value) for value in metrics.manifold_overlap(many, many + 0.1).values())


def test_the_ends_of_an_interval_are_whole_ranks():
    draws = np.random.default_rng(0).permutation(np.arange(1.0, 40.0))[:, None] * [1, 10]
    low, high = metrics.interval(draws, 0.9)  # of 40 places among 39 draws, 36 are inside
    np.testing.assert_allclose([low, high], [[2, 20], [38, 380]], rtol=1e-12)
