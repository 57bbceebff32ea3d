"""The algorithm: it survives kill -9, keeps held-out observations apart, and its sampler is right where that is known."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from diffem import cli, datasets, metrics, seeding, starts
from diffem import config as configuration
from diffem import em as em_module
from diffem.corruptions import GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.denoisers import LEAST, Denoiser, DenoiserConfig
from diffem.diagnostics import Score
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
    likelihood_basis,
)

SETTINGS = {
    "em": {"iterations": 3, "guard": False, "score_draws": 2},
    "m_step": {"steps": 5, "first_steps": 5, "batch": 16, "checkpoint": 2},
    "e_step": {"batch": 16, "ratio": 0.0},
    "sampler": {"steps": 3},
    "start": {"components": [1], "ranks": [2], "iterations": 20},
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "prior": {"steps": 5, "sampler_steps": 4},
}
UNET = {"kind": "unet", "channels": [8, 8], "blocks": [1, 1]}
SHAPE = (1, 4, 4)
NETWORK = NetworkConfig(kind="mlp", width=16, depth=1, embedding=16)


def settings(**sections) -> configuration.Config:
    return configuration.from_dict({k: {**SETTINGS.get(k, {}), **sections.get(k, {})} for k in SETTINGS | sections})


def clean(n: int = 60) -> tuple[torch.Tensor, torch.Generator]:
    """Items from a Gaussian of rank 2."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(2, 16, generator=generator)
    x = torch.randn(n, 2, generator=generator) @ factor + 0.1 * torch.randn(n, 16, generator=generator)
    return x.view(n, *SHAPE), generator


def observations(n: int = 60, poison: np.ndarray | None = None) -> Observations:
    """They, masked."""
    x, generator = clean(n)
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


def run_and_die(out: str, where: str, sections: dict) -> None:
    """Run by a process of its own."""
    torch.set_num_threads(1)

    def progress(what: str, done: int, total: int) -> None:
        if (where, what) in (("e_step", "iteration 2, E-step"), ("calibration", "iteration 4, E-step")):
            assert done == 16
            die()

    em = DiffEM(settings(**sections), observations(), out, progress=progress)
    corrupt, keep = em._corrupt_again, em._keep_reconstructions

    def corrupt_or_die(x, generator):
        if (where, em.state.phase, em.state.iteration, em.state.step) == ("m_step", "m_step", 2, 3):
            die()
        if (where, em.state.phase, em.state.step) == ("prior", "prior", 3):
            die()
        return corrupt(x, generator)

    def keep_and_die(best):
        keep(best)
        if where == "commit" and em.state.iteration == 2:
            die()

    em._corrupt_again, em._keep_reconstructions = corrupt_or_die, keep_and_die
    list(em.iterate())


