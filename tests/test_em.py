"""The algorithm: it survives kill -9, keeps held-out observations apart, and its sampler is right where that is known."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffem import config as configuration
from diffem import em as em_module
from diffem import seeding, starts
from diffem.corruptions import GaussianNoise, RandomMask
from diffem.denoisers import Denoiser, DenoiserConfig
from diffem.diagnostics import Score, crps, score
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.networks import NetworkConfig
from diffem.observations import Observations
from diffem.posteriors import (
    DiffusionPosterior,
    MixturePosterior,
    ObservationPosterior,
    SamplerConfig,
    from_pretrained,
)

SETTINGS = {
    "em": {"iterations": 3, "gate": 1e9, "score_draws": 2},
    "m_step": {"steps": 5, "first_steps": 5, "batch": 16, "checkpoint": 2},
    "e_step": {"batch": 16},
    "sampler": {"steps": 3},
    "start": {"components": [1], "ranks": [2], "iterations": 20},
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
}
SHAPE = (1, 4, 4)
NETWORK = NetworkConfig(kind="mlp", width=16, depth=1, embedding=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**sections) -> configuration.Config:
    return configuration.from_dict({k: {**v, **sections.get(k, {})} for k, v in SETTINGS.items()})


def observations(n: int = 60, poison: np.ndarray | None = None) -> Observations:
    """Masked items from a Gaussian of rank 2."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(2, 16, generator=generator)
    x = (torch.randn(n, 2, generator=generator) @ factor + 0.1 * torch.randn(n, 16, generator=generator)).view(
        n, *SHAPE
    )
    corruption = RandomMask(0.5, 0.05)
    params = corruption.draw(n, SHAPE, generator)
    y = corruption.apply(x, params, generator).numpy()
    if poison is not None:
        y[poison] *= 1e6
    return Observations(y, corruption, {k: v.numpy() for k, v in params.items()})


def train(out: Path, data: Observations | None = None, **sections) -> DiffEM:
    em = DiffEM(settings(**sections), data or observations(), out)
    for _row in em.iterate():
        pass
    return em


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(out: str, where: str) -> None:
    """Run by a process of its own."""
    torch.set_num_threads(1)

    def progress(what: str, done: int, total: int) -> None:
        if where == "e_step" and what == "iteration 2, E-step":
            assert done == 16
            die()

    em = DiffEM(settings(), observations(), out, progress=progress)
    corrupt, save = em._corrupt_again, DiffusionPosterior.save_pretrained

    def corrupt_or_die(x, generator):
        if where == "m_step" and (em.iteration, em.step) == (2, 3):
            die()
        return corrupt(x, generator)

    def save_or_die(self, folder):
        if where == "commit" and em.iteration == 2:
            die()
        save(self, folder)

    em._corrupt_again, DiffusionPosterior.save_pretrained = corrupt_or_die, save_or_die
    list(em.iterate())


