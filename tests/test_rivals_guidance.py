"""Guided sampling against dense linear algebra: with the exact denoiser of a Gaussian, moment matching is exact."""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
import torch

from diffem import config as configuration
from diffem import judging, samplers, seeding
from diffem.corruptions import BlackBox, GaussianBlur, GaussianNoise, LinearCorruption, RandomMask, RandomProjection
from diffem.data import Observations
from diffem.denoiser import Denoiser, DenoiserConfig
from diffem.diagnostics import Score
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.networks import NetworkConfig
from diffem.posterior import Posterior, from_pretrained
from diffem.rivals import guidance
from diffem.samplers import DiffusionSampler, SamplerConfig, kind_of, sample_prior, trained_kind
from diffem.units import Units

DOUBLE = torch.float64
D = 5
NETWORK = NetworkConfig(kind="mlp", width=16, depth=1, embedding=16)
CASES = {
    "mask": RandomMask(0.5, 0.2),
    "blur": GaussianBlur(0.7, 0.2),
    "projection": RandomProjection(3, 0.2),
}
SIGMA_MAX = 30.0


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(corruption=None) -> Mixture:
    """One component, with distinct eigenvalues, in the corruption's basis."""
    generator = seeded(3)
    mean, factor = 0.5 * torch.randn(1, D, generator=generator), 0.6 * torch.randn(1, D, 2, generator=generator)
    basis = None if corruption is None else corruption.basis((D,))
    return Mixture(torch.zeros(1), mean, factor, torch.linspace(0.05, 0.5, D)[None], basis)