def bare(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("em") / "whole"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(out)
    torch.set_num_threads(before)
    return out


# --- a run and its resumption --------------------------------------------------------------------------


def start_and_die(out: Path, where: str, **sections) -> None:
    arguments = f"{str(out)!r}, {where!r}, {sections!r}"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_em; test_em.run_and_die({arguments})"
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


def assert_same(out: Path, whole: Path) -> None:
    for name in ("posterior/model.safetensors", "prior/model.safetensors", "reconstructions.npy"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("where", ["m_step", "e_step", "commit", "prior"])
def test_kill_nine(where, whole, tmp_path):
    out = tmp_path / "run"
    start_and_die(out, where)
    assert len(bare(out)) == (5 if where == "prior" else 2)  # the start, finished iterations, what the run ends with
    assert (out / "next.npy").exists() == (where == "e_step")
    train(out)
    assert_same(out, whole)
    assert bare(out) == bare(whole)
    assert not [p for p in out.rglob("*") if p.name == "next.npy" or p.suffix == ".tmp"]


def test_kill_nine_of_a_unet(tmp_path):
    train(tmp_path / "whole", network=UNET)
    start_and_die(tmp_path / "run", "m_step", network=UNET)
    assert len(bare(tmp_path / "run")) == 2
    train(tmp_path / "run", network=UNET)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert bare(tmp_path / "run") == bare(tmp_path / "whole")


WIDE = {"e_step": {"ratio": 1e9, "gain": 0.0}}  # never reached: ends at the widest


def test_calibration_widens_the_saved_posterior(tmp_path):
    em = train(tmp_path / "whole", **WIDE)
    assert [row["iteration"] for row in em.rows] == [0, 1, 2, 3, 4]
    last = em.rows[-1]
    assert (last["dispersion"], last["loss"], last["examples"]) == (em_module.WIDEST, None, 0)
    assert last["of"] == 3
    assert last["ratio"] > em.rows[-2]["ratio"]
    wide, data = from_pretrained(tmp_path / "whole" / "posterior"), observations()
    assert wide.dispersion == em_module.WIDEST
    rows = np.arange(len(data))
    drawn = wide.sample(*data.batch(rows), seeding.item_seeds(0, 4, "e_step", rows))
    np.testing.assert_allclose(drawn, np.load(tmp_path / "whole" / "reconstructions.npy"), rtol=1e-4, atol=1e-5)

    start_and_die(tmp_path / "run", "calibration", **WIDE)
    train(tmp_path / "run", **WIDE)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert bare(tmp_path / "run") == bare(tmp_path / "whole")


def test_a_close_score_costs_a_share_of_what_the_run_did():
    config = configuration.load(None, [("em.score_items", "128"), ("em.score_splits", "2"), ("sampler.steps", "24")])
    assert em_module.scored(config, 6) == (6, 2)
    assert em_module.scored(config, 5000) == (128, 2)
    # a fiftieth of the evaluations, of which a prediction of two draws takes 50, but 768 and 16,384 are the bounds
    found = {(n, spent): em_module.scored(config, n, spent) for n in (6, 180, 1000, 20_000) for spent in (0, 4e6, 1e9)}
    assert found == {
        (6, 0): (6, 32),
        (6, 4e6): (6, 32),
        (6, 1e9): (6, 32),
        (180, 0): (180, 4),
        (180, 4e6): (180, 8),
        (180, 1e9): (180, 32),
        (1000, 0): (768, 2),
        (1000, 4e6): (1000, 2),
        (1000, 1e9): (1000, 16),
        (20_000, 0): (768, 2),
        (20_000, 4e6): (1600, 2),
        (20_000, 1e9): (16_384, 2),
    }


def test_metrics_rows(whole):
    rows = bare(whole)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["accepted"] for row in rows)
    assert [row["examples"] for row in rows] == [0, 80, 80, 80, 0]
    assert [row.get("of") for row in rows] == [None] * 4 + [3]  # the last row is what the run ends with, scored closely
    assert [row["network_evaluations"] for row in rows[::4]] == [0, 0]
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
    with pytest.raises(DiffemError, match=r"config\.yaml: facts\.digest differs from this run's;"):
        DiffEM(settings(), observations(poison=observations().split(0)[1][:1]), whole)


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
    # corrections of variances and the last dispersion are statistics of the sampler that held-out observations measure
    sharp = {"sharp": 1.0, "ratio": 0.0}
    one = train(tmp_path / "one", e_step=sharp)
    two = train(tmp_path / "two", observations(poison=held_out), e_step=sharp)
    assert len(held_out) == 6
    assert not set(np.concatenate(fitted)) & set(held_out)
    assert one.scaling == two.scaling
    assert all(row["accepted"] for row in one.rows + two.rows)
    for name in ("start", "posterior", "prior"):
        a, b = (load_file(em.run.folder / name / "model.safetensors") for em in (one, two))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a if k != "correction"), name
    x, z = (np.load(em.run.folder / "reconstructions.npy") for em in (one, two))
    assert np.array_equal(x[one.train], z[one.train])
    assert not np.array_equal(x[held_out], z[held_out])


def test_gate_refuses_what_is_worse(tmp_path, monkeypatch):
    calls = []

    def worse(*arguments):
        calls.append(arguments)
        return Score("crps", torch.linspace(0, 1, 6) * (1 + 0.1 * len(calls)) + len(calls))

    monkeypatch.setattr(em_module, "score", worse)
    em = DiffEM(settings(em={"guard": True}), observations(), tmp_path)
    iterator = em.iterate()
    next(iterator)
    before = (tmp_path / "reconstructions.npy").read_bytes()
    model = (tmp_path / "posterior" / "model.safetensors").read_bytes()
    assert [row["accepted"] for row in iterator] == [False] * 3
    assert [row["accepted"] for row in bare(tmp_path)] == [True, False, False, False]
    for name in ("start", "posterior", "prior"):
        assert json.loads((tmp_path / name / "config.json").read_text())["kind"] == "mixture"
        assert (tmp_path / name / "model.safetensors").read_bytes() == model
    assert em.state.phase == "done"
    assert (tmp_path / "reconstructions.npy").read_bytes() == before
    assert not (tmp_path / "next.npy").exists()


def scores_of(monkeypatch, *criteria: tuple[float, float]) -> None:
    """The start and each iteration get these (CRPS, ratio); what comes after them, the last."""
    left = list(criteria)

    def score(*arguments):
        value, ratio = left.pop(0) if len(left) > 1 else left[0]
        ones = torch.ones(6)
        return Score("crps", value * ones, ratio * ones, ones, 0 * ones)

    monkeypatch.setattr(em_module, "score", score)
    monkeypatch.setattr(em_module, "energy_items", lambda *arguments: torch.zeros(6))


def test_run_holds_the_best_iteration_not_the_last(tmp_path, monkeypatch):
    narrow = (0.39, 0.2)  # less CRPS, by draws that are too narrow
    scores_of(monkeypatch, (0.5, 0.9), (0.4, 0.9), narrow, narrow, (0.5, 0.9), (0.4, 0.9))
    em = DiffEM(settings(em={"guard": True}), observations(), tmp_path)
    kept = []
    for row in em.iterate():
        kept.append((tmp_path / "reconstructions.npy").read_bytes())
        assert row["accepted"]
    assert [row["best"] for row in em.rows] == [True, True, False, False, True]
    assert em.rows[-1]["of"] == 1
    assert kept[0] != kept[1] == kept[2] == kept[3] == kept[4]
    data, rows = observations(), np.arange(60)
    drawn = from_pretrained(tmp_path / "posterior").sample(*data.batch(rows), seeding.item_seeds(0, 1, "e_step", rows))
    np.testing.assert_allclose(drawn, np.load(tmp_path / "reconstructions.npy"), rtol=1e-4, atol=1e-5)


