"""Ambient Diffusion against dense linear algebra, and its runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffem import config as configuration
from diffem import seeding
from diffem.corruptions import GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.data import Observations
from diffem.denoiser import DenoiserConfig
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.loop import Progress
from diffem.mixtures import Mixture
from diffem.networks import NetworkConfig
from diffem.posterior import Posterior, from_pretrained
from diffem.rivals import guidance
from diffem.rivals.ambient import Ambient, AmbientDenoiser, AmbientSampler
from diffem.samplers import DiffusionSampler, sample_prior

DOUBLE = torch.float64
D = 4
NETWORK = NetworkConfig(kind="mlp", width=16, depth=1, embedding=16)
CASES = {"mask": RandomMask(0.25, 1e-3), "projection": RandomProjection(3, 1e-3)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> Mixture:
    generator = seeded(3)
    mean, factor = 0.5 * torch.randn(1, D, generator=generator), 0.8 * torch.randn(1, D, 2, generator=generator)
    return Mixture(torch.zeros(1), mean, factor, torch.linspace(0.05, 0.2, D)[None])


def independent() -> Mixture:
    """Another one with the same means and variances: the entries say nothing of each other."""
    true = gaussian()
    return Mixture(true.log_weights, true.mean, torch.zeros(1, D, 0), true.covariance().diagonal(dim1=1, dim2=2))


def shifted() -> Mixture:
    true = gaussian()
    return Mixture(true.log_weights, true.mean + 0.1, true.factor, true.variance)


def denoiser(corruption, start: Mixture, trained: bool = False) -> AmbientDenoiser:
    """Its network is zero unless it is said to be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AmbientDenoiser(corruption, (D,), DenoiserConfig(precondition="start"), NETWORK, start).eval()
        for parameter in made.network.parameters() if trained else ():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return made


def items(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Generator]:
    generator, true = seeded(seed), gaussian()
    x = true.mean + torch.randn(n, 2, generator=generator) @ true.factor[0].T
    return x + true.variance[0].sqrt() * torch.randn(n, D, generator=generator), generator


def corrupted(case: str, n: int, seed: int = 0):
    """Items, their observations and parameters, and those of what is corrupted further."""
    corruption = CASES[case]
    x, generator = items(n, seed)
    params = corruption.draw(n, (D,), generator)
    y = corruption.apply(x, params, generator)
    return x, y, params, corruption.thin(y, params, generator)[0]


# --- the denoiser --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("case", CASES)
def test_untrained_denoiser_is_the_mean_given_what_is_left(case, sigma):
    x, y, _, (_, hidden) = corrupted(case, 8)
    noisy = x + sigma * torch.randn(8, D, generator=seeded(1))
    found = denoiser(CASES[case], gaussian())(noisy, torch.full((8,), sigma), y, hidden).detach()
    mean, cov = gaussian().mean[0].double(), gaussian().covariance()[0].double()
    for i in range(8):
        matrix = hidden["mask"][i].double().diag() if case == "mask" else hidden["matrix"][i].double()
        matrix = matrix[matrix.abs().sum(1) > 0]
        # A~ x_t = A~ x + sigma A~ z
        gain = cov @ matrix.T @ torch.linalg.inv(matrix @ (cov + sigma**2 * torch.eye(D)) @ matrix.T)
        expected = mean + gain @ matrix @ (noisy[i].double() - mean)
        torch.testing.assert_close(found[i], expected.float(), rtol=0, atol=2e-5)