def moments(mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the entries."""
    there = torch.eye(D, dtype=DOUBLE)
    if mixture.basis is not None:
        there = mixture.basis.synthesise(there)  # row j: the j-th basis vector
    return mixture.mean[0].double() @ there, there.T @ mixture.covariance()[0].double() @ there


def operator(corruption: LinearCorruption, params: dict[str, torch.Tensor], i: int = 0) -> torch.Tensor:
    many = {k: v[i : i + 1].expand(D, *v.shape[1:]) for k, v in params.items()}
    return corruption.forward(torch.eye(D, dtype=DOUBLE), many).T  # column j: what the j-th entry makes


def conditioned(mean, cov, matrix, value, noise):
    """Mean and covariance of N(mean, cov), given that value = matrix x + N(0, diag(noise))."""
    gain = cov @ matrix.T @ torch.linalg.inv(matrix @ cov @ matrix.T + torch.diag(noise))
    return mean + gain @ (value - matrix @ mean), cov - gain @ matrix @ cov


def denoiser(corruption, start: Mixture | None = None, **settings) -> Denoiser:
    """Its network is zero, so that it is the exact denoiser of its start."""
    config = DenoiserConfig(precondition="start", **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(corruption, (D,), config, NETWORK, start or gaussian(corruption)).eval()


def sampler(corruption, width: float = 0.0, trained: bool = False, kind: str = "diffusion", **settings):
    """A sampler in model units; `corruption` is in these, too."""
    model = denoiser(corruption, gaussian(corruption), sigma_min=0.05, sigma_max=SIGMA_MAX)
    if trained:
        generator = seeded(1)
        for parameter in model.network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return kind_of(kind, "kind")(model, SamplerConfig(kind, width=width, **settings))


def observed(corruption, n: int, seed: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """n observations, all different."""
    generator = seeded(seed)
    params = corruption.draw(n, (D,), generator)
    return corruption.apply(torch.randn(n, D, generator=generator), params, generator), params


def keys(n: int) -> torch.Tensor:
    return seeding.item_seeds(0, 0, "user", torch.arange(n))


# --- the moment-matched mean ---------------------------------------------------------------------------


def matched_and_exact(case: str, sigma: float, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """guidance.mmps of 7 items, and E[x | x_t, y] by dense linear algebra."""
    corruption, n = CASES[case], 7
    y, params = observed(corruption, n)
    x_t = torch.randn(n, D, generator=seeded(6)) * (1 + sigma)
    exact = denoiser(corruption)
    withheld = torch.ones(n, dtype=torch.bool)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return exact(x, torch.full((n,), sigma), y, params, withheld)

    matched = guidance.mmps(mean, x_t, torch.tensor(sigma), y, params, corruption, **settings)
    prior, expected = moments(gaussian(corruption)), []
    for i in range(n):
        matrix = torch.cat((operator(corruption, params, i), torch.eye(D, dtype=DOUBLE)))
        value = torch.cat((y[i], x_t[i])).double()
        noise = torch.cat((torch.full((y.shape[1],), corruption.noise**2), torch.full((D,), sigma**2))).double()
        expected.append(conditioned(*prior, matrix, value, noise)[0])
    return matched, torch.stack(expected).float()


@pytest.mark.parametrize("solver", ["gmres", "cg"])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("case", CASES)
def test_mmps_is_the_posterior_mean_of_a_gaussian(case, sigma, solver):
    matched, exact = matched_and_exact(case, sigma, solver=solver, iterations=6)
    torch.testing.assert_close(matched, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["gmres", "cg"])
@pytest.mark.parametrize("case", CASES)
def test_mmps_needs_an_iteration_for_each_eigenvalue(case, solver):
    # A Cov[x | x_t] A^T has several: each iteration brings the mean nearer, and the first is far off
    errors = []
    for iterations in (1, 2, 6):
        matched, exact = matched_and_exact(case, 1.0, solver=solver, iterations=iterations)
        errors.append((matched - exact).abs().max().item())
    assert errors[0] > 0.5
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] > 0.1
    assert errors[2] < 1e-4


def test_nothing_seen_moves_nothing():
    corruption, sigma = CASES["mask"], torch.tensor(0.7)
    params = {"mask": torch.zeros(2, D, dtype=torch.bool)}
    params["mask"][1, 2] = True
    y = torch.tensor([[0.0] * D, [0.0, 0.0, 3.0, 0.0, 0.0]])
    x_t, exact = torch.randn(2, D, generator=seeded(0)), denoiser(corruption)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return exact(x, sigma.expand(2), y, params, torch.ones(2, dtype=torch.bool))

    for guided in (
        guidance.mmps(mean, x_t, sigma, y, params, corruption, "gmres", 4),
        guidance.mmps(mean, x_t, sigma, y, params, corruption, "cg", 4),
        guidance.dps(mean, x_t, y, params, corruption, 1.0, torch.tensor(0.5)),
    ):
        torch.testing.assert_close(guided[0], mean(x_t)[0])
        assert (guided[1] - mean(x_t)[1]).abs().max() > 0.1


def test_dps_steps_down_the_distance():
    # of a Gaussian: the mean is affine in x_t with slope C (C + sigma^2)^-1
    corruption, sigma, tau = CASES["projection"], 0.8, torch.tensor(0.3)
    y, params = observed(corruption, 7)
    x_t, exact = torch.randn(7, D, generator=seeded(6)), denoiser(corruption)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return exact(x, torch.full((7,), sigma), y, params, torch.ones(7, dtype=torch.bool))

    _, cov = moments(gaussian())
    slope = cov @ torch.linalg.inv(cov + sigma**2 * torch.eye(D))
    error = (y - corruption.forward(mean(x_t), params)).double()
    gradient = -corruption.adjoint(error / error.norm(dim=1, keepdim=True), params) @ slope
    expected = mean(x_t) - 0.6 / tau * gradient.float()
    torch.testing.assert_close(guidance.dps(mean, x_t, y, params, corruption, 0.6, tau), expected, rtol=0, atol=1e-5)


# --- its draws -----------------------------------------------------------------------------------------

STEPS, DRAWN = 96, 2000
FIXED = {
    "mask": {"mask": torch.tensor([[True, False, True, True, False]])},
    "projection": {
        "matrix": torch.tensor([[[0.6, 0.0, -0.8, 0.0, 0.0], [0.0, 0.5, 0.5, 0.5, -0.5], [0.0, 0.0, 0.6, 0.0, 0.8]]])
    },
}


def posterior_of(case: str):
    """An observation that is unlikely a priori, its parameters, and the posterior's mean and covariance."""
    corruption, params = CASES[case], FIXED[case]
    mean, cov = moments(gaussian(corruption))
    matrix = operator(corruption, params)
    y = matrix @ (mean + torch.tensor([0.8, -0.6, 0.4, 0.9, -1.2], dtype=DOUBLE))
    noise = torch.full((len(y),), corruption.noise**2, dtype=DOUBLE)
    return y.float()[None], params, *conditioned(mean, cov, matrix, y, noise)


def draws(case: str, **settings) -> torch.Tensor:
    y, params, *_ = posterior_of(case)
    many = {k: v.expand(DRAWN, *v.shape[1:]) for k, v in params.items()}
    return sampler(CASES[case], steps=STEPS, **settings).draw(y.expand(DRAWN, -1), many, keys(DRAWN)).double()


@cache
def matched_draws(case: str) -> torch.Tensor:
    return draws(case, kind="mmps", options={"iterations": 5 if case == "mask" else 3})


def off(x: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the draws' mean is from `mean`, in standard deviations, and their covariance from `cov`, in products of two."""
    std = cov.diag().sqrt()
    return (x.mean(0) - mean).abs() / std, (torch.cov(x.T) - cov).abs() / (std[:, None] * std)


def tolerances(mean: torch.Tensor, cov: torch.Tensor) -> tuple[float, torch.Tensor]:
    """For :func:`off`: 4 Monte Carlo standard errors, and what the sampler is known to leave.

    It starts at N(0, sigma_max^2), without the prior's mean; DDPM of so many steps loses 5 % of the variance.
    """
    std = cov.diag().sqrt()
    correlation = cov / (std[:, None] * std)
    start = moments(gaussian())[0].abs().max() / SIGMA_MAX
    return (4 / math.sqrt(DRAWN) + start).item(), 4 * ((1 + correlation.square()) / DRAWN).sqrt() + 0.05


@pytest.mark.parametrize("case", FIXED)
def test_mmps_draws_the_posterior(case):
    *_, mean, cov = posterior_of(case)
    mean_off, cov_off = off(matched_draws(case), mean, cov)
    mean_tolerance, cov_tolerance = tolerances(mean, cov)
    assert (mean_off < mean_tolerance).all()
    assert (cov_off < cov_tolerance).all()


@pytest.mark.parametrize("case", FIXED)
def test_mmps_draws_what_the_exact_conditional_denoiser_draws(case):
    # the same draws one by one, with the same seeds: there the network is shown y
    torch.testing.assert_close(matched_draws(case), draws(case), rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3, 1.0, 3.0])
def test_dps_is_biased(strength):
    """With the exact denoiser, where moment matching is within the tolerances, DPS is far outside of them.

    No strength mends it: the mean of some entry is always off by a posterior standard deviation or more. A weak one does
    not reach y. In between what y says is believed too much, and seen entries keep 10 to 25 % of their posterior
    variance. A strong one shakes them, since the gradient of a distance does not fall with the distance: they have 2 to
    20 times their posterior variance.
    """
    *_, mean, cov = posterior_of("mask")
    seen = FIXED["mask"]["mask"][0]
    x = draws("mask", kind="dps", options={"strength": strength})
    mean_off, cov_off = off(x, mean, cov)
    mean_tolerance, cov_tolerance = tolerances(mean, cov)
    assert mean_off.max() > 5 * mean_tolerance
    assert (cov_off / cov_tolerance).max() > 3
    ratio = (x.var(0)[seen].sum() / cov.diag()[seen].sum()).item()
    assert ratio < 0.5 if strength in (0.1, 0.3) else ratio > 2


GUIDED = [
    {"kind": "mmps", "options": {"iterations": 3}},
    {"kind": "mmps", "options": {"iterations": 2, "solver": "cg"}},
    {"kind": "dps", "options": {"strength": 0.3}},
]


@pytest.mark.parametrize("settings", GUIDED)
@pytest.mark.parametrize("case", CASES)
def test_draws_do_not_depend_on_the_batch(case, settings):
    of, n = sampler(CASES[case], trained=True, steps=12, **settings), 30
    y, params = observed(CASES[case], n)
    whole = of.draw(y, params, keys(n))
    parts = [of.draw(y[i], {k: v[i] for k, v in params.items()}, keys(n)[i]) for i in torch.arange(n).split(7)]
    assert whole.isfinite().all()
    assert whole.std() > 0.1
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", GUIDED)
def test_the_network_of_a_guided_sampler_is_not_shown_y(settings, monkeypatch):
    of, n = sampler(CASES["mask"], trained=True, steps=3, **settings), 4
    y, params = observed(CASES["mask"], n)
    shown = []
    of.denoiser.network.register_forward_hook(lambda module, inputs, output: shown.append(inputs[0]))
    draws = of.draw(y, params, keys(n))
    first = [v.clone() for v in shown[0]]
    shown.clear()
    assert not torch.allclose(draws, of.draw(y + params["mask"], params, keys(n)), atol=0.05)  # but y moves the draws
    assert len(first) == 6  # x_t, the reference's mean and spread, y, mask, whether it was given
    assert all(torch.equal(a, b) for a, b in zip(first, shown[0], strict=True))
    assert all(not v.any() for v in shown[0][3:])


@pytest.mark.parametrize("width", [0.0, 1.0])
@pytest.mark.parametrize("settings", GUIDED)
def test_prior_samples_ignore_y(settings, width, monkeypatch):
    corruption, n = CASES["mask"], 9
    plain = sampler(corruption, width, trained=True, steps=5)
    of = sampler(corruption, width, trained=True, steps=5, **settings)
    y, params = observed(corruption, n)
    assert not torch.allclose(of.draw(y, params, keys(n)), plain.draw(y, params, keys(n)), atol=0.05)
    for name in ("mmps", "dps"):
        monkeypatch.setattr(guidance, name, None)  # called by none of what follows
    assert torch.equal(sample_prior(of, keys(n)), sample_prior(plain, keys(n)))
    withheld = torch.ones(n, dtype=torch.bool)
    one, two = (of.draw(c * y, params, keys(n), withheld) for c in (1, 100))
    assert torch.equal(one, two)


# --- what it costs -------------------------------------------------------------------------------------

COSTS = [({}, 0), *zip(GUIDED, (4, 3, 1), strict=True)]


@pytest.mark.parametrize(("settings", "derivatives"), COSTS)
def test_evaluations_are_those_that_a_spy_counts(settings, derivatives):
    of, n, steps = sampler(CASES["projection"], trained=True, steps=4, **settings), 3, 4
    counts = {"forward": 0, "derivative": 0}

    def count(name: str) -> None:
        counts[name] += 1

    def listen(module, inputs, output) -> None:
        count("forward")
        if (mean := output[0]).requires_grad:
            mean.register_hook(lambda gradient: count("derivative"))

    of.denoiser.network.register_forward_hook(listen)
    of.draw(*observed(CASES["projection"], n), keys(n))
    assert counts == {"forward": steps + 1, "derivative": (steps + 1) * derivatives}
    assert of.evaluations(of.settings) == counts["forward"] + 2 * counts["derivative"]


SETTINGS = {
    "em": {"iterations": 1},
    "m_step": {"steps": 4, "first_steps": 4, "batch": 8},
    "start": {"components": [1], "ranks": [1], "iterations": 10},
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "prior": {"kind": "joint"},
    "denoiser": {"observation_dropout": 1.0},
}


@pytest.mark.parametrize(("settings", "derivatives"), COSTS)
def test_a_guided_run(settings, derivatives, tmp_path, monkeypatch):
    corruption = CASES["mask"]
    y, params = observed(corruption, 40)
    data = Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()}, range=(-2, 2))
    sections = configuration.from_dict({**SETTINGS, "sampler": {"steps": 3, **settings}})

    def narrow(of, *arguments) -> Score:  # better than the start, and over-confident at any width
        ones, width = torch.ones(6), getattr(of, "width", 0.0)
        return Score("crps", (2.0 - (width > 0)) * ones, (0.5 + width / 100) * ones, ones, 0 * ones)

    monkeypatch.setattr(judging, "score", narrow)
    rows = list(DiffEM(sections, data, tmp_path).iterate())
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert rows[1]["network_evaluations"] == 3 * 4 * 8 + 40 * 4 * (1 + 2 * derivatives)
    # only what is not guided puts variance back, and can be widened
    assert (rows[2]["final"], rows[2]["width"]) == (1, 1.0 if settings else samplers.WIDTHS[-1])
    assert rows[2]["network_evaluations"] == (0 if settings else 40 * 4)
    loaded = from_pretrained(tmp_path / "posterior")
    assert (loaded.sampler.kind, loaded.sampler.width) == (settings.get("kind", "diffusion"), rows[2]["width"])
    seeds = seeding.item_seeds(0, *((1, "e_step") if settings else (2, "end")), np.arange(40))
    x = loaded.sample(*data.batch(np.arange(40)), seeds=seeds)[0]
    np.testing.assert_allclose(x, np.load(tmp_path / "reconstructions.npy"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", GUIDED)
def test_save_and_load(settings, tmp_path):
    corruption, units, n = CASES["mask"], Units(0.5, 2.0), 9
    of = Posterior(sampler(corruption.scaled(units), 0.7, trained=True, steps=3, **settings), corruption, units)
    of.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["sampler"]
    assert {k: stored[k] for k in settings} == settings
    loaded = from_pretrained(tmp_path)
    assert type(loaded.sampler) is type(of.sampler)
    assert loaded.sampler.settings == of.sampler.settings
    assert (loaded.units, loaded.sampler.width) == (units, 0.7)
    y, params = observed(corruption, n)
    one, two = (posterior.sample(y, params, seeds=keys(n)) for posterior in (of, loaded))
    assert torch.equal(one, two)
    assert torch.equal(sample_prior(of.sampler, keys(n)), sample_prior(loaded.sampler, keys(n)))


# --- what is refused -----------------------------------------------------------------------------------

UNSEEN = DenoiserConfig(observation_dropout=1.0)
SOLVER = "sampler.options: solver must be gmres or cg, with iterations at least 1"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"kind": "mmp"},
            "sampler.kind: unknown sampler 'mmp'; did you mean 'mmps'? (known: ambient, diffusion, dps, mixture, mmps, observation); is its module imported?",
        ),
        ({"kind": "mixture"}, "sampler.kind: mixture has no network that could be trained; use diffusion"),
        ({"kind": "mmps", "options": {"solver": "lu"}}, SOLVER),
        ({"kind": "mmps", "options": {"iterations": 0}}, SOLVER),
        (
            {"kind": "mmps", "options": {"iteration": 2}},
            "sampler.options: iteration: mmps has no such option; did you mean 'iterations'? (known: iterations, solver)",
        ),
        (
            {"kind": "dps", "options": {"solver": "cg"}},
            "sampler.options: solver: dps has no such option; (known: strength)",
        ),
        ({"kind": "dps", "options": {"strength": "1"}}, "sampler.options: strength: must be like 1.0, got '1'"),
        ({"options": {"strength": 1.0}}, "sampler.options: strength: diffusion has no options"),
        ({"steps": 0}, "sampler: steps must be from 1 to 3,000, width from 0 to 100"),
    ],
)
def test_settings_that_are_refused(settings, text):
    def choose() -> None:
        config = SamplerConfig(**settings)
        trained_kind(config).suits(CASES["mask"], config, UNSEEN)

    with pytest.raises(DiffemError) as caught:
        choose()
    assert str(caught.value) == text