def test_a_sharp_part_that_did_not_pay_trains_no_more(tmp_path, monkeypatch):
    narrow = (0.4, 0.3)
    scores_of(monkeypatch, (0.5, 0.9), narrow, narrow, narrow, (0.39, 0.3))
    sections = {"em": {"guard": True, "iterations": 4, "patience": 0}, "e_step": {"sharp": 1.0, "sharp_ratio": 0.0}}
    em, trains = DiffEM(settings(**sections), observations(), tmp_path), []
    for row in em.iterate():
        trains.append((tmp_path / "current.npy").read_bytes())
        assert row["accepted"]
        if row["iteration"] == 4:
            break
    start = (tmp_path / "reconstructions.npy").read_bytes()
    assert [row["best"] for row in em.rows[:5]] == [True, False, False, False, False]
    assert [bool(row.get("undone")) for row in em.rows[:5]] == [False, False, False, True, False]
    assert [x == start for x in trains] == [True, False, False, True, False]


@pytest.mark.parametrize("prior", ["unconditional", "joint"])
def test_run_ends_with_the_start_if_a_close_look_says_so(prior, tmp_path, monkeypatch):
    scores_of(monkeypatch, (0.5, 0.9), (0.4, 0.9), (0.39, 0.9), (0.38, 0.9), (0.37, 0.9), (0.38, 0.9))
    em = DiffEM(settings(em={"guard": True}, prior={"kind": prior}), observations(), tmp_path)
    kinds, before, drawn = [], {}, None
    for row in em.iterate():
        kinds.append(json.loads((tmp_path / "posterior" / "config.json").read_text())["kind"])
        if row["iteration"] == 0:
            before = {p: p.read_bytes() for f in ("posterior/*", "prior/*") for p in tmp_path.glob(f)}
            drawn = np.load(tmp_path / "reconstructions.npy")
    assert kinds == ["mixture", "diffusion", "diffusion", "diffusion", "mixture"]
    last = em.rows[-1]
    assert (last["of"], last["best"], last["dispersion"], last["network_evaluations"]) == (0, True, None, 0)
    assert last["score"] == last["start_score"] == pytest.approx(0.37)
    assert last["start_delta"] == pytest.approx(0.01)  # the iteration's, which lost
    np.testing.assert_allclose(np.load(tmp_path / "reconstructions.npy"), drawn, rtol=1e-5, atol=1e-6)
    assert len(before) > 3
    for path, content in before.items():
        assert path.read_bytes() == content, path
    assert em.state.phase == "done"
    assert not (tmp_path / "prior.json").exists()


def test_patience_ends_the_run(tmp_path, monkeypatch):
    scores_of(monkeypatch, (0.5, 0.9), (0.4, 0.9), (0.4, 0.9), (0.4, 0.9), (0.5, 0.9), (0.4, 0.9))
    sections = {"em": {"guard": True, "iterations": 9, "patience": 2}, "e_step": {"sharp": 0.0, "ratio": 0.0}}
    em = DiffEM(settings(**sections), observations(), tmp_path)
    list(em.iterate())
    assert [row["iteration"] for row in em.rows] == [0, 1, 2, 3, 4]
    assert [row.get("of") for row in em.rows] == [None] * 4 + [1]
    assert em.state.phase == "done"


# --- what trains: reconstructions of training observations, and nothing else ----------------------------


def spy(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor, dict, float]]:
    """The batches (clean, y, params, dropout) that reach the loss, in model units."""
    batches, loss = [], Denoiser.loss

    def listen(self, x, y, params, generator, dropout=0.0):
        batches.append((x.clone(), y.clone(), params, dropout))
        return loss(self, x, y, params, generator, dropout)

    monkeypatch.setattr(Denoiser, "loss", listen)
    return batches


def model_units(out: Path, em: DiffEM, rows: np.ndarray) -> torch.Tensor:
    centre, half = em.scaling
    return (torch.from_numpy(np.load(out / "reconstructions.npy")[rows]) - centre) / half