def test_a_pixel_is_hidden_in_all_its_channels():
    corruption, shape, sigma = RandomMask(0.3, 1e-3), (2, 2, 3), 0.5
    generator = seeded(4)
    factor = 0.8 * torch.randn(1, 12, 3, generator=generator)
    start = Mixture(torch.zeros(1), torch.randn(1, 12, generator=generator), factor, torch.full((1, 12), 0.1))
    made = AmbientDenoiser(corruption, shape, DenoiserConfig(precondition="start"), NETWORK, start).eval()
    params = corruption.draw(8, shape, generator)
    x_t = torch.randn(8, *shape, generator=generator)
    y = corruption.apply(x_t, params, generator)
    found = made(x_t, torch.full((8,), sigma), y, params).detach().flatten(1)
    cov = start.covariance()[0]
    for i in range(8):
        seen = params["mask"][i].expand(shape).flatten()
        gain = cov[:, seen] @ torch.linalg.inv(cov[seen][:, seen] + sigma**2 * torch.eye(int(seen.sum())))
        expected = start.mean[0] + gain @ (x_t[i].flatten() - start.mean[0])[seen]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4)
    loss = made.observed_loss(y, params, corruption.thin(y, params, generator)[0], generator)
    loss.backward()
    assert loss.isfinite()
    assert made.network.last.mean.weight.grad.abs().max() > 0


@pytest.mark.parametrize("case", CASES)
def test_what_is_hidden_is_not_shown(case):
    # neither to the reference nor to the network
    made = denoiser(CASES[case], gaussian(), trained=True)
    x, y, _, (_, hidden) = corrupted(case, 16)
    sigma = torch.full((16,), 0.7)
    found = made(x, sigma, y, hidden)
    assert (found - denoiser(CASES[case], gaussian())(x, sigma, y, hidden)).abs().mean() > 1e-2  # the network speaks
    other = torch.randn(16, D, generator=seeded(9))
    if case == "mask":
        assert torch.equal(made(torch.where(hidden["mask"], x, other), sigma, y, hidden), found)
    else:
        seen = torch.linalg.pinv(hidden["matrix"]) @ hidden["matrix"]
        torch.testing.assert_close(
            made(x + other - (seen @ other[..., None])[..., 0], sigma, y, hidden), found, rtol=0, atol=1e-4
        )
    assert torch.equal(made(x, sigma, y + 1, hidden), found)  # nor is y
    assert (made(x + other, sigma, y, hidden) - found).abs().mean() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_loss_compares_with_all_that_was_observed(case):
    _, y, params, further = corrupted(case, 64)
    seen, kept = (CASES[case].seen(y, p) for p in (params, further[1]))
    made = denoiser(CASES[case], gaussian(), trained=True)

    def loss(observed: torch.Tensor) -> float:
        return made.observed_loss(observed, params, further, seeded(1)).item()

    assert (seen & ~kept).any()
    assert loss(y + 10.0 * (seen & ~kept)) > 2 * loss(y)  # the denoiser was not shown it
    assert loss(y + 10.0 * ~seen) == loss(y)


def slopes(case: str, start: Mixture, batches: int = 60, size: int = 500) -> torch.Tensor:
    """Gradients of the loss at the untrained network, with respect to its last layer, a row for each batch."""
    made, rows = denoiser(CASES[case], start), []
    for k in range(batches):
        _, y, params, further = corrupted(case, size, seed=100 + k)
        loss = made.observed_loss(y, params, further, seeded(200 + k))
        gradients = torch.autograd.grad(loss, [made.network.last.mean.weight, made.network.last.mean.bias])
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_loss_is_least_at_the_mean_given_what_is_left(case):
    """Its expected gradient is zero there, in every direction that the last layer can move the denoiser.

    Standardised by its standard error each of its entries is about N(0, 1), so that the mean of their squares is about 1;
    they depend on each other, as if there were some ten of them.
    """

    def misfit(start: Mixture) -> tuple[float, float]:
        rows = slopes(case, start)
        z = rows.mean(0) / (rows.std(0) / len(rows) ** 0.5)
        return z.square().mean().item(), z.abs().max().item()

    mean, largest = misfit(gaussian())
    assert mean < 2.5
    assert largest < 4.5
    for wrong in (independent(), shifted()):
        mean, largest = misfit(wrong)
        assert mean > 10
        assert largest > 8


# --- its runs ------------------------------------------------------------------------------------------