def bare(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("em") / "whole"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(out)
    torch.set_num_threads(before)
    return out


# --- a run and its resumption --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["m_step", "e_step", "commit"])
def test_kill_nine(where, whole, tmp_path):
    out = tmp_path / "run"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_em; test_em.run_and_die({str(out)!r}, {where!r})"
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(bare(out)) == 2  # the start and the first iteration
    assert (out / "next.npy").exists() == (where == "e_step")
    train(out)
    for name in ("posterior/model.safetensors", "prior/model.safetensors", "reconstructions.npy"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert bare(out) == bare(whole)
    assert not [p for p in out.rglob("*") if p.name == "next.npy" or p.suffix == ".tmp"]


def test_metrics_rows(whole):
    rows = bare(whole)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert all(row["accepted"] for row in rows)
    assert [row["examples"] for row in rows] == [0, 80, 80, 80]
    assert all(math.isfinite(row["score"]) and row["ratio"] > 0 for row in rows)


def test_finished_run_does_nothing(whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}
    train(whole)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}


@pytest.mark.parametrize("batch", [7, 256])
def test_rows_do_not_depend_on_the_batch(batch, whole):
    data, sampler = observations(), from_pretrained(whole / "posterior")
    stored = np.load(whole / "reconstructions.npy")
    for chunk in data.chunks(size=batch):
        x = sampler.sample(*data.batch(chunk), seeding.item_seeds(0, 3, "e_step", chunk))
        np.testing.assert_allclose(x.numpy(), stored[chunk], rtol=1e-4, atol=1e-5)


def test_row_belongs_to_its_observation(whole):
    data, x = observations(), np.load(whole / "reconstructions.npy")
    assert x.shape == data.y.shape
    assert x.dtype == np.float32
    y, params = data.batch(np.arange(len(data)))
    mask = np.broadcast_to(params["mask"].numpy(), x.shape)
    distance = [[np.abs(x[i] - y[j].numpy())[mask[j]].mean() for j in range(len(x))] for i in range(len(x))]
    own = np.diag(distance)
    assert own.max() < 0.5  # held-out ones included
    assert (np.argmin(distance, 0) == np.arange(len(x))).all()


def test_changed_configuration_is_refused(whole):
    with pytest.raises(DiffemError) as caught:
        DiffEM(settings(m_step={"steps": 6}), observations(), whole)
    assert str(caught.value) == (
        f"{whole / 'config.yaml'}: m_step.steps differs from this run's; "
        "resume with the same configuration or use another --out"
    )
    with pytest.raises(DiffemError, match=r"config\.yaml: facts\.observations differs from this run's;"):
        DiffEM(settings(), observations(50), whole)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_checkpoint(share, whole, tmp_path):
    for name in ("config.yaml", "reconstructions.npy"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    content, file = (whole / "checkpoint.safetensors").read_bytes(), tmp_path / "checkpoint.safetensors"
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DiffemError) as caught:
        list(DiffEM(settings(), observations(), tmp_path).iterate())
    assert str(caught.value) == f"{file}: is truncated or not a checkpoint of diffem; remove it to start again"


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DiffemError, match=r"holds thesis\.tex but no config\.yaml, so it is not a run"):
        DiffEM(settings(), observations(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# --- held-out observations and the gate ----------------------------------------------------------------


def test_held_out_observations_do_not_train(tmp_path, monkeypatch):
    held_out = observations().split(0)[1]
    fitted, fit = [], starts.fit
    monkeypatch.setattr(
        starts, "fit", lambda config, data, rows, *rest: (fitted.append(rows), fit(config, data, rows, *rest))[1]
    )
    sharp = {"dispersion_first": 0.0, "dispersion_last": 0.0}  # residual variances are measured on held-out ones
    one = train(tmp_path / "one", e_step=sharp)
    two = train(tmp_path / "two", observations(poison=held_out), e_step=sharp)
    assert len(held_out) == 6
    assert not set(np.concatenate(fitted)) & set(held_out)
    assert one.scaling == two.scaling
    assert all(row["accepted"] for row in one.rows + two.rows)
    for name in ("start", "posterior", "prior"):
        a, b = (load_file(em.run.folder / name / "model.safetensors") for em in (one, two))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a if k != "residual"), name
    x, z = (np.load(em.run.folder / "reconstructions.npy") for em in (one, two))
    assert np.array_equal(x[one.train], z[one.train])
    assert not np.array_equal(x[held_out], z[held_out])


def test_gate_refuses_what_is_worse(tmp_path, monkeypatch):
    calls = []

    def worse(*arguments):
        calls.append(arguments)
        return Score("crps", torch.linspace(0, 1, 6) * (1 + 0.1 * len(calls)) + len(calls), 1.0)

    monkeypatch.setattr(em_module, "score", worse)
    em = DiffEM(settings(em={"gate": 2.0}), observations(), tmp_path)
    iterator = em.iterate()
    next(iterator)
    before = (tmp_path / "reconstructions.npy").read_bytes()
    model = (tmp_path / "posterior" / "model.safetensors").read_bytes()
    assert [row["accepted"] for row in iterator] == [False] * 3
    assert [row["accepted"] for row in bare(tmp_path)] == [True, False, False, False]
    assert json.loads((tmp_path / "posterior" / "config.json").read_text())["kind"] == "mixture"
    assert (tmp_path / "posterior" / "model.safetensors").read_bytes() == model
    assert (tmp_path / "reconstructions.npy").read_bytes() == before
    assert not (tmp_path / "next.npy").exists()


# --- the sampler, where the answer is known ------------------------------------------------------------


def gaussian(shrink: float = 1.0) -> Mixture:
    generator = torch.Generator().manual_seed(3)
    mean = 0.5 * torch.randn(1, 6, generator=generator)
    factor = 0.5 * torch.randn(1, 6, 2, generator=generator)
    return Mixture(torch.zeros(1), mean, shrink * factor, shrink**2 * torch.full((1, 6), 0.05), None)


def covariance(mixture: Mixture) -> torch.Tensor:
    return mixture.factor[0] @ mixture.factor[0].T + mixture.variance[0].diag()


def diffusion(corruption, steps: int, dispersion: float, scaling=(0.0, 1.0), start=None) -> DiffusionPosterior:
    denoiser = Denoiser(
        corruption.scaled(*scaling), (6,), DenoiserConfig(precondition="start"), NETWORK, start or gaussian()
    )
    return DiffusionPosterior(
        corruption, (6,), scaling, denoiser.eval(), SamplerConfig(steps=steps), NETWORK, dispersion=dispersion
    )


CASES = [
    (GaussianNoise(0.3), {}, torch.ones(6, dtype=torch.bool)),
    (RandomMask(0.5, 0.1), {"mask": torch.tensor([[True, False, False, True, False, True]])}, None),
]


def draws_and_truth(case: int, steps: int, dispersion: float, n: int = 6000):
    corruption, params, seen = CASES[case]
    seen = params["mask"][0] if seen is None else seen
    y = torch.tensor([[0.4, -0.3, 0.2, 0.8, -0.6, 0.1]]) * seen
    prior = gaussian()
    gain = covariance(prior)[:, seen] @ torch.linalg.inv(
        covariance(prior)[seen][:, seen] + corruption.noise**2 * torch.eye(int(seen.sum()))
    )
    mean = prior.mean[0] + gain @ (y[0] - prior.mean[0])[seen]
    variance = (covariance(prior) - gain @ covariance(prior)[seen]).diag()
    seeds = seeding.item_seeds(0, 0, "user", torch.arange(n))
    many = {k: v.expand(n, -1) for k, v in params.items()}
    return diffusion(corruption, steps, dispersion).sample(y.expand(n, -1), many, seeds), mean, variance


@pytest.mark.parametrize("case", [0, 1])
def test_sampler_draws_the_posterior(case):
    draws, mean, variance = draws_and_truth(case, steps=16, dispersion=1.0)
    assert ((draws.mean(0) - mean).abs() < 0.06 * variance.sqrt()).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.07)