def among(x: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return (x[:, None] == items).flatten(2).all(2).any(1)


def test_prior_trains_on_training_reconstructions(tmp_path, monkeypatch):
    batches = spy(monkeypatch)
    em = train(tmp_path, prior={"steps": 40})
    batches = batches[-40:]
    assert all(dropout == 1 for *_, dropout in batches)  # without observations
    x = torch.cat([b[0] for b in batches])
    assert among(x, model_units(tmp_path, em, em.train)).all()
    assert among(model_units(tmp_path, em, em.train), x).float().mean() > 0.9
    assert not among(model_units(tmp_path, em, em.held_out), x).any()
    posterior, prior = (load_file(tmp_path / n / "model.safetensors") for n in ("posterior", "prior"))
    assert any(not torch.equal(posterior[k], prior[k]) for k in prior if k.startswith("network."))
    assert (len(posterior["correction"]), len(prior["correction"])) == (4, 5)  # steps of the two samplers, and one
    about = json.loads((tmp_path / "prior.json").read_text())
    assert (about["steps"], about["examples"]) == (40, 40 * 16)


def test_joint_prior_is_the_posterior(tmp_path):
    train(tmp_path, prior={"kind": "joint"})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "prior" / name).read_bytes() == (tmp_path / "posterior" / name).read_bytes()
    assert not (tmp_path / "prior.json").exists()


@pytest.mark.parametrize("flip", [False, True])
def test_flip_mirrors_half_of_the_items(flip, tmp_path, monkeypatch):
    batches = spy(monkeypatch)
    em = DiffEM(
        settings(em={"iterations": 1}, m_step={"first_steps": 40, "flip": flip, "thinned": 0.0}),
        observations(),
        tmp_path,
    )
    rows = em.iterate()
    next(rows)
    items = model_units(tmp_path, em, em.train)
    next(rows)
    x, y = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    same, mirrored = among(x, items), among(x, items.flip(-1))
    assert (same ^ mirrored).all()
    share = mirrored.float().mean()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(x)) if flip else share == 0
    seen = torch.cat([b[2]["mask"] for b in batches])
    noise = em.model_corruption.config["noise"]
    assert (x - y)[seen].square().mean().sqrt() == pytest.approx(noise, rel=0.05)  # mirrored before it is corrupted


def clean_file(folder: Path, x: np.ndarray) -> str:
    np.save(folder / "examples.npy", x)
    return str(folder / "examples.npy")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_clean_examples_are_a_share_of_every_batch(share, tmp_path, monkeypatch):
    batches = spy(monkeypatch)
    examples = 3 * np.random.default_rng(5).standard_normal((4, *SHAPE))
    given = {"clean_examples": clean_file(tmp_path, examples), "clean_share": share}
    em = DiffEM(settings(em={"iterations": 1}, m_step={"first_steps": 40, **given}), observations(), tmp_path / "run")
    rows = em.iterate()
    next(rows)
    items = model_units(tmp_path / "run", em, em.train)
    for _row in rows:
        pass
    assert len(batches) == 45  # the prior's too
    centre, half = em.scaling
    theirs = (torch.from_numpy(examples).float() - centre) / half
    items = torch.cat((items, model_units(tmp_path / "run", em, em.train)))  # of the start, of the last iteration
    x = torch.cat([b[0] for b in batches])
    mine, reconstructed = among(x, theirs), among(x, items)
    assert (mine ^ reconstructed).all()
    found = mine.float().mean().item()
    assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / len(x)) + 1e-6
    if share:
        counts = (x[:, None] == theirs).flatten(2).all(2).sum(0)
        assert (counts > 0.6 * mine.sum() / 4).all()  # all four of them
        x, y, params, _ = batches[0]
        noise = em.model_corruption.config["noise"]
        assert ((x - y)[params["mask"]].abs() < 5 * noise).all()  # they are corrupted like the others
        assert not y[~params["mask"]].any()


def test_clean_examples_train(whole, tmp_path):
    given = {"clean_examples": clean_file(tmp_path, clean(4)[0].numpy()), "clean_share": 0.5}
    train(tmp_path / "run", m_step=given)
    ours, theirs = (load_file(p / "posterior" / "model.safetensors") for p in (tmp_path / "run", whole))
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours if k.startswith("network."))


@pytest.mark.parametrize(
    ("examples", "text"),
    [
        (None, "no such file; it is a .npy of clean items"),
        (np.zeros((3, 4, 4)), "must hold finite items of shape (1, 4, 4), has (3, 4, 4)"),
        (np.zeros((0, *SHAPE)), "must hold finite items of shape (1, 4, 4), has (0, 1, 4, 4)"),
        (np.full((2, *SHAPE), np.nan), "must hold finite items of shape (1, 4, 4), has (2, 1, 4, 4)"),
    ],
    ids=["missing", "shape", "none", "nan"],
)
def test_clean_examples_that_are_refused(examples, text, tmp_path):
    file = tmp_path / "examples.npy"
    if examples is not None:
        np.save(file, examples)
    with pytest.raises(DiffemError) as caught:
        DiffEM(settings(m_step={"clean_examples": str(file)}), observations(), tmp_path / "run")
    assert str(caught.value) == f"m_step.clean_examples: {file}: {text}"
    assert not (tmp_path / "run").exists()