@pytest.mark.parametrize("kind", ["mmps", "dps"])
def test_a_black_box_cannot_be_guided(kind):
    corruption = BlackBox(torch.sign, "torch:sign").scaled(Units())
    guided, plain = SamplerConfig(kind), SamplerConfig()
    with pytest.raises(DiffemError) as caught:
        kind_of(kind, "kind").suits(corruption, guided, UNSEEN)
    assert str(caught.value) == f"sampler.kind: {kind} needs a linear-Gaussian corruption; use diffusion"
    DiffusionSampler.suits(corruption, plain, UNSEEN)
    model = Denoiser(corruption, (D,), DenoiserConfig(precondition="plain"), NETWORK)
    assert DiffusionSampler(model, plain).draw(torch.ones(2, D), {}, keys(2)).shape == (2, D)


def test_noise_alone_can_be_guided():
    corruption = GaussianNoise(0.3)
    y = torch.randn(6, D, generator=seeded(0))
    one = sampler(corruption, steps=8, kind="mmps", options={"iterations": 5}).draw(y, {}, keys(6))
    torch.testing.assert_close(one, sampler(corruption, steps=8).draw(y, {}, keys(6)), rtol=0, atol=1e-4)


def refused(corruption, tmp_path, **sections) -> str:
    """What a run says; it has made no folder."""
    data = Observations(np.random.default_rng(0).random((20, 4)), corruption, range=(0, 1))
    with pytest.raises(DiffemError) as error:
        DiffEM(configuration.from_dict({**SETTINGS, **sections}), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_guidance_wants_a_network_that_sees_no_observation(tmp_path):
    said = refused(GaussianNoise(0.3), tmp_path, sampler={"kind": "mmps"}, denoiser={})
    assert said == (
        "sampler.kind: mmps guides a network that sees no observation; set denoiser.observation_dropout to 1"
    )


def test_a_run_refuses_guidance_through_a_black_box(tmp_path):
    said = refused(BlackBox(lambda x: x, "m:f"), tmp_path, sampler={"kind": "dps"})
    assert said == "sampler.kind: dps needs a linear-Gaussian corruption; use diffusion"