@pytest.mark.parametrize("case", [0, 1])
def test_plain_ddpm_loses_variance(case):
    draws, mean, variance = draws_and_truth(case, steps=8, dispersion=0.0)
    assert ((draws.mean(0) - mean).abs() < 0.1 * variance.sqrt()).all()
    assert (draws.var(0) < 0.85 * variance).all()


@pytest.mark.parametrize("case", [0, 1])
def test_sampler_draws_the_prior(case):
    # S is diagonal here, so the variances are right to the extent that entries are uncorrelated.
    prior = gaussian()
    prior = Mixture(prior.log_weights, prior.mean, 0.4 * prior.factor, 4 * prior.variance, None)
    sampler = diffusion(CASES[case][0], steps=16, dispersion=1.0, start=prior)
    draws = sampler.sample_prior(seeding.item_seeds(0, 0, "prior", torch.arange(6000)))
    variance = covariance(prior).diag()
    assert ((draws.mean(0) - prior.mean[0]).abs() < 0.06 * variance.sqrt()).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.08)
    sampler.dispersion = 0.0
    assert (sampler.sample_prior(seeding.item_seeds(0, 0, "prior", torch.arange(6000))).var(0) < 0.9 * variance).all()


@pytest.mark.parametrize("kind", ["observation", "mixture", "diffusion"])
def test_save_and_load(kind, tmp_path):
    corruption, scaling = RandomMask(0.5, 0.1), (0.5, 2.0)
    if kind == "observation":
        sampler = ObservationPosterior(corruption, (6,), scaling)
    elif kind == "mixture":
        sampler = MixturePosterior(corruption, (6,), scaling, gaussian())
    else:
        sampler = diffusion(corruption, 3, 0.7, scaling)
        generator = torch.Generator().manual_seed(1)
        for parameter in sampler.denoiser.network.parameters():  # else the network is zero
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        sampler.residual = torch.rand(4, 3, generator=generator)
    sampler.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = from_pretrained(tmp_path)
    assert loaded.kind == kind
    generator = torch.Generator().manual_seed(2)
    params = corruption.draw(9, (6,), generator)
    y = corruption.apply(torch.randn(9, 6, generator=generator), params, generator)
    seeds = seeding.item_seeds(0, 0, "user", torch.arange(9))
    draws = sampler.sample(y, params, seeds)
    assert draws.std() > 0.1
    assert torch.equal(draws, loaded.sample(y, params, seeds))
    assert torch.equal(sampler.sample_prior(seeds), loaded.sample_prior(seeds))