# --- new weights in the last iterations -----------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1, 2, 9])
def test_reinitialised_iterations_begin_with_the_initial_weights(last, tmp_path, monkeypatch):
    begun, train_on = [], DiffEM._train

    def listen(self, target, dropout, until_settled=False):
        weights = torch.cat([p.detach().flatten().clone() for p in self.trainer.denoiser.network.parameters()])
        averaged = torch.cat([p.detach().flatten().clone() for p in self.trainer.averaged.network.parameters()])
        moments = [k for k in self.trainer.state() if k.startswith("optimizer.")]
        begun.append((weights, averaged, moments, self.trainer.updates, target))
        train_on(self, target, dropout, until_settled)

    monkeypatch.setattr(DiffEM, "_train", listen)
    em = train(tmp_path, m_step={"first_steps": 7, "reinitialise": last}, prior={"kind": "joint"})
    anew = [True, *(iteration > 3 - last for iteration in (2, 3))]
    assert len(begun) == 3
    for (weights, averaged, moments, updates, target), fresh in zip(begun, anew, strict=True):
        assert torch.equal(weights, begun[0][0]) == torch.equal(averaged, begun[0][0]) == fresh
        assert (not moments) == (updates == 0) == fresh
        assert target == (7 if fresh else 5)
    assert [row["examples"] for row in em.rows] == [0, *(16 * (7 if fresh else 5) for fresh in anew), 0]


@pytest.mark.parametrize("where", ["m_step", "e_step"])
def test_reinitialised_run_resumes(where, tmp_path):
    # it dies in iteration 2, whose weights are new
    sections = {"em": {"iterations": 2}, "m_step": {"reinitialise": 1, "steps": 3, "first_steps": 7}}
    train(tmp_path / "whole", **sections)
    start_and_die(tmp_path / "run", where, **sections)
    assert len(bare(tmp_path / "run")) == 2
    train(tmp_path / "run", **sections)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert bare(tmp_path / "run") == bare(tmp_path / "whole")


@pytest.mark.parametrize("what", ["poisoned", "deleted"])
def test_clean_items_do_not_train(what, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                **SETTINGS,
                "data": {
                    "source": "digits",
                    "limit": 40,
                    "corruption": {"name": "RandomMask", "rate": 0.5, "noise": 0.1},
                },
                "em": {"iterations": 2, "guard": False, "score_draws": 2},
            }
        )
    )
    corrupt, touched = datasets.corrupt, []

    def corrupt_and_touch(source, corruption, out, *rest, **options):
        made = corrupt(source, corruption, out, *rest, **options)
        file = Path(out) / "clean.npy"
        assert len(np.load(file)) == 40
        if Path(out).parent.name == "poisoned":
            np.save(file, np.full_like(np.load(file), 1e6))
        elif Path(out).parent.name == "deleted":
            file.unlink()
        touched.append(Path(out).parent.name)
        return made

    monkeypatch.setattr(datasets, "corrupt", corrupt_and_touch)
    for name in ("whole", what):
        assert (
            cli.main(["train", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / name), "--allow-unobserved"]) == 0
        )
    assert touched == ["whole", what]
    assert_same(tmp_path / what, tmp_path / "whole")
    assert bare(tmp_path / what) == bare(tmp_path / "whole")


def test_reference_is_only_measured(whole, tmp_path):
    x = clean()[0]
    em = DiffEM(settings(), observations(), tmp_path / "run", reference=x.numpy())
    rows = list(em.iterate())
    columns = {"psnr", "energy_distance", "precision", "recall", "density", "coverage"}
    assert all(row["clean"].keys() == columns for row in rows)
    assert_same(tmp_path / "run", whole)
    assert [{k: v for k, v in row.items() if k != "clean"} for row in bare(tmp_path / "run")] == bare(whole)
    centre, half = em.scaling
    last, truth = model_units(tmp_path / "run", em, np.arange(60)), (x - centre) / half
    assert rows[-1]["clean"]["psnr"] == pytest.approx(-10 * math.log10((last - truth).square().mean() / 4), rel=1e-5)
    assert rows[-1]["clean"]["energy_distance"] == pytest.approx(
        metrics.energy_distance(last, truth, of_one_row=True), rel=1e-5
    )
    with pytest.raises(DiffemError) as caught:
        DiffEM(settings(), observations(), tmp_path / "other", reference=x[1:].numpy())
    assert str(caught.value) == "reference: shape (59, 1, 4, 4), but the reconstructions have (60, 1, 4, 4)"
    assert not (tmp_path / "other").exists()


def test_features_of_a_reference_add_a_frechet_distance(whole, tmp_path):
    x, features = clean()[0], lambda a: a.flatten(1)[:, :3]
    em = DiffEM(settings(), observations(), tmp_path / "run", reference=x.numpy(), features=features)
    rows = list(em.iterate())
    assert_same(tmp_path / "run", whole)
    centre, half = em.scaling
    last, truth = model_units(tmp_path / "run", em, np.arange(60)), (x - centre) / half
    expected = metrics.frechet_distance(features(last), features(truth))
    assert rows[-1]["clean"]["frechet"] == pytest.approx(expected, rel=1e-4)


