"""Noise that is not the same everywhere, and units that are not the same for all channels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from operators import assert_same_in_model_units

from diffem import config as configuration
from diffem.corruptions import GaussianBlur, GaussianNoise, LinearCorruption, Mask, RandomMask, RandomProjection
from diffem.corruptions.linear import NOISE_FLOOR, SPREAD
from diffem.data import Dataset, Observations
from diffem.diagnostics import score
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.posterior import from_pretrained
from diffem.samplers import MixtureSampler
from diffem.units import Units

DOUBLE = torch.float64
TINY = {
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "start": {"components": [1], "ranks": [2], "iterations": 10},
    "sampler": {"steps": 3},
    "em": {"iterations": 1, "guard": False},
    "m_step": {"first_steps": 5, "batch": 16},
    "prior": {"steps": 3},
}
N = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE)


def level(*shape: int) -> torch.Tensor:
    return 0.05 + torch.rand(*shape, generator=seeded(9), dtype=DOUBLE)


def masks(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(8)) < 0.6


IMAGE, ROW = (3, 4, 5), (6,)
CASES = {
    "by channel": (Mask([0.1, 0.2, 0.7]), IMAGE, {"mask": masks(N, 1, 4, 5)}),
    "by column": (Mask([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), ROW, {"mask": masks(N, *ROW)}),
    "by entry": (Mask(), IMAGE, {"mask": masks(N, 1, 4, 5), "noise": level(N, *IMAGE)}),
    "by entry of a row": (Mask(), ROW, {"mask": masks(N, *ROW), "noise": level(N, *ROW)}),
    "by item": (GaussianNoise(), IMAGE, {"noise": level(N, 1, 1, 1)}),
    "by item, blurred": (GaussianBlur(0.8), IMAGE, {"noise": level(N, 1, 1, 1)}),
    "by channel, blurred": (GaussianBlur(0.8, [0.1, 0.2, 0.7]), IMAGE, {}),
    "by item, projected": (
        RandomProjection(3),
        ROW,
        {"matrix": randn(N, 3, 6), "noise": level(N, 1)},
    ),
}
parametrised = pytest.mark.parametrize(("corruption", "shape", "params"), CASES.values(), ids=CASES)


def dense(
    corruption: LinearCorruption, params: dict, shape: tuple[int, ...], i: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A of item i, and the standard deviations of the noise on A x, by hand."""
    d = math.prod(shape)
    own = {k: v[i : i + 1].expand(d, *v.shape[1:]) for k, v in params.items()}
    a = corruption.forward(torch.eye(d, dtype=DOUBLE).view(d, *shape), own).flatten(1).T
    if "matrix" in params:
        return a, params["noise"][i].expand(3)
    if "noise" in params:
        return a, params["noise"][i].expand(shape).flatten()
    per = torch.tensor(corruption.noise, dtype=DOUBLE)
    return a, per.view(-1, *(1,) * (len(shape) - 1)).expand(shape).flatten()


@parametrised
def test_noise_has_the_stated_standard_deviation(corruption, shape, params):
    n = 20_000
    own = {k: v[:1].expand(n, *v.shape[1:]) for k, v in params.items()}
    y = corruption.apply(torch.zeros(n, *shape, dtype=DOUBLE), own, seeded(1)).flatten(1)
    a, std = dense(corruption, params, shape, 0)
    seen = a.abs().sum(1) > 0
    torch.testing.assert_close(y.std(0)[seen], std[seen], rtol=0.03, atol=0)
    assert (y[:, ~seen] == 0).all()


@parametrised
def test_likelihood_gives_the_textbook_posterior(corruption, shape, params):
    d = math.prod(shape)
    y = corruption.apply(randn(N, *shape), params, seeded(1))
    prior = Mixture.standard(d).copied(DOUBLE)
    prior.basis = corruption.basis(shape)
    found = prior.posterior(corruption.likelihood(y, params)).mean
    for i in range(N):
        a, std = dense(corruption, params, shape, i)
        expected = a.T @ torch.linalg.solve(a @ a.T + torch.diag(std.square()), y[i].flatten())
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-6)