def test_saved_model_is_incomplete(tmp_path):
    with pytest.raises(DiffemError, match="missing"):
        from_pretrained(tmp_path)
    MixturePosterior(RandomMask(0.5, 0.1), (6,), (0.0, 1.0), gaussian()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DiffemError, match="is not a complete saved model"):
        from_pretrained(tmp_path)


# --- scores --------------------------------------------------------------------------------------------


def test_crps_of_a_gaussian():
    generator = torch.Generator().manual_seed(0)
    y = 2 * torch.randn(20000, generator=generator)
    normal = torch.randn(8, 20000, generator=generator)
    value = {spread: crps(2 * spread * normal, y).mean().item() for spread in (0.5, 1.0, 2.0)}
    assert value[1.0] == pytest.approx(2 / math.sqrt(math.pi), rel=0.03)
    assert value[0.5] > 1.03 * value[1.0]
    assert value[2.0] > 1.03 * value[1.0]


@pytest.mark.parametrize("case", [0, 1])
def test_score_of_a_calibrated_sampler(case):
    corruption, generator = CASES[case][0], torch.Generator().manual_seed(5)
    scaling = (1.0, 2.0)
    prior = gaussian()
    x = torch.randn(2000, 2, generator=generator) @ prior.factor[0].T
    x = prior.mean + x + prior.variance[0].sqrt() * torch.randn(2000, 6, generator=generator)
    x = x * scaling[1] + scaling[0]
    params = corruption.draw(2000, (6,), generator)
    y = corruption.apply(x, params, generator)
    data = Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()})
    rows = np.arange(2000)
    right = score(MixturePosterior(corruption, (6,), scaling, prior), data, rows, seed=0)
    narrow = score(MixturePosterior(corruption, (6,), scaling, gaussian(0.5)), data, rows, seed=0)
    assert right.ratio == pytest.approx(1, abs=0.08)
    assert narrow.ratio is not None
    assert narrow.ratio < 0.8
    delta, error = narrow.difference(right)
    assert delta > 3 * error


def test_refresh_replaces_its_fraction_and_keeps_the_rest(whole, tmp_path):
    em = DiffEM(settings(), observations(), whole)
    list(em.iterate())
    sampler, shape = from_pretrained(whole / "posterior"), (60, *SHAPE)
    full, part = (np.lib.format.open_memmap(tmp_path / f"{n}.npy", "w+", np.float32, shape) for n in ("full", "part"))
    before = np.array(em.run.array("reconstructions"))
    assert em._reconstruct(sampler, full, iteration=9) == 60
    em.config = settings(em={**SETTINGS["em"], "refresh": 0.5})
    drawn = em._reconstruct(sampler, part, iteration=9)
    fresh = ~(part == before).all((1, 2, 3))
    assert drawn == fresh.sum()
    assert abs(drawn - 30) < 4 * math.sqrt(15)
    np.testing.assert_allclose(part[fresh], full[fresh], atol=1e-5)