def test_rows_say_what_scores_took(tmp_path, monkeypatch):
    score = em_module.score

    def slow(*arguments):
        time.sleep(0.05)
        return score(*arguments)

    monkeypatch.setattr(em_module, "score", slow)
    rows = list(DiffEM(settings(), observations(), tmp_path).iterate())
    assert all(0.05 <= row["guard_seconds"] <= row["seconds"] for row in rows)


# --- the start from an earlier run ----------------------------------------------------------------------


@pytest.mark.parametrize("network", [{}, UNET], ids=["mlp", "unet"])
def test_start_from_a_run(network, whole, tmp_path):
    if network:
        whole = tmp_path / "whole"
        train(whole, network=network)
    other = observations()
    other.y = 3 * other.y + 1
    em = train(tmp_path / "run", other, start={"kind": "run", "run": str(whole)}, em={"iterations": 0}, network=network)
    earlier = from_pretrained(whole / "posterior")
    assert isinstance(earlier, DiffusionPosterior)
    assert em.scaling == earlier.scaling != other.scaling(em.train)
    x = np.load(tmp_path / "run" / "reconstructions.npy")
    for rows in other.chunks(size=16):
        draws = earlier.sample(*other.batch(rows), seeding.item_seeds(0, 0, "e_step", rows))
        assert np.array_equal(x[rows], draws.numpy())
    theirs = earlier.denoiser.network.state_dict()
    assert any(v.abs().max() > 0 for k, v in theirs.items() if "last" in k or "ascent" in k)
    for ours in (em.trainer.denoiser, em.trainer.averaged):
        assert ours.precondition == "start"
        assert all(torch.equal(v, theirs[k]) for k, v in ours.network.state_dict().items())
        assert all(torch.equal(v, earlier.denoiser.reference.tensors[k]) for k, v in ours.reference.tensors.items())
    start, model = (load_file(p / "model.safetensors") for p in (tmp_path / "run" / "start", whole / "posterior"))
    assert start.keys() == model.keys()
    assert all(torch.equal(start[k], model[k]) for k in start)


def test_start_from_a_run_resumes(whole, tmp_path):
    start = {"kind": "run", "run": str(whole)}
    train(tmp_path / "whole", start=start)
    start_and_die(tmp_path / "run", "m_step", start=start)
    train(tmp_path / "run", start=start)
    assert_same(tmp_path / "run", tmp_path / "whole")
    ours, theirs = (load_file(p / "checkpoint.safetensors") for p in (tmp_path / "run", whole))
    assert any(not torch.equal(ours[k], theirs[k]) for k in theirs if "network" in k)  # it went on training


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"network": {"width": 8}}, "start.run: its network is another one; use the same network section"),
        (
            {"denoiser": {"precondition": "fuse"}},
            "start.run: its denoiser.precondition is start, this run's is fuse",
        ),
        (
            {"denoiser": {"precondition": "plain"}},
            "start.run: its denoiser.precondition is start, this run's is plain",
        ),
        (
            {"start": {"run": "nowhere"}},
            "nowhere/posterior/config.json: missing; nowhere/posterior is not a saved model",
        ),
    ],
)
def test_start_from_a_run_that_does_not_fit(sections, text, whole, tmp_path):
    sections = {**sections, "start": {"kind": "run", "run": str(whole), **sections.get("start", {})}}
    with pytest.raises(DiffemError) as caught:
        train(tmp_path / "run", **sections)
    assert str(caught.value) == text
    assert not (tmp_path / "run" / "reconstructions.npy").exists()  # it is said before anything is drawn


def test_start_from_a_run_with_another_split(whole, tmp_path):
    # what this run would hold out has trained the earlier one
    with pytest.raises(DiffemError) as caught:
        train(tmp_path / "run", start={"kind": "run", "run": str(whole)}, em={"seed": 1})
    assert str(caught.value) == f"start.run: {whole} held out others of these observations; use --em.seed 0"


def test_start_from_a_run_brings_its_prior(whole, tmp_path):
    train(tmp_path / "run", start={"kind": "run", "run": str(whole)}, em={"iterations": 0})
    ours, theirs = (load_file(p / "prior" / "model.safetensors") for p in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_model_of_another_corruption(tmp_path):
    blur = GaussianBlur(1.0, 0.1)
    mixture = Mixture.standard(16)
    MixturePosterior(blur, SHAPE, (0.0, 1.0), mixture).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path, GaussianBlur(1.0, 0.3)).corruption.noise == 0.3  # written in the same basis
    with pytest.raises(DiffemError, match=r": its mixture is written for \{'name': 'GaussianBlur', .*not for"):
        from_pretrained(tmp_path, GaussianBlur(2.0, 0.1))


def test_calibration_may_not_end_worse_than_the_start(tmp_path, monkeypatch):
    def wide_is_worse(sampler, *arguments):
        worse = 5.0 if getattr(sampler, "dispersion", 0) > 1 else 0.0
        return Score("crps", torch.linspace(0, 1, 6) + worse, torch.full((6,), 0.1 + 0.3 * worse), torch.ones(6))

    monkeypatch.setattr(em_module, "score", wide_is_worse)
    em = train(tmp_path, e_step={"ratio": 0.8, "gain": 0.0})
    assert em.rows[-1]["dispersion"] == 1.0
    assert from_pretrained(tmp_path / "posterior").dispersion == 1.0


