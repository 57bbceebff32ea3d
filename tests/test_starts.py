"""The first guess of the start, where the truth is known, the acceleration of EM, and which candidate is chosen; EM itself is tested in test_mixtures.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffem import starts
from diffem.corruptions import GaussianBlur, RandomMask, RandomProjection
from diffem.data import Dataset, Observations
from diffem.diagnostics import Score
from diffem.mixtures import Mixture
from diffem.mixtures import fit as fitting_module
from diffem.mixtures.fit import (
    REACH,
    Batches,
    _accelerated,
    _flat,
    _mean_log_likelihood,
    _spectrum,
    _unflat,
    converge,
    em_step,
    single,
)
from diffem.starts import StartConfig, fit
from diffem.units import Units

N, SHAPE = 1500, (1, 8, 8)
CORRUPTION = GaussianBlur(1.2, 0.1)


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items whose spectrum falls, what is observed of them, and the variances of their coefficients."""
    basis, gain = CORRUPTION.gains(SHAPE)
    variance = 0.5 * gain.flatten() + 1e-4
    generator = torch.Generator().manual_seed(0)
    coefficients = variance.sqrt() * torch.randn(N, 64, generator=generator, dtype=torch.float64)
    x = basis.synthesise(coefficients).view(-1, *SHAPE).float()
    return x, CORRUPTION.observe(x, generator)[0], variance


def test_first_variances_of_a_blur_are_the_spectrum_where_it_is_seen():
    _, y, variance = drawn()
    likelihood = CORRUPTION.likelihood(y, {})
    _mean, found = _spectrum(likelihood)
    noise = (1 / likelihood.precision).mean(0)
    error = (2 / N) ** 0.5 * (variance + noise)  # of an estimated variance
    seen = variance > 8 * error
    assert 8 < seen.sum() < 40
    assert ((found - variance).abs() < 4 * error)[seen].all()
    assert (found[~seen] <= found[seen].min()).all()  # of the others, it is known that the spectrum falls


@pytest.mark.parametrize("noise", [0.1, 0.02])
def test_start_of_a_noisy_blur_is_nearly_the_best_linear_estimate(noise):
    """From one variance for all, its error is tens of times as large: EM leaves what the noise hides as it was."""
    corruption = GaussianBlur(1.2, noise)
    x, _, variance = drawn()
    y, params = corruption.observe(x, torch.Generator().manual_seed(1))
    data = Observations(y.numpy(), corruption, range=(-1, 1))
    config = StartConfig(components=(1,), ranks=(4,))
    mixture, _about = fit(config, Dataset(data, Units()), np.arange(N), 0)
    likelihood = corruption.likelihood(y, params)
    wiener = variance / (variance + 1 / likelihood.precision)
    best = likelihood.basis.synthesise(wiener * likelihood.z).view_as(x)
    ours = mixture.posterior(likelihood).mean.view_as(x)
    assert (ours - x).square().mean() < 1.5 * (best - x).square().mean()


# --- EM, accelerated by SQUAREM ---------------------------------------------------------------------------