SETTINGS = {
    "em": {"iterations": 1, "guard": False},
    "m_step": {"steps": 5, "first_steps": 7, "batch": 16},
    "sampler": {"kind": "ambient", "steps": 3, "options": {"strength": 0.3}},
    "denoiser": {"observation_dropout": 1.0},
    "start": {"components": [1], "ranks": [2], "iterations": 10},
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "prior": {"steps": 5, "sampler_steps": 4},
}
N = 40
ALL = np.arange(N)


def settings(**sections) -> configuration.Config:
    return configuration.from_dict({k: {**SETTINGS.get(k, {}), **sections.get(k, {})} for k in SETTINGS | sections})


def observations(case: str, poison: np.ndarray | None = None) -> Observations:
    _, y, params, _ = corrupted(case, N)
    if poison is not None:
        y[poison] *= 10
    return Observations(y.numpy(), CASES[case], {k: v.numpy() for k, v in params.items()}, range=(-2, 2))


def drawn(loaded: Posterior, data: Observations, rows: np.ndarray, seeds: torch.Tensor) -> torch.Tensor:
    """A draw for each of the observations `rows`."""
    return loaded.sample(*data.batch(rows), seeds=seeds)[0]


def bare(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(out: Path, case: str = "mask", poison: np.ndarray | None = None, **sections) -> Ambient:
    run = Ambient(settings(**sections), observations(case, poison), out, batch=16, checkpoint_minutes=0)
    list(run.iterate())
    return run


@pytest.fixture(scope="module", params=CASES)
def whole(request, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("ambient") / request.param
    train(out, request.param)
    return out, request.param


def test_run_saves_a_posterior_and_a_prior(whole):
    out, case = whole
    data, seeds = observations(case), seeding.item_seeds(0, 1, "e_step", ALL)
    posterior, prior = (from_pretrained(out / name) for name in ("posterior", "prior"))
    for loaded in (posterior, prior):
        assert isinstance(loaded.sampler, AmbientSampler)
        assert isinstance(loaded.sampler.denoiser, AmbientDenoiser)
        assert loaded.sampler.denoiser.network.last.mean.weight.abs().max() > 0  # it has been trained
    assert prior.sampler.width == 0  # the head of variances has not
    x, z = drawn(posterior, data, ALL, seeds), sample_prior(prior.sampler, seeds)
    for draws in (x, z):
        assert draws.shape == (N, D)
        assert draws.isfinite().all()
        assert draws.std() > 0.1
    np.testing.assert_allclose(x, np.load(out / "reconstructions.npy"), rtol=1e-4, atol=1e-4)


def test_draws_do_not_depend_on_the_batch(whole):
    out, case = whole
    data, loaded, seeds = observations(case), from_pretrained(out / "posterior"), seeding.item_seeds(0, 0, "user", ALL)
    x, z = drawn(loaded, data, ALL, seeds), sample_prior(loaded.sampler, seeds)
    for rows in np.split(ALL, range(7, N, 7)):
        torch.testing.assert_close(drawn(loaded, data, rows, seeds[rows]), x[rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample_prior(loaded.sampler, seeds[rows]), z[rows], rtol=1e-4, atol=1e-4)


def test_posterior_is_guided_by_all_that_was_observed(whole, monkeypatch):
    out, case = whole
    loaded, calls, shown, dps = from_pretrained(out / "posterior"), [], [], guidance.dps
    monkeypatch.setattr(guidance, "dps", lambda *arguments: (calls.append(arguments), dps(*arguments))[1])
    loaded.sampler.denoiser.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[3]))
    data, seeds = observations(case), seeding.item_seeds(0, 0, "user", ALL)
    _, params = data.batch(ALL)
    drawn(loaded, data, ALL, seeds)
    name = "mask" if case == "mask" else "matrix"
    assert len(calls) == len(shown) == 4
    assert all(torch.equal(call[3][name], params[name]) for call in calls)
    given, kept = params[name] != 0, shown[0][name] != 0
    assert all(torch.equal(hidden[name], shown[0][name]) for hidden in shown)  # drawn once
    assert (given | ~kept).all()
    assert 0.1 < (given & ~kept).float().mean() / given.float().mean() < 0.6
    calls.clear()
    sample_prior(loaded.sampler, seeds)
    assert not calls


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["m_step", "e_step", "commit", "finish"])
def test_interrupted_run_goes_on_bitwise(where, whole, tmp_path, monkeypatch):
    out, case = whole

    def progress(made: Progress) -> None:
        if made.step == where and made.done == {"m_step": 5, "e_step": 32}[where] and made.iteration == 1:
            raise Interrupted

    def save(self, folder, scores=None, original=Posterior.save_pretrained):
        name = Path(folder).name
        if isinstance(self.sampler, AmbientSampler) and name == {"commit": "posterior", "finish": "prior"}.get(where):
            raise Interrupted
        original(self, folder, scores)

    run = Ambient(settings(), observations(case), tmp_path, progress=progress, batch=16, checkpoint_minutes=0)
    with monkeypatch.context() as patched:
        patched.setattr(Posterior, "save_pretrained", save)
        with pytest.raises(Interrupted):
            list(run.iterate())
    assert run.state.updates == (5 if where == "m_step" else 0 if where == "finish" else 7)
    resumed = train(tmp_path, case)
    assert resumed.state.step == "done"
    for name in ("posterior/model.safetensors", "prior/model.safetensors", "reconstructions.npy"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name
    assert not (tmp_path / "next.npy").exists()


def test_held_out_observations_do_not_train(tmp_path):
    held_out = np.concatenate(observations("mask").split(0)[1:])
    assert len(held_out) == 4
    one, two = train(tmp_path / "one"), train(tmp_path / "two", poison=held_out)
    other = train(tmp_path / "other", poison=one.train[:1])
    models = [load_file(run.run.folder / "posterior" / "model.safetensors") for run in (one, two, other)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert any(not torch.equal(models[0][k], models[2][k]) for k in models[0] if k.startswith("denoiser.network."))


def test_it_trains_once_for_the_steps_of_the_first_iteration(whole):
    rows = bare(whole[0])
    assert [row["examples"] for row in rows] == [0, 7 * 16, 0]
    assert [row.get("final") for row in rows] == [None, None, 1]
    assert rows[2]["score"] != rows[1]["score"]  # of test, not of validation observations


def test_em_starts_from_it(whole, tmp_path):
    out, case = whole
    plain = settings(
        start={"kind": "run", "run": str(out)}, em={"iterations": 2}, sampler={"kind": "diffusion", "options": {}}
    )
    em = DiffEM(plain, observations(case), tmp_path)
    rows = list(em.iterate())
    assert [row["iteration"] for row in rows][:3] == [0, 1, 2]
    start = from_pretrained(tmp_path / "start")
    assert isinstance(start.sampler, AmbientSampler)
    assert rows[0]["score"] == pytest.approx(bare(out)[1]["score"], rel=1e-4)
    last = from_pretrained(tmp_path / "posterior")
    assert type(last.sampler) is DiffusionSampler
    draws = drawn(last, observations(case), ALL, seeding.item_seeds(0, 0, "user", ALL))
    assert draws.isfinite().all()


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", [GaussianBlur(0.7, 0.1), GaussianNoise(0.1)])
def test_other_corruptions_are_refused(corruption, tmp_path):
    with pytest.raises(DiffemError) as caught:
        Ambient(settings(), Observations(np.zeros((20, D), np.float32), corruption, {}), tmp_path / "run")
    name = type(corruption).__name__
    assert str(caught.value) == f"ambient: needs RandomMask or RandomProjection, got {name}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sections",
    [
        {"sampler": {"kind": "diffusion"}},
        {"sampler": {"kind": "mmps"}},
        {"sampler": {"kind": "dps"}},
        {"em": {"iterations": 2}},
    ],
)
def test_other_settings_are_refused(sections, tmp_path):
    with pytest.raises(DiffemError) as caught:
        Ambient(settings(**sections), observations("mask"), tmp_path / "run")
    assert str(caught.value) == "ambient: needs sampler.kind ambient and em.iterations 1"
    assert not (tmp_path / "run").exists()