def test_calibration_reaches_the_ratio_although_hidden_entries_differ_in_it(tmp_path, monkeypatch):
    def linear(sampler, data, rows, seed, draws, splits, repeats):
        width = getattr(sampler, "dispersion", 0)
        level = 0.5 + 0.1 * width if splits > 1 else 0.6 * (0.5 + 0.1 * width)
        assert repeats == (1 if hasattr(sampler, "dispersion") else em_module.REPEATS)
        better = 0.1 * hasattr(sampler, "dispersion")
        return Score("crps", torch.linspace(1, 2, 6) - better, level * torch.ones(6), torch.ones(6), torch.zeros(6))

    monkeypatch.setattr(em_module, "score", linear)
    em = train(tmp_path, e_step={"ratio": 0.8, "gain": 0.0})
    assert em.rows[-1]["dispersion"] == pytest.approx(3.0)
    assert em.rows[-1]["ratio"] == pytest.approx(0.8)


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


MATRIX = torch.tensor([[[0.6, 0.0, -0.8, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.5, 0.0, -0.5]]])
CASES = {
    "noise": (GaussianNoise(0.3), {}),
    "mask": (RandomMask(0.5, 0.1), {"mask": torch.tensor([[True, False, False, True, False, True]])}),
    "blur": (GaussianBlur(1.2, 0.1), {}),
    "projection": (RandomProjection(2, 0.1), {"matrix": MATRIX}),
}
DRAWN = 20_000


def prior_of(corruption) -> tuple[Mixture, torch.Tensor, torch.Tensor]:
    """The Gaussian, written in the corruption's basis, and its mean and covariance."""
    mixture, basis = gaussian(), likelihood_basis(corruption, (6,))
    prior = Mixture(*mixture.tensors.values(), basis=basis)
    there = torch.eye(6) if basis is None else basis.synthesise(torch.eye(6))  # row j: the j-th basis vector
    return prior, mixture.mean[0] @ there, there.T @ covariance(mixture) @ there


def posterior_of(case: str):
    """The observation, its parameters, and the posterior's mean and covariance by dense linear algebra."""
    corruption, params = CASES[case]
    _, mean, cov = prior_of(corruption)
    many = {k: v.expand(6, *v.shape[1:]) for k, v in params.items()}
    operator = corruption.forward(torch.eye(6), many).T  # column j: what the j-th entry makes
    y = operator @ (mean + torch.tensor([0.4, -0.3, 0.2, 0.8, -0.6, 0.1]))
    gain = cov @ operator.T @ torch.linalg.inv(operator @ cov @ operator.T + corruption.noise**2 * torch.eye(len(y)))
    return y[None], params, mean + gain @ (y - operator @ mean), cov - gain @ operator @ cov


def draws(case: str, steps: int, dispersion: float, given: bool) -> torch.Tensor:
    corruption = CASES[case][0]
    sampler = diffusion(corruption, steps, dispersion, start=prior_of(corruption)[0])
    seeds = seeding.item_seeds(0, 0, "user", torch.arange(DRAWN))
    if not given:
        return sampler.sample_prior(seeds)
    y, params, *_ = posterior_of(case)
    many = {k: v.expand(DRAWN, *v.shape[1:]) for k, v in params.items()}
    return sampler.sample(y.expand(DRAWN, -1), many, seeds)


@pytest.mark.parametrize("steps", [4, 16])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_sampler_draws_the_posterior_and_the_prior(case, given, steps):
    # With the exact denoiser a step is exact at any number of steps: what is left is the error of 20,000 draws.
    *_, mean, cov = posterior_of(case) if given else prior_of(CASES[case][0])
    x = draws(case, steps, 1.0, given)
    assert ((x.mean(0) - mean).abs() < 0.03 * cov.diag().sqrt() + 1e-4).all()
    assert (torch.cov(x.T) - cov).norm() < 0.04 * cov.norm()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_plain_ddpm_loses_variance(case, given):
    *_, mean, cov = posterior_of(case) if given else prior_of(CASES[case][0])
    x = draws(case, 8, 0.0, given)
    assert ((x.mean(0) - mean).abs() < 0.05 * cov.diag().sqrt() + 1e-4).all()
    assert torch.cov(x.T).trace() < 0.85 * cov.trace()


def expect(sampler: DiffusionPosterior, shares: torch.Tensor) -> None:
    """Has the head of variances say that these shares are left, whatever it is shown."""
    said = (shares - LEAST) / (1 - LEAST)
    sampler.denoiser.network.last.variance[-1].bias.data = torch.where(said < 1, said.log(), said - 1)


def test_draws_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    sample = DiffusionPosterior.sample

    def explode(self, y, params, seeds):
        x = sample(self, y, params, seeds)
        x[seeds == seeding.item_seeds(0, 1, "e_step", [20])] = torch.nan
        return x

    monkeypatch.setattr(DiffusionPosterior, "sample", explode)
    with pytest.raises(DiffemError) as caught:
        train(tmp_path)
    assert str(caught.value) == (
        "e_step: the draws of 1 observations (first: 20) are not finite at iteration 1; lower m_step.learning_rate"
    )