def problem(corruption, d: int, rank: int, n: int = 3000, seed: int = 0) -> tuple[Batches, Batches, Mixture]:
    """Observations of a Gaussian of low rank, nine tenths to fit and one to validate, and the first guess."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = 0.6 * normal(d, rank)
    x = normal(n, rank) @ factor.T + 0.2 * normal(n, d) + 0.3 * normal(d)
    params = corruption.draw(n, (d,), generator)
    y, cut = corruption.apply(x, params, generator), n * 9 // 10
    parts = [
        corruption.likelihood(y[part], {k: v[part] for k, v in params.items()}) for part in (slice(cut), slice(cut, n))
    ]
    return lambda: iter(parts[:1]), lambda: iter(parts[1:]), single(parts[0], rank, d, generator)


@pytest.mark.parametrize("seed", [0, 1])
def test_acceleration_saves_more_than_half_of_the_steps(seed, monkeypatch):
    fitting, validating, first = problem(RandomMask(0.75, 0.05), 24, 4, seed=seed)
    plain, values = first, []
    for _ in range(300):
        plain = em_step(plain, fitting(), ridge=1.0)[0]
        values.append(_mean_log_likelihood(plain, validating))
    calls = []
    monkeypatch.setattr(fitting_module, "em_step", lambda *args, **more: calls.append(1) or em_step(*args, **more))
    tolerance = 1e-3
    mixture, value, steps = converge(first, fitting, validating, 150, tolerance, ridge=1.0)
    assert steps == len(calls) <= 150
    assert value == _mean_log_likelihood(mixture, validating) > values[-1] - tolerance
    assert values[steps - 1] < value - 5 * tolerance  # as many steps of EM itself are not there yet


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize(("corruption", "d"), [(RandomMask(0.75, 0.05), 24), (RandomProjection(3, 0.05), 8)])
def test_a_round_is_two_steps_of_em_and_one_from_where_they_point(corruption, d, ridge, monkeypatch):
    fitting, _, first = problem(corruption, d, 2, 400)
    tried = []
    monkeypatch.setattr(
        fitting_module, "em_step", lambda m, *args, **more: tried.append(m) or em_step(m, *args, **more)
    )
    reach = REACH
    mixture = first
    for _ in range(6):
        tried.clear()
        after, next_reach, made = _accelerated(mixture, fitting, ridge, reach)
        one, _ = em_step(mixture, fitting(), ridge=ridge)
        two, likelihood = em_step(one, fitting(), ridge=ridge)
        zero, one_, two_ = (_flat(m) for m in (mixture, one, two))
        r, v = one_ - zero, (two_ - one_) - (one_ - zero)
        length = min(float(r.norm() / v.norm()), reach)
        assert made == len(tried) == (3 if length > 1 else 2)
        if length > 1:
            torch.testing.assert_close(_flat(tried[2]), zero + 2 * length * r + length**2 * v, rtol=1e-9, atol=1e-9)
            best, there = em_step(tried[2], fitting(), ridge=ridge)
            kept = there >= likelihood
            torch.testing.assert_close(_flat(after), _flat(best if kept else two))
            assert next_reach == (4 * reach if kept and length == reach else reach if kept else max(reach / 4, REACH))
        # never lower than EM itself was after one step
        assert em_step(after, fitting())[1] >= likelihood - (1e-3 if ridge else 1e-9)
        mixture, reach = after, next_reach


@pytest.mark.parametrize("reach", [4.0, 64.0])
@pytest.mark.parametrize("how", ["wide", "not a number"])
def test_an_extrapolation_that_lowers_the_likelihood_is_thrown_away(how, reach, monkeypatch):
    fitting, validating, first = problem(RandomMask(0.75, 0.05), 24, 4, 400)
    two = em_step(em_step(first, fitting(), ridge=1.0)[0], fitting(), ridge=1.0)[0]

    def beyond(vector: torch.Tensor, like: Mixture) -> Mixture:
        parts = _unflat(vector, like).tensors
        worse = {"variance": 1e3 * parts["variance"]} if how == "wide" else {"mean": parts["mean"] * torch.nan}
        return Mixture(**{**parts, **worse})

    monkeypatch.setattr(fitting_module, "_unflat", beyond)
    found, next_reach, made = _accelerated(first, fitting, 1.0, reach)
    assert (made, next_reach) == (3 if how == "wide" else 2, max(reach / 4, REACH))
    assert all(torch.equal(v, two.tensors[k]) for k, v in found.tensors.items())
    # a fit goes on like EM itself
    mixture, _, steps = converge(first, fitting, validating, 9, 0.0, ridge=1.0)
    plain = first
    for _ in range(steps * 2 // made):
        plain = em_step(plain, fitting(), ridge=1.0)[0]
    assert steps == (9 if how == "wide" else 10)
    assert all(torch.equal(v, plain.tensors[k]) for k, v in mixture.tensors.items())


def test_a_component_that_dies_ends_no_fit():
    """Without a ridge its weight becomes 0, and the logarithm of it infinite."""
    fitting, _, one = problem(RandomMask(0.1, 0.05), 6, 2, 200)
    parts = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in one.tensors.items()}
    parts["mean"] = parts["mean"] + torch.tensor([0.0, 1e4]).to(parts["mean"])[:, None]
    mixture = Mixture(**{**parts, "log_weights": torch.full((2,), -math.log(2)).to(parts["mean"])}, basis=one.basis)
    reach = REACH
    for _ in range(5):
        mixture, reach, made = _accelerated(mixture, fitting, 0.0, reach)
    assert made == 2  # like EM itself
    assert mixture.log_weights[1] == -torch.inf
    assert mixture.mean[0].isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("rank", [0, 3])
def test_parameters_as_a_vector_and_back(rank, dtype, tolerance):
    generator, basis = torch.Generator().manual_seed(0), CORRUPTION.gains(SHAPE)[0]
    mixture = Mixture(
        torch.tensor([0.2, 0.5, 0.3], dtype=dtype).log(),
        torch.randn(3, 64, generator=generator, dtype=dtype),
        torch.randn(3, 64, rank, generator=generator, dtype=dtype),
        torch.logspace(-6, 4, 192, dtype=dtype).view(3, 64),
        basis,
    )
    vector = _flat(mixture)
    assert vector.shape == (3 + 3 * 64 * (2 + rank),)
    again = _unflat(vector, mixture)
    assert again.basis is basis
    for name, value in mixture.tensors.items():
        assert (again.tensors[name].dtype, again.tensors[name].shape) == (dtype, value.shape)
        torch.testing.assert_close(again.tensors[name], value, rtol=tolerance, atol=tolerance)
    # wherever a step leads, weights add up to 1, and variances are above 0
    far = _unflat(vector - 9 * torch.rand(len(vector), generator=generator, dtype=torch.float64), mixture)
    assert far.log_weights.exp().sum().item() == pytest.approx(1, rel=1e-5)
    assert (far.variance > 0).all()


def test_a_fit_counts_its_steps_and_keeps_to_its_limit(monkeypatch):
    corruption = RandomMask(0.75, 0.05)
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    y, params = corruption.observe(x, torch.Generator().manual_seed(1))
    data = Observations(y.numpy(), corruption, {"mask": params["mask"].numpy()}, range=(-1, 1))
    calls = []
    monkeypatch.setattr(fitting_module, "em_step", lambda *args, **more: calls.append(1) or em_step(*args, **more))
    config = StartConfig(components=(1, 2), ranks=(1, 2), iterations=10, tolerance=-1.0)
    mixture, about = fit(config, Dataset(data, Units()), np.arange(270), 0)
    assert [(c["components"], c["rank"]) for c in about["candidates"]] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert sum(c["iterations"] for c in about["candidates"]) == len(calls)
    assert all(10 <= c["iterations"] <= 12 for c in about["candidates"])  # a round that has begun is finished
    best = min(about["candidates"], key=lambda c: c["criterion"])
    assert (about["components"], about["rank"]) == (best["components"], best["rank"])
    assert (mixture.components, mixture.rank) == (best["components"], best["rank"])


# --- which candidate it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_the_candidate_that_predicts_best_is_chosen_whatever_its_likelihood(least, monkeypatch):
    corruption, train = RandomMask(0.5, 0.05), np.arange(1, 400, 2)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    y, params = corruption.observe(x, torch.Generator().manual_seed(1))
    data = Observations(y.numpy(), corruption, {"mask": params["mask"].numpy()}, range=(-2, 2))
    calls, parts, read, converge, batch = [], [], [], starts.converge, data.batch

    def scored(sampler, of, rows, *arguments) -> Score:
        calls.append((sampler, of, rows))
        form = sampler.mixture.components, sampler.mixture.rank
        return Score("crps", torch.full((6,), 0.0 if form == least else 1.0 + len(calls)))

    def reading(rows):
        read.extend(rows)
        return batch(rows)

    def listen(mixture, fitting, validating, *limits):
        for part in (fitting, validating):
            read.clear()
            list(part())
            parts.append(set(read))
        return converge(mixture, fitting, validating, *limits)

    monkeypatch.setattr(data, "batch", reading)
    monkeypatch.setattr(starts, "score", scored)
    monkeypatch.setattr(starts, "converge", listen)
    config = StartConfig(components=(3,), ranks=(1, 3), iterations=6)
    dataset = Dataset(data, Units(0.0, 2.0))
    mixture, about = fit(config, dataset, train, 0)
    assert [(c["components"], c["rank"]) for c in about["candidates"]] == [(1, 1), (3, 1), (1, 3), (3, 3)]
    assert (about["components"], about["rank"]) == (mixture.components, mixture.rank) == least
    assert [c["criterion"] == 0 for c in about["candidates"]].count(True) == 1
    # by a tenth of the training observations, which is not fitted
    fitted, validated = parts[:2]
    assert (len(fitted), len(validated)) == (180, 20)
    assert fitted | validated == set(train)
    assert all(set(rows) == validated for _, _, rows in calls)
    # in model units, as is all that is fitted
    assert all(sampler.corruption.noise == corruption.noise / 2 and of is dataset for sampler, of, _ in calls)


def test_a_rank_is_what_the_posterior_predicts_best_with():
    """Of items of rank two, a diagonal misses what entries say of each other."""
    corruption = RandomMask(0.5, 0.05)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    x = 0.3 * x + 0.05 * torch.randn(x.shape, generator=generator)
    y, params = corruption.observe(x, generator)
    data = Observations(y.numpy(), corruption, {"mask": params["mask"].numpy()}, range=(-1, 1))
    config = StartConfig(components=(1,), ranks=(0, 1, 2))
    mixture, about = fit(config, Dataset(data, Units()), np.arange(800), 0)
    found = [c["criterion"] for c in about["candidates"]]
    assert found[0] > found[1] + 0.25 > found[2] + 0.5
    assert mixture.rank == 2


def test_a_candidate_without_a_criterion_is_never_kept(monkeypatch):
    criteria = [torch.nan, 0.3, torch.nan, 0.4]
    monkeypatch.setattr(starts, "score", lambda *_: Score("energy_distance", torch.full((4,), criteria.pop(0))))
    generator = torch.Generator().manual_seed(0)
    corruption = RandomMask(0.5, 0.1)
    y, params = corruption.observe(torch.randn(60, 6, generator=generator), generator)
    data = Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()}, range=(-1, 1))
    config = StartConfig(components=(1,), ranks=(1, 2, 3, 4), iterations=3)
    _mixture, about = fit(config, Dataset(data, Units()), np.arange(60), 0)
    assert about["rank"] == 2


def test_candidates_that_take_too_much_memory_are_left_out(monkeypatch):
    assert starts.footprint(4, 32, 3 * 64 * 64) <= starts.LARGEST  # colour images of 64 x 64 have all of the default
    n, d = 200, 6
    y = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    data = Dataset(Observations(y, RandomMask(0.0, 0.5), {"mask": np.ones((n, d), bool)}), Units())
    config = StartConfig(kind="mixture", components=(1, 2, 4), ranks=(1, 3), iterations=1)

    def candidates(largest: int) -> list[tuple[int, int]]:
        monkeypatch.setattr(starts, "LARGEST", largest)
        _, about = fit(config, data, np.arange(n), 0)
        return [(row["components"], row["rank"]) for row in about["candidates"]]

    assert starts.footprint(2, 3, d) == 2 * 4 * starts.footprint(1, 1, d)
    assert candidates(starts.footprint(2, 3, d)) == [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3)]
    assert candidates(starts.footprint(2, 1, d)) == [(1, 1), (2, 1)]
    assert candidates(0) == [(1, 0)]  # one component is always there


def test_the_batch_of_a_fit_shrinks_with_the_items(monkeypatch):
    n, d = 300, 6
    y = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    data = Dataset(Observations(y, RandomMask(0.0, 0.5), {"mask": np.ones((n, d), bool)}), Units())
    config = StartConfig(kind="gaussian", ranks=(2,), iterations=2)
    chunks, sizes = data.chunks, []
    monkeypatch.setattr(data, "chunks", lambda rows, size: (sizes.append(size), chunks(rows, size))[1])
    fit(config, data, np.arange(n), 0)
    assert max(sizes) == 2048
    monkeypatch.setattr(starts, "NUMBERS", 50 * d)
    sizes.clear()
    fit(config, data, np.arange(n), 0)
    assert set(sizes) == {50}