@parametrised
def test_measured_is_the_dense_formula(corruption, shape, params):
    x = randn(N, *shape)
    found = corruption.measured(x, params).flatten(1)
    for i in range(N):
        a, std = dense(corruption, params, shape, i)
        gram = a @ a.T + torch.diag((std.clamp(min=NOISE_FLOOR) / SPREAD).square())
        torch.testing.assert_close(found[i], a.T @ torch.linalg.solve(gram, a @ x[i].flatten()), rtol=0, atol=1e-8)


@parametrised
@pytest.mark.parametrize("apart", [False, True])
def test_in_model_units_it_is_the_same_observation(corruption, shape, params, apart):
    if apart and not corruption.apart(shape):
        pytest.skip("its channels are not observed apart")
    each = (shape[0], *(1,) * (len(shape) - 1))
    units = Units(randn(*each, seed=2).numpy(), level(*each).numpy()) if apart else Units(0.3, 2.0)
    assert_same_in_model_units(corruption, randn(N, *shape, seed=3), params, units)


@parametrised
def test_the_network_sees_noise_that_differs(corruption, shape, params):
    y = corruption.apply(randn(N, *shape), params, seeded(1))
    seen = corruption.condition(y, params)
    told = [v for v in seen if "noise" in params and torch.equal(v, params["noise"].expand_as(v))]
    assert len(told) == ("noise" in params)
    nothing = corruption.condition(
        y, {k: v for k, v in params.items() if k == "matrix"}
    )  # as when the prior is sampled
    assert [v.shape for v in nothing] == [v.shape for v in seen]


def test_scores_know_the_noise_of_every_entry():
    """Exact draws are calibrated among the quiet observations as among the noisy ones."""
    n, d = 3000, 6
    noise = np.float32(10.0 ** np.random.default_rng(0).uniform(-2, 0.5, (n, 1)))
    x = torch.randn(n, d, generator=seeded(0))
    corruption, params = Mask(), {"mask": masks(n, d), "noise": torch.from_numpy(noise).expand(n, d)}
    y = corruption.apply(x, params, seeded(1))
    data = Dataset(Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()}, (-1, 1)), Units())
    sampler = MixtureSampler(data.corruption, (d,), Mixture.standard(d))
    for rows in np.array_split(noise[:, 0].argsort(), 5):
        found = score(sampler, data, rows, seed=0, draws=8, splits=2)
        assert abs(math.log(found.ratio)) < 4 * found.ratio_error


@pytest.mark.parametrize(
    ("corruption", "params", "text"),
    [
        (Mask(), {}, "noise: Mask needs it: a standard deviation, or noise.npy"),
        (RandomMask(0.5), {}, "noise: RandomMask needs it: a standard deviation, or noise.npy"),
        (
            Mask(0.1),
            {"noise": np.ones((9, 1, 4, 4))},
            "noise.npy: Mask has `noise: 0.1`, too; keep one of them",
        ),
        (Mask([0.1, 0.2]), {}, "noise: has 2 values where y.npy has 1 channels (columns)"),
        (Mask(), {"noise": np.ones((9, 3))}, "noise.npy: shape (9, 3) does not broadcast against y's (9, 1, 4, 4)"),
        (Mask(), {"noise": -np.ones((9, 1, 1, 1))}, "noise.npy: holds -1; a standard deviation is >= 0"),
        (Mask(), {"noise": np.full((9, 1, 1, 1), np.nan)}, "noise.npy: holds nan; a standard deviation is >= 0"),
        (
            GaussianBlur(1.0),
            {"noise": np.ones((9, 1, 4, 4))},
            "noise.npy: a blur needs one number for each observation, or for each of its channels",
        ),
    ],
)
def test_noise_that_is_refused(corruption, params, text):
    if isinstance(corruption, Mask):
        params = {"mask": np.ones((9, 1, 4, 4), bool), **params}
    with pytest.raises(DiffemError) as caught:
        Observations(np.zeros((9, 1, 4, 4)), corruption, params, source="here")
    assert str(caught.value) == f"here: {text}"