@pytest.mark.parametrize("shares", [torch.ones(6), torch.tensor([1.0, 0.5, 0.1, 1.0, 0.1, 0.5])])
def test_dispersion_beyond_one_goes_where_there_is_room_for_error(shares):
    """Against the recursion of each entry's variance, for entries that are independent under the prior."""
    prior = torch.tensor([1e-6, 0.5, 1.0, 1e-6, 0.5, 1.0])  # a thousandth of noise, or unknown; three of them observed
    start = Mixture(torch.zeros(1), torch.zeros(1, 6), torch.zeros(1, 6, 0), prior[None])
    mask, excess, noise = torch.tensor([True] * 3 + [False] * 3), 4.0, 0.1
    sampler = diffusion(RandomMask(0.5, noise), 8, 1 + excess, start=start)
    expect(sampler, shares)
    seeds = seeding.item_seeds(0, 0, "user", torch.arange(DRAWN))
    found = sampler.sample(torch.zeros(DRAWN, 6), {"mask": mask.expand(DRAWN, -1)}, seeds).var(0)

    sigmas = [*sampler.sigmas.tolist(), 0.0]
    x, widest = torch.full((6,), sigmas[0] ** 2), torch.tensor(0.0)
    for sigma, after in itertools.pairwise(sigmas):
        left = 1 / (1 / prior + mask / noise**2 + 1 / sigma**2)
        widest = widest if widest else left.max()
        tau = 1 - (after / sigma) ** 2
        x = x * (1 - tau + tau * left / sigma**2) ** 2  # the mean of x given x_t is left / sigma^2 x_t
        x = x + tau**2 * left * shares * (1 + excess * left / widest) + after**2 * tau
    torch.testing.assert_close(found, x, rtol=0.05, atol=0)
    exact = 1 / (1 / prior + mask / noise**2)
    assert (found / exact)[[0, 1, 2, 3]].max() < 1.1  # what is known gets no noise,
    assert (found / exact)[5] > 1.5 * shares[5]  # what is not, does


def test_measure_finds_what_shares_are_wrong_by():
    # the exact denoiser leaves all of the reference's variance: of which too little, or too much, was expected
    corruption, shares = RandomMask(0.5, 0.1), torch.linspace(0.1, 2, 6)
    start, mean, cov = prior_of(corruption)
    sampler = diffusion(corruption, 3, 1.0, start=start)
    expect(sampler, shares)
    generator = torch.Generator().manual_seed(3)
    x = mean + torch.randn(4000, 6, generator=generator) @ torch.linalg.cholesky(cov).T
    y, params = corruption.observe(x, generator)
    sampler.measure(x, y, params, seeding.item_seeds(0, 0, "user", torch.arange(4000)))
    seen = params["mask"]
    for k, sigma in enumerate(sampler.sigmas):
        level = torch.full((4000,), sigma)
        for group, (chosen, withheld) in enumerate(((~seen, False), (seen, False), (torch.ones_like(seen), True))):
            # a Gaussian's variance does not depend on x_t
            posterior, _, v = sampler.denoiser.predict(x, level, y, params, torch.full((4000,), withheld))
            torch.testing.assert_close(v, shares.expand(4000, -1))
            expected = (posterior.variance * chosen).sum() / (posterior.variance * v * chosen).sum()
            assert sampler.correction[k, group].item() == pytest.approx(expected.item(), rel=0.06)


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
        sampler.correction = torch.rand(4, 3, generator=generator)
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
    diffusion(RandomMask(0.5, 0.1), 3, 1.0).save_pretrained(tmp_path)
    tensors = load_file(file)
    del tensors["network.last.variance.0.weight"]
    save_file(tensors, file)
    with pytest.raises(DiffemError, match="was saved by another version of diffem; train it again"):
        from_pretrained(tmp_path)


def test_refresh_replaces_its_fraction_and_keeps_the_rest(whole, tmp_path):
    em = DiffEM(settings(), observations(), whole)
    list(em.iterate())
    sampler, shape = from_pretrained(whole / "posterior"), (60, *SHAPE)
    full, part = (np.lib.format.open_memmap(tmp_path / f"{n}.npy", "w+", np.float32, shape) for n in ("full", "part"))
    before = np.array(em.run.array("reconstructions"))
    np.save(whole / "current.npy", before)  # a finished run has none
    assert em._reconstruct(sampler, full, iteration=2) == 60
    em.config, em.state.phase = settings(em={**SETTINGS["em"], "refresh": 0.5}), "e_step"
    drawn = em._reconstruct(sampler, part, iteration=2)
    fresh = ~(part == before).all((1, 2, 3))
    assert drawn == fresh.sum()
    assert abs(drawn - 30) < 4 * math.sqrt(15)
    np.testing.assert_allclose(part[fresh], full[fresh], atol=1e-5)
    (whole / "current.npy").unlink()