@pytest.mark.parametrize("text", ["1e-3", "0.001", "[0.1, 0.2, 0.3]"])
def test_noise_in_a_file(text, tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((9, 3, 4, 4)))
    (tmp_path / "corruption.yaml").write_text(f"name: GaussianNoise\nnoise: {text}\n")
    found = Observations.load(tmp_path).corruption
    assert found.noise == ((0.1, 0.2, 0.3) if "[" in text else 0.001)
    assert found.config["noise"] == ([0.1, 0.2, 0.3] if "[" in text else 0.001)


@pytest.mark.parametrize("name", ["by entry", "by item, blurred", "by channel"])
def test_a_run_learns_and_draws_with_it(name, tmp_path):
    corruption, shape, params = CASES[name]
    n = 60
    params = {k: v.float().repeat(n // N, *(1,) * (v.ndim - 1)) for k, v in params.items()}
    params = {k: v.bool() if k == "mask" else v for k, v in params.items()}
    y = corruption.apply(randn(n, *shape).float(), params, seeded(1))
    observations = Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()})
    observations.save(tmp_path / "observations")
    loaded = Observations.load(tmp_path / "observations")
    rows = list(DiffEM(configuration.from_dict(TINY), loaded, tmp_path / "run").iterate())
    assert all(math.isfinite(row["score"]) for row in rows)
    posterior = from_pretrained(tmp_path / "run" / "posterior")
    assert posterior.sample(y[:4], {k: v[:4] for k, v in params.items()}).isfinite().all()
    assert posterior.sample_prior(3).shape == (3, *shape)
    if "noise" in params:
        with pytest.raises(DiffemError, match=r"^noise: [A-Za-z]+ needs it: a standard deviation, or noise.npy$"):
            posterior.sample(y[:4], {k: v[:4] for k, v in params.items() if k != "noise"})


# --- units of channels and of columns -------------------------------------------------------------------


def table(n: int = 3000) -> np.ndarray:
    """Income, a ratio, and age; a third is missing."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(5e4, 2e4, n), rng.normal(0.3, 0.1, n), rng.uniform(18, 90, n)], 1)
    return np.where(rng.random(x.shape) < 0.3, np.nan, x).astype(np.float32)


def test_each_column_has_units_of_its_own():
    y = table()
    observations = Observations(y, Mask(0.0))
    units = observations.units(observations.split(0)[0])
    np.testing.assert_allclose(units.centre, [5e4, 0.3, 54], rtol=0.1)
    assert ((np.nanstd(units.scale(y), 0) > 0.25) & (np.nanstd(units.scale(y), 0) < 0.7)).all()


def test_each_channel_has_units_of_its_own_unless_a_range_is_stated():
    y = np.random.default_rng(0).normal([[[[10.0]], [[0.1]]]], [[[[3.0]], [[0.01]]]], (200, 2, 8, 8))
    for corruption in (GaussianNoise(0.01), GaussianBlur(1.0, 0.01)):
        units = Observations(y, corruption).units(np.arange(150))
        assert units.centre.shape == (2, 1, 1)
        np.testing.assert_allclose(units.centre.flatten(), [10, 0.1], rtol=0.02)
        assert Observations(y, corruption, range=(-5, 25)).units(np.arange(150)) == Units(10.0, 15.0)


def test_a_few_huge_values_do_not_hide_the_others():
    y = np.random.default_rng(0).normal(size=(2000, 2))
    plain = Observations(y, GaussianNoise(0.1)).units(np.arange(2000)).half
    y[::150, 1] *= 1000
    half = Observations(y, GaussianNoise(0.1)).units(np.arange(2000)).half
    assert half[0] == plain[0]
    assert half[1] < 10 * plain[1]


def test_a_run_gives_back_every_column_in_its_own_units(tmp_path):
    y = table(400)
    list(DiffEM(configuration.from_dict(TINY), Observations(y, Mask(0.0)), tmp_path).iterate())
    x, shown = np.load(tmp_path / "reconstructions.npy"), ~np.isnan(y)
    units = from_pretrained(tmp_path / "posterior").units
    assert units == Observations(y, Mask(0.0)).units(Observations(y, Mask(0.0)).split(0)[0])
    error = np.abs(np.where(shown, x - y, 0)).max(0) / units.half
    assert (error < 0.02).all()
