"""The algorithm: it survives kill -9, keeps held-out observations apart, and chooses by validation observations."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffem import cli, judging, samplers, seeding, starts
from diffem import config as configuration
from diffem import trainer as trainer_module
from diffem.clean import datasets, metrics
from diffem.clean.evaluation import against
from diffem.corruptions import BlackBox, GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.data import Dataset, Observations, evenly
from diffem.denoiser import Denoiser
from diffem.diagnostics import Score, score
from diffem.diagnostics import scores as scores_module
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.loop import Progress
from diffem.posterior import from_pretrained
from diffem.samplers import DiffusionSampler, MixtureSampler
from diffem.trainer import Trainer

SETTINGS = {
    "em": {"iterations": 3, "guard": False},
    "m_step": {"steps": 5, "first_steps": 5, "batch": 16},
    "sampler": {"steps": 3},
    "start": {"components": [1], "ranks": [2], "iterations": 20},
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "prior": {"steps": 5, "sampler_steps": 4},
}
UNET = {"kind": "unet", "channels": [8, 8], "blocks": [1, 1]}
SHAPE = (1, 4, 4)


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


def make(out: Path, data: Observations | None = None, kind: type[DiffEM] = DiffEM, **sections) -> DiffEM:
    """A run that draws 16 items at a time, and saves whenever it can."""
    return kind(settings(**sections), data or observations(), out, batch=16, checkpoint_minutes=0)


def train(out: Path, data: Observations | None = None, **sections) -> DiffEM:
    em = make(out, data, **sections)
    for _row in em.iterate():
        pass
    return em


def drawn(
    folder: Path, rows: np.ndarray, iteration: int, data: Observations | None = None, purpose: str = "e_step"
) -> np.ndarray:
    """What a saved posterior draws in the E-step of an iteration, or at the end."""
    seeds = seeding.item_seeds(0, iteration, purpose, rows)
    return from_pretrained(folder).sample(*(data or observations()).batch(rows), seeds=seeds)[0].numpy()


def die_softly() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def narrow(sampler, *arguments) -> Score:
    """In the place of a score: the first iteration beats the start, and draws of any width are over-confident."""
    ones, width = torch.ones(6), getattr(sampler, "width", 0.0)
    return Score("crps", (2.0 - (width > 0)) * ones, (0.5 + width / 100) * ones, ones, 0 * ones)


def run_and_die(out: str, where: str, sections: dict) -> None:
    """Run by a process of its own."""
    torch.set_num_threads(1)
    if where == "last":
        judging.score = narrow
    em = make(Path(out), **sections)

    def die_there(progress: Progress) -> None:
        if progress in {"e_step": [Progress("e_step", 2, 32, 60)], "last": [Progress("e_step", 4, 32, 60)]}.get(
            where, []
        ):
            die()

    simulate, save_metrics = em.examples.simulate, em.run.save_metrics

    def simulate_or_die(x, generator):
        state = em.state
        if (where, state.step, state.iteration, state.updates) == ("m_step", "m_step", 2, 3):
            die()
        if (where, state.step, state.updates) == ("prior", "prior", 3):
            die()
        return simulate(x, generator)

    def die_or_save(rows):
        # the end of a commit; the guard refuses the second iteration
        if where == "commit" and rows[-1]["iteration"] == 2 - em.config.em.guard:
            die()
        save_metrics(rows)

    em.progress, em.examples.simulate, em.run.save_metrics = die_there, simulate_or_die, die_or_save
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


@pytest.mark.parametrize("where", ["m_step", "commit"])
def test_kill_nine_of_a_guarded_run(where, tmp_path):
    sections = {"em": {"guard": True, "patience": 3}}  # what is the best so far is restored, too
    train(tmp_path / "whole", **sections)
    start_and_die(tmp_path / "run", where, **sections)
    train(tmp_path / "run", **sections)
    assert (tmp_path / "run" / "reconstructions.npy").read_bytes() == (
        tmp_path / "whole" / "reconstructions.npy"
    ).read_bytes()
    assert bare(tmp_path / "run") == bare(tmp_path / "whole")
    assert all(math.isfinite(row["criterion_delta"]) for row in bare(tmp_path / "run")[1:4])


def test_kill_nine_while_the_last_reconstructions_are_drawn(tmp_path, monkeypatch):
    sections = {"em": {"guard": True}}
    with monkeypatch.context() as patched:
        patched.setattr(judging, "score", narrow)
        em = train(tmp_path / "whole", **sections)
    assert [row["iteration"] for row in em.rows] == [0, 1, 2, 3, 4]
    last = em.rows[-1]
    assert (last["final"], last["width"], last["loss"], last["examples"]) == (1, samplers.WIDTHS[-1], None, 0)
    assert from_pretrained(tmp_path / "whole" / "posterior").sampler.width == samplers.WIDTHS[-1]
    found = drawn(tmp_path / "whole" / "posterior", np.arange(60), 4, purpose="end")
    np.testing.assert_allclose(found, np.load(tmp_path / "whole" / "reconstructions.npy"), rtol=1e-4, atol=1e-5)

    start_and_die(tmp_path / "run", "last", **sections)
    assert len(bare(tmp_path / "run")) == 4
    monkeypatch.setattr(judging, "score", narrow)
    train(tmp_path / "run", **sections)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert bare(tmp_path / "run") == bare(tmp_path / "whole")


COLUMNS = {
    *("iteration", "examples", "network_evaluations", "loss", "width", "failures", "accepted", "best"),
    *("score_name", "score", "score_se", "log_score", "criterion", "ratio", "ratio_se"),
}
AGAINST_THE_BEST, AGAINST_THE_START = ({f"{name}_delta", f"{name}_delta_se"} for name in ("criterion", "start"))


def test_metrics_rows(whole):
    rows = bare(whole)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["accepted"] and row["best"] for row in rows)
    assert [row["examples"] for row in rows] == [0, 80, 80, 80, 0]
    assert [row.get("final") for row in rows] == [None] * 4 + [3]  # the last row is what the run ends with
    assert [row["width"] for row in rows] == [None, 1, 1, 1, 1]
    first, later = (
        3 * 80 + 60 * 4,
        3 * 80 + 60 * 3,
    )  # an update counts for three; three steps take four, renoising three
    assert [row["network_evaluations"] for row in rows] == [0, first, later, later, 60 * 4]
    assert all(math.isfinite(row["score"]) and row["ratio"] > 0 for row in rows)
    assert set(rows[0]) == COLUMNS
    assert all(set(row) == COLUMNS | AGAINST_THE_BEST | AGAINST_THE_START for row in rows[1:4])
    about = {"final", "start_score", "start_score_se", "start_ratio"}
    assert set(rows[4]) == COLUMNS | AGAINST_THE_START | about
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["score_seconds"] <= line["seconds"] for line in lines)
    # differences are those of the scores
    for before, row in itertools.pairwise(rows[:4]):
        assert row["criterion_delta"] == pytest.approx(row["criterion"] - before["criterion"], abs=1e-6)
        assert row["start_delta"] == pytest.approx(row["score"] - rows[0]["score"], abs=1e-6)
    assert rows[4]["start_delta"] == pytest.approx(rows[4]["score"] - rows[4]["start_score"], abs=1e-6)


def test_first_iteration_has_steps_of_its_own(tmp_path):
    em = train(tmp_path, m_step={"first_steps": 7})
    assert [row["examples"] for row in em.rows] == [0, 7 * 16, 5 * 16, 5 * 16, 0]


def test_finished_run_does_nothing(whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}
    train(whole)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}


@pytest.mark.parametrize("batch", [7, 256])
def test_invariant_2_rows_do_not_depend_on_the_batch(batch, whole):
    stored = np.load(whole / "reconstructions.npy")
    for chunk in observations().chunks(size=batch):
        found = drawn(whole / "posterior", chunk, 4, purpose="end")
        np.testing.assert_allclose(found, stored[chunk], rtol=1e-4, atol=1e-5)


def test_invariant_4_every_observation_has_its_reconstruction(whole):
    data, x = observations(), np.load(whole / "reconstructions.npy")
    assert x.shape == data.y.shape
    assert x.dtype == np.float32
    y, params = data.batch(np.arange(len(data)))
    mask = np.broadcast_to(params["mask"].numpy(), x.shape)
    distance = [[np.abs(x[i] - y[j].numpy())[mask[j]].mean() for j in range(len(x))] for i in range(len(x))]
    own = np.diag(distance)
    assert own.max() < 0.5  # held-out ones included
    assert (own <= np.min(distance, 0) + 0.01).all()  # another digit may look the same in a few pixels
    told = mask.reshape(len(x), -1).sum(1) >= 8
    assert (np.argmin(distance, 0) == np.arange(len(x)))[told].all()


def test_changed_configuration_is_refused(whole):
    with pytest.raises(DiffemError) as caught:
        DiffEM(settings(m_step={"steps": 6}), observations(), whole)
    assert str(caught.value) == (
        f"{whole / 'config.yaml'}: m_step.steps differs from this run's, and only em.iterations and em.patience may be "
        f"raised; another run can go on from this one: --out OTHER --start.kind run --start.run {whole}"
    )
    for sections in ({"em": {"iterations": 2}}, {"em": {"iterations": 4, "refresh": 0.5}}, {"em": {"patience": 1}}):
        with pytest.raises(DiffemError, match=r"config\.yaml: em\.[a-z]+ differs from this run's"):
            DiffEM(settings(**sections), observations(), whole)
    with pytest.raises(DiffemError, match=r"config\.yaml: facts\.observations differs from this run's"):
        DiffEM(settings(), observations(50), whole)
    with pytest.raises(DiffemError, match=r"config\.yaml: facts\.digest differs from this run's"):
        DiffEM(settings(), observations(poison=observations().split(0)[1][:1]), whole)


@pytest.mark.parametrize("guard", [False, True])
def test_a_finished_run_of_more_iterations_goes_on(guard, tmp_path):
    before = train(tmp_path, em={"guard": guard, "iterations": 2})
    weights = load_file(tmp_path / "posterior" / "model.safetensors")
    kept = before.rows[-1]["final"]
    em, begun = make(tmp_path, em={"guard": guard, "iterations": 4}), []
    simulate = em.examples.simulate
    network = lambda: {k: v.clone() for k, v in em.trainer.denoiser.network.state_dict().items()}  # noqa: E731
    em.examples.simulate = lambda *given: (begun.append(network()), simulate(*given))[1]
    rows = list(em.iterate())
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.get("final") is not None for row in rows] == [False] * 5 + [True]
    assert rows[:3] == before.rows[:3]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["em"]["iterations"] == 4
    if kept:  # from the weights that it ended with
        assert all(torch.equal(v, weights[f"denoiser.network.{k}"]) for k, v in begun[0].items())
    assert [row["examples"] for row in rows] == [0, 80, 80, 80, 80, 0]
    again = list(make(tmp_path, em={"guard": guard, "iterations": 4}).iterate())
    assert again == rows


def test_a_run_that_goes_on_draws_no_number_again(tmp_path, monkeypatch):
    """Its iterations are counted on from the last one, where the final draws and the prior's updates had numbers, too."""
    used, generator, item_seeds = [], seeding.generator, seeding.item_seeds

    def keyed(seed, iteration, purpose, step=0, device="cpu"):
        used.append((iteration, purpose, step))
        return generator(seed, iteration, purpose, step, device)

    def items(seed, iteration, purpose, indices):
        used.extend((iteration, purpose, int(i)) for i in indices if len(indices) < 60)
        return item_seeds(seed, iteration, purpose, indices)

    monkeypatch.setattr(seeding, "generator", keyed)
    monkeypatch.setattr(seeding, "item_seeds", items)
    sections = {"em": {"guard": False, "iterations": 2, "refresh": 0.5}, "prior": {"kind": "unconditional", "steps": 3}}
    train(tmp_path, **sections)
    train(tmp_path, **{**sections, "em": {**sections["em"], "iterations": 5}})
    trains = [key for key in used if key[1] in ("m_step", "prior_step", "e_step")]
    ends = [key for key in used if key[1] == "end"]  # both runs end; numbers of their own each
    assert {key[1] for key in used} >= {"m_step", "prior_step", "e_step", "end"}
    assert len(set(trains)) == len(trains)
    assert len(set(ends)) == len(ends) == 120


def test_an_unfinished_run_of_more_iterations_is_the_longer_run(tmp_path):
    """The learning rate does not fall here, so that nothing hangs on how long the run was meant to be."""
    sections = {"m_step": {"schedule": "constant"}}
    train(tmp_path / "whole", **sections)
    em = make(tmp_path / "run", **sections, em={"iterations": 2})
    for row in em.iterate():
        if row["iteration"] == 1:
            break
    train(tmp_path / "run", **sections)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_checkpoint(share, whole, tmp_path):
    for name in ("run.json", "config.yaml", "reconstructions.npy"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    content, file = (whole / "checkpoint.safetensors").read_bytes(), tmp_path / "checkpoint.safetensors"
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DiffemError) as caught:
        list(DiffEM(settings(), observations(), tmp_path).iterate())
    assert str(caught.value).startswith(f"{file}: is damaged: ")
    assert str(caught.value).endswith("; no earlier one is left: remove it to start again")


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DiffemError, match=r"holds thesis\.tex but no run\.json, so it is not a run"):
        DiffEM(settings(), observations(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# --- held-out observations, and what they decide -------------------------------------------------------


def test_invariant_1_held_out_observations_do_not_train(tmp_path, monkeypatch):
    held_out = np.concatenate(observations().split(0)[1:])
    fitted, fit = [], starts.fit
    monkeypatch.setattr(
        starts, "fit", lambda config, data, rows, *rest: (fitted.append(rows), fit(config, data, rows, *rest))[1]
    )
    one, two = train(tmp_path / "one"), train(tmp_path / "two", observations(poison=held_out))
    assert len(held_out) == 6
    assert not set(np.concatenate(fitted)) & set(held_out)
    assert one.data.units == two.data.units
    assert all(row["accepted"] for row in one.rows + two.rows)
    for name in ("start", "posterior", "prior"):
        a, b = (load_file(em.run.folder / name / "model.safetensors") for em in (one, two))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    x, z = (np.load(em.run.folder / "reconstructions.npy") for em in (one, two))
    assert np.array_equal(x[one.train], z[one.train])
    assert not np.array_equal(x[held_out], z[held_out])


def halved(sampler, *arguments) -> Score:
    """A real score, but for half of the error where a network draws: so that iterations beat the start."""
    found = score(sampler, *arguments)
    return dataclasses.replace(found, items=found.items / 2) if isinstance(sampler, DiffusionSampler) else found


@pytest.mark.parametrize("part", ["test", "validation"])
def test_invariant_1_validation_observations_select_and_test_observations_report(part, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "score", halved)
    _, validation, test = observations(200).split(0)
    poison = test if part == "test" else validation
    sections = {"em": {"guard": True}}
    runs = [
        train(tmp_path / name, observations(200, poison=rows), **sections)
        for name, rows in (("one", None), ("two", poison))
    ]
    (*ours, last), (*theirs, other) = (bare(em.run.folder) for em in runs)
    # of the test part only the last row speaks, of the validation part only those before it, and decisions
    assert (ours == theirs) == (part == "test")
    reported = {k for k in last if k in ("log_score", "criterion") or k.startswith(("score_", "start_", "ratio"))}
    reported = {"score", *reported} - {"score_name", "start_ratio"}
    if part == "test":
        assert last["final"] > 0
        assert {k for k in last if last[k] != other[k]} - {"start_ratio"} == reported
        for name in ("start", "posterior", "prior"):
            a, b = (load_file(em.run.folder / name / "model.safetensors") for em in runs)
            assert all(torch.equal(a[k], b[k]) for k in a), name
        widths = [from_pretrained(em.run.folder / "posterior").sampler.width for em in runs]
        assert widths[0] == widths[1] == last["width"]
        x, z = (np.load(em.run.folder / "reconstructions.npy") for em in runs)
        rest = np.setdiff1d(np.arange(200), test)
        assert np.array_equal(x[rest], z[rest])
        assert not np.array_equal(x[test], z[test])
    else:
        scores = [row["score"] for row in ours], [row["score"] for row in theirs]
        assert all(a != b for a, b in zip(*scores, strict=True))
        assert last["start_score"] == other["start_score"]


@pytest.mark.parametrize("predictions", [6, 1000])
@pytest.mark.parametrize("guard", [False, True])
def test_what_is_scored_on_which_observations(guard, predictions, tmp_path, monkeypatch):
    calls = []

    def listen(sampler, data, rows, seed, draws, splits, batch):
        calls.append((rows.tolist(), splits, isinstance(sampler, DiffusionSampler), getattr(sampler, "width", None)))
        return halved(sampler, data, rows, seed, draws, splits, batch)

    monkeypatch.setattr(judging, "score", listen)
    monkeypatch.setattr(judging, "PREDICTIONS", predictions)
    monkeypatch.setattr(judging, "SPLITS", 3)
    monkeypatch.setattr(scores_module, "PREDICTIONS", predictions)
    em = train(tmp_path, observations(200), em={"guard": guard, "score_items": 6})
    assert (len(em.validation), len(em.test)) == (10, 10)
    some = evenly(em.validation, 6).tolist()
    assert calls[0] == (some, 3, False, None)
    assert calls[1:4] == [(some, 3, True, 1.0)] * 3
    *widths, start, last = calls[4:]
    # the end looks closer: at more observations, or splits of them
    splits = 1 if predictions == 6 else scores_module.MOST_SPLITS
    validation, test = (evenly(part, predictions).tolist() for part in (em.validation, em.test))
    assert all(call[:3] == (validation, splits, True) for call in widths)
    assert (len(widths) >= 2) == (len(widths) > 0) == guard
    assert len(widths) == len({call[3] for call in widths})  # none twice
    assert start == (test, splits, False, None)
    assert last == (test, splits, True, em.rows[-1]["width"])


def scores_of(monkeypatch, *iterations, ratios=lambda width: 1.0, test=(0.5, 0.4)) -> None:
    """The start and each iteration get these criteria, an error of 0.01 where two are given; then the ratios by which a
    width is chosen, and what test observations say of the start and of what the run ends with."""
    left, tested, ones = list(iterations), list(test), torch.ones(6)
    noise = torch.linspace(-1, 1, 6) / torch.linspace(-1, 1, 6).std() * 6**0.5 / 100

    def score(sampler, data, rows, seed, draws, splits, batch):
        if rows.tolist() == data.observations.split(seed)[2].tolist():
            return Score("crps", tested.pop(0) + noise)
        if splits == judging.SPLITS:  # the end looks closer
            value = left.pop(0)
            return Score("crps", (value[0] + noise) if isinstance(value, tuple) else torch.full((6,), value))
        spread = ratios(sampler.width) * ones
        return Score("crps", ones + 0 * spread, spread, ones, 0 * ones)

    monkeypatch.setattr(judging, "score", score)


def test_what_is_worse_is_refused_and_trains_nothing(tmp_path, monkeypatch):
    scores_of(monkeypatch, 0.5, 0.6, 0.7, 0.8, test=(0.9, 0.9))
    em = make(tmp_path, em={"guard": True})
    iterator = em.iterate()
    next(iterator)
    before = (tmp_path / "reconstructions.npy").read_bytes()
    model = (tmp_path / "posterior" / "model.safetensors").read_bytes()
    for _ in range(3):
        row = next(iterator)
        assert (row["accepted"], row["best"]) == (False, False)
        assert row["criterion_delta"] == pytest.approx(0.1 * row["iteration"])
        assert (tmp_path / "current.npy").read_bytes() == before
    last = next(iterator)
    assert list(iterator) == []
    assert [row["accepted"] for row in bare(tmp_path)] == [True, False, False, False, True]
    assert (last["iteration"], last["final"], last["best"], last["width"], last["network_evaluations"]) == (
        4,
        0,
        True,
        None,
        0,
    )
    assert last["score"] == last["start_score"] == pytest.approx(0.9)  # of test observations
    assert last["start_delta"] == 0
    for name in ("start", "posterior", "prior"):
        assert json.loads((tmp_path / name / "config.json").read_text())["kind"] == "mixture"
        assert (tmp_path / name / "model.safetensors").read_bytes() == model
    assert em.state.step == "done"
    assert (tmp_path / "reconstructions.npy").read_bytes() == before
    assert not (tmp_path / "next.npy").exists()
    assert not (tmp_path / "prior.json").exists()


@pytest.mark.parametrize("prior", ["unconditional", "joint"])
def test_invariant_5_a_run_holds_the_best_iteration_not_the_last(prior, tmp_path, monkeypatch):
    # the third one is accepted, and trains; the test observations, which think little of it all, decide nothing
    scores_of(monkeypatch, 0.5, 0.4, 0.45, (0.41, 0.01), test=(0.5, 0.9))
    em = make(tmp_path, em={"guard": True}, prior={"kind": prior})
    kept, trains, models = [], [], []
    begun, restart = [], Trainer.restart_from_average

    def listen(self):
        begun.append({k: v.clone() for k, v in self.averaged.network.state_dict().items()})
        restart(self)

    monkeypatch.setattr(Trainer, "restart_from_average", listen)
    for _row in em.iterate():
        kept.append((tmp_path / "reconstructions.npy").read_bytes())
        models.append((tmp_path / "posterior" / "model.safetensors").read_bytes())
        if em.state.step != "done":  # a run that is done has none
            trains.append((tmp_path / "current.npy").read_bytes())
    assert [row["accepted"] for row in em.rows] == [True, True, False, True, True]
    assert [row["best"] for row in em.rows] == [True, True, False, False, True]
    last = em.rows[-1]
    assert (last["final"], last["width"], last["network_evaluations"]) == (1, 1.0, 0)
    assert (last["start_score"], last["score"]) == (pytest.approx(0.5), pytest.approx(0.9))
    assert last["start_delta"] == pytest.approx(0.4)
    assert kept[0] != kept[1] == kept[2] == kept[3] == kept[4]
    assert models[0] != models[1] == models[2] == models[3] == models[4]
    assert trains[1] == trains[2] == kept[1] != trains[3]
    found = drawn(tmp_path / "posterior", np.arange(60), 1)
    np.testing.assert_allclose(found, np.load(tmp_path / "reconstructions.npy"), rtol=1e-4, atol=1e-5)
    weights = load_file(tmp_path / "posterior" / "model.safetensors")
    if prior == "unconditional":
        assert len(begun) == 1
        assert trains[4] == kept[4]  # it trains on what is kept,
        assert all(
            torch.equal(v, weights[f"denoiser.network.{k}"]) for k, v in begun[0].items()
        )  # from the weights that are kept
    else:
        assert not begun
        assert (tmp_path / "prior" / "model.safetensors").read_bytes() == models[4]


def test_patience_ends_the_run(tmp_path, monkeypatch):
    scores_of(monkeypatch, 0.5, 0.4, (0.4001, 0.01), 0.45)
    em = train(tmp_path, em={"guard": True, "iterations": 9, "patience": 2})
    assert [row["iteration"] for row in em.rows] == [0, 1, 2, 3, 4]
    assert [row.get("final") for row in em.rows] == [None] * 4 + [1]
    assert em.state.step == "done"


@pytest.mark.parametrize("guard", [False, True])
def test_a_run_of_no_iterations_is_the_start_and_is_tested(guard, tmp_path, monkeypatch):
    scores_of(monkeypatch, 0.5, test=(0.7, 0.7))
    em = train(tmp_path, em={"guard": guard, "iterations": 0})
    assert [(row["iteration"], row.get("final")) for row in em.rows] == [(0, None), (1, 0)]
    assert [row["score"] for row in em.rows] == [pytest.approx(0.5), pytest.approx(0.7)]
    assert em.rows[1]["start_score"] == em.rows[1]["score"]
    assert em.state.step == "done"
    assert json.loads((tmp_path / "posterior" / "config.json").read_text())["kind"] == "mixture"
    assert not (tmp_path / "current.npy").exists()


UNCERTAIN = 0.9 + 0.8 * torch.linspace(-1, 1, 6)  # ratios of six observations
CALIBRATED = {
    # (the width of the E-steps, the ratio of every width, what is chosen, which ones are scored)
    "honest": (1.0, lambda w: 0.99 if w == 1 else w, 1.0, [1.0, 1.5, 0.7]),
    "over-confident": (1.0, lambda w: w / 3.5, 4.0, [1.0, 1.5, 2.5, 4.0, 6.0]),
    "the one before is better": (1.0, lambda w: w / 2.9, 2.5, [1.0, 1.5, 2.5, 4.0]),
    "under-confident": (1.0, lambda w: w / 0.6, 0.7, [1.0, 1.5, 0.7, 0.5]),
    "to the widest": (1.0, lambda w: w / 100, 9.0, [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]),
    "to the narrowest": (1.0, lambda w: 100 * w, 0.5, [1.0, 1.5, 0.7, 0.5]),
    "as wide as it was": (4.0, lambda w: w / 3.5, 4.0, [1.0, 1.5, 2.5, 4.0, 6.0]),
    "of narrower draws": (0.6, lambda w: w / 1.6, 1.5, [1.0, 1.5, 2.5]),
    "better by less than its error": (1.0, lambda w: UNCERTAIN if w == 1 else w / 1.5, 1.0, [1.0, 1.5, 2.5]),
    "not a number": (1.5, lambda w: math.nan, 1.5, [1.0]),
    "plain DDPM": (0.0, lambda w: pytest.fail("is not scored"), 0.0, []),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_the_width_is_the_one_whose_criterion_is_least(name, tmp_path, monkeypatch):
    begin, ratio, chosen, widths = CALIBRATED[name]
    seen = []
    scores_of(monkeypatch, 0.5, 0.4, ratios=lambda width: seen.append(width) or ratio(width))
    em = train(tmp_path, em={"guard": True, "iterations": 1}, sampler={"width": begin})
    assert [row["width"] for row in em.rows] == [None, begin, chosen]
    assert seen == widths  # from 1 up and down, until it is worse, or there is no other one; each one once
    assert em.rows[2]["final"] == 1
    assert from_pretrained(tmp_path / "posterior").sampler.width == chosen
    anew = chosen != begin  # then everything is drawn again
    assert em.rows[2]["network_evaluations"] == 60 * 4 * anew
    found = drawn(tmp_path / "posterior", np.arange(60), 1 + anew, purpose="end" if anew else "e_step")
    np.testing.assert_allclose(found, np.load(tmp_path / "reconstructions.npy"), rtol=1e-4, atol=1e-5)


def test_wider_draws_have_a_larger_ratio(whole):
    """Of a network that was hardly trained, too."""
    posterior, ratios = from_pretrained(whole / "posterior"), []
    sampler, data = posterior.sampler, Dataset(observations(200), posterior.units)
    for width in samplers.WIDTHS:
        sampler.width = width
        ratios.append(score(sampler, data, np.arange(200), 0, draws=2, splits=2).ratio)
    assert ratios == sorted(ratios)
    assert ratios[-1] > 1.3 * ratios[0]


def test_without_a_guard_the_width_is_what_was_asked_for(tmp_path, monkeypatch):
    scores_of(monkeypatch, 0.5, 0.6, 0.7, 0.8, ratios=lambda width: pytest.fail("is not scored"))
    em = train(tmp_path, sampler={"width": 0.3})
    assert [row["width"] for row in em.rows] == [None] + [0.3] * 4
    assert [row.get("final") for row in em.rows] == [None] * 4 + [3]


def test_the_last_reconstructions_are_all_drawn_from_the_last_posterior(tmp_path):
    em = train(tmp_path, em={"refresh": 0.5})
    assert em.rows[-1]["network_evaluations"] == 60 * 4
    assert 0 < em.rows[-2]["network_evaluations"] - 3 * 80 < 60 * 4
    found = drawn(tmp_path / "posterior", np.arange(60), 4, purpose="end")
    np.testing.assert_allclose(found, np.load(tmp_path / "reconstructions.npy"), rtol=1e-4, atol=1e-5)


# --- what trains: reconstructions of training observations, and nothing else ----------------------------


def spy(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor, dict, float, Callable | None]]:
    """The batches (clean, y, params, dropout, weigh) that reach the loss, in model units."""
    batches, loss = [], Denoiser.loss

    def listen(self, x, y, params, generator, dropout=0.0, weigh=None, rows=slice(None)):
        if len(x) > 2:  # two items are tried for how much memory they take
            batches.append((x.clone(), y.clone(), params, dropout, weigh))
        return loss(self, x, y, params, generator, dropout, weigh, rows)

    monkeypatch.setattr(Denoiser, "loss", listen)
    return batches


def model_units(out: Path, em: DiffEM, rows: np.ndarray) -> torch.Tensor:
    return em.data.units.scale(torch.from_numpy(np.load(out / "reconstructions.npy")[rows]))


def among(x: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return (x[:, None] == items).flatten(2).all(2).any(1)


def test_prior_trains_on_training_reconstructions(tmp_path, monkeypatch):
    batches = spy(monkeypatch)
    em = train(tmp_path, prior={"steps": 40})
    batches = batches[-40:]
    assert all((dropout, weigh) == (1, None) for *_, dropout, weigh in batches)  # without observations
    x = torch.cat([b[0] for b in batches])
    assert among(x, model_units(tmp_path, em, em.train)).all()
    assert among(model_units(tmp_path, em, em.train), x).float().mean() > 0.9
    assert not among(model_units(tmp_path, em, np.concatenate((em.validation, em.test))), x).any()
    posterior, prior = (load_file(tmp_path / n / "model.safetensors") for n in ("posterior", "prior"))
    assert any(not torch.equal(posterior[k], prior[k]) for k in prior if k.startswith("denoiser.network."))
    samplers = [from_pretrained(tmp_path / name) for name in ("posterior", "prior")]
    assert [(p.sampler.settings.steps, p.sampler.width) for p in samplers] == [(3, 1.0), (4, 1.0)]
    about = json.loads((tmp_path / "prior.json").read_text())
    assert (about["steps"], about["examples"]) == (40, 40 * 16)


def test_joint_prior_is_the_posterior_with_all_of_its_variance(tmp_path, monkeypatch):
    scores_of(monkeypatch, 0.5, 0.4, ratios=lambda w: w / 3.5)
    train(tmp_path, prior={"kind": "joint"}, em={"guard": True, "iterations": 1})
    prior, posterior = (tmp_path / name / "model.safetensors" for name in ("prior", "posterior"))
    assert prior.read_bytes() == posterior.read_bytes()
    prior, posterior = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("prior", "posterior"))
    assert (prior["sampler"].pop("width"), posterior["sampler"].pop("width")) == (
        1.0,
        4.0,
    )  # the width was chosen for the posterior
    assert posterior.pop("scores")["score"] == pytest.approx(0.4)  # they are scores of posterior draws
    assert prior == posterior
    assert not (tmp_path / "prior.json").exists()


@pytest.mark.parametrize("flip", [False, True])
def test_flip_mirrors_half_of_the_items(flip, tmp_path, monkeypatch):
    batches = spy(monkeypatch)
    em = DiffEM(
        settings(
            em={"iterations": 1},
            m_step={"first_steps": 40, "flip": flip, "thinned": 0.0, "imputed_weight": 1.0},
        ),
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
    noise = em.data.corruption.noise
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
    theirs = em.data.units.scale(torch.from_numpy(examples).float())
    items = torch.cat((items, model_units(tmp_path / "run", em, em.train)))  # of the start, of the last iteration
    x = torch.cat([b[0] for b in batches])
    mine, reconstructed = among(x, theirs), among(x, items)
    assert (mine ^ reconstructed).all()
    found = mine.float().mean().item()
    assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / len(x)) + 1e-6
    if share:
        counts = (x[:, None] == theirs).flatten(2).all(2).sum(0)
        assert (counts > 0.6 * mine.sum() / 4).all()  # all four of them
        x, y, params, *_ = batches[0]
        noise, whose = em.data.corruption.noise, among(x, theirs)
        assert (
            (x - y)[params["mask"] & whose[:, None, None, None]].abs() < 5 * noise
        ).all()  # corrupted like the others
        assert not y[~params["mask"]].any()


def test_clean_examples_train(whole, tmp_path):
    given = {"clean_examples": clean_file(tmp_path, clean(4)[0].numpy()), "clean_share": 0.5}
    train(tmp_path / "run", m_step=given)
    ours, theirs = (load_file(p / "posterior" / "model.safetensors") for p in (tmp_path / "run", whole))
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours if k.startswith("denoiser.network."))


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


# --- what the M-step sees of real observations, and what an imputed entry weighs ---------------------------


class Watched:
    """A run of two iterations whose M-step is watched: every batch, and the items and observations behind it."""

    def __init__(self, tmp_path: Path, monkeypatch, data: Observations | None = None, **m_step) -> None:
        found = spy(monkeypatch)
        data = data or observations(200)
        steps = {"first_steps": 30, "steps": 30, **m_step}
        self.em = DiffEM(settings(em={"iterations": 2}, m_step=steps), data, tmp_path / "run")
        self.y, params = self.em.data.batch(self.em.train)
        self.mask = params["mask"]
        self.iterations: list[tuple[torch.Tensor, list]] = []  # what was reconstructed, and the batches made of it
        rows = self.em.iterate()
        next(rows)
        for _ in range(2):
            items = self.em.items("current")[self.em.train]
            found.clear()
            assert next(rows)["accepted"]
            self.iterations.append((items, list(found)))

    def batches(self, iteration: int, mirrored: bool = False):
        """Items that are reconstructions, or mirrored ones: (y, mask, W of ones) of each; and the whole y, the mask and the
        item behind it, all of them mirrored then."""
        items, batches = self.iterations[iteration]
        items, y, mask = ((v.flip(-1) if mirrored else v) for v in (items, self.y, self.mask))
        parts = []
        for x, seen, params, _, weigh in batches:
            same = (x[:, None] == items).flatten(2).all(2)
            whose, which = same.any(1), same.long().argmax(1)
            weight = None if weigh is None else weigh(torch.ones_like(x))[whose]
            of = which[whose]
            parts.append((seen[whose], params["mask"][whose], weight, y[of], mask[of], items[of]))
        return [None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)]


def shows_a_part(y: torch.Tensor, mask: torch.Tensor, real: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Which observations are a part of the real ones, with the very values: simulated ones have noise of their own."""
    values = torch.isclose(y, torch.where(mask, real, 0.0), rtol=1e-6, atol=1e-6)
    return (values & (whole | ~mask)).flatten(1).all(1)


@pytest.mark.parametrize("weight", [0.01, 0.5])
def test_every_item_of_the_first_passes_shows_a_part_of_its_real_observation(weight, tmp_path, monkeypatch):
    watched = Watched(tmp_path, monkeypatch, imputed_weight=weight)
    y, mask, _, real, whole, _ = watched.batches(0)
    assert len(y) == 30 * 16
    assert shows_a_part(y, mask, real, whole).all()
    hidden, seen = (whole & ~mask).sum().item(), whole.sum().item()
    assert abs(hidden / seen - 0.25) < 4 * math.sqrt(0.25 * 0.75 / seen)  # what two other masks of a half miss
    assert ((whole & ~mask).flatten(1).sum(1) > 0).float().mean() > 0.8  # of each, not of some


PASSED = 30 * 16 / 180  # passes over the training observations in an iteration of `Watched`
LATER = sum(30 / k for k in range(30, 60)) / 30  # the mean of PASSES / n in the second one, if PASSES are in the first


def test_after_n_passes_a_share_of_the_items_that_falls_as_1_over_n_does(tmp_path, monkeypatch):
    assert trainer_module.PASSES > 2 * PASSED
    monkeypatch.setattr(trainer_module, "PASSES", PASSED)
    watched = Watched(tmp_path, monkeypatch)
    assert shows_a_part(*(watched.batches(0)[k] for k in (0, 1, 3, 4))).all()
    y, mask, _, real, whole, items = watched.batches(1)
    split, n = shows_a_part(y, mask, real, whole), len(y)
    assert n == 30 * 16
    assert abs(split.float().mean() - LATER) < 4 * 0.5 / math.sqrt(n)
    early, late = split[: n // 2].float().mean(), split[n // 2 :].float().mean()
    assert early - late > 0.1  # 0.81 and 0.58
    hidden, seen = (whole & ~mask)[split].sum().item(), whole[split].sum().item()
    assert abs(hidden / seen - 0.25) < 4 * math.sqrt(0.25 * 0.75 / seen)  # what two other masks of a half miss
    # the others are simulated: of the reconstruction, through a mask of their own, with the noise
    noise = watched.em.data.corruption.noise
    assert (items - y)[~split][mask[~split]].square().mean().sqrt() == pytest.approx(noise, rel=0.05)
    agree = (mask == whole)[~split].float().mean()
    assert agree == pytest.approx(0.5, abs=0.03)


def test_mirrored_items_and_clean_examples_are_never_shown_a_real_observation(tmp_path, monkeypatch):
    examples = 3 * np.random.default_rng(5).standard_normal((4, *SHAPE))
    given = {"clean_examples": clean_file(tmp_path, examples), "clean_share": 0.3, "flip": True}
    monkeypatch.setattr(trainer_module, "PASSES", PASSED)
    watched = Watched(tmp_path, monkeypatch, **given)
    noise, units = watched.em.data.corruption.noise, watched.em.data.units
    theirs = units.scale(torch.from_numpy(examples).float())
    for iteration, share in ((0, 1.0), (1, LATER)):
        y, mask, _, real, whole, _ = watched.batches(iteration)
        assert 0.25 * 480 < len(y) < 0.45 * 480
        assert (
            abs(shows_a_part(y, mask, real, whole).float().mean() - share)
            < 4 * 0.5 / math.sqrt(len(y)) * (share < 1) + 1e-6
        )
        y, mask, _, real, whole, items = watched.batches(iteration, mirrored=True)
        assert 0.25 * 480 < len(y) < 0.45 * 480
        assert not shows_a_part(y, mask, real, whole).any()
        assert not shows_a_part(y, mask, real.flip(-1), whole.flip(-1)).any()
        assert (items - y)[mask].square().mean().sqrt() == pytest.approx(noise, rel=0.05)
        _, batches = watched.iterations[iteration]
        x, y, mask = (torch.cat([(*b[:2], b[2]["mask"])[i] for b in batches]) for i in range(3))
        mine = among(x, torch.cat((theirs, theirs.flip(-1))))
        assert 0.2 * 480 < mine.sum() < 0.4 * 480
        assert (x - y)[mine][mask[mine]].square().mean().sqrt() == pytest.approx(noise, rel=0.05)


@pytest.mark.parametrize("weight", [0.01, 0.5])
@pytest.mark.parametrize("iteration", [0, 1])
def test_entries_weigh_what_the_source_observation_measured_of_them(iteration, weight, tmp_path, monkeypatch):
    examples = 3 * np.random.default_rng(5).standard_normal((4, *SHAPE))
    given = {"clean_examples": clean_file(tmp_path, examples), "clean_share": 0.3, "flip": True}
    watched = Watched(tmp_path, monkeypatch, imputed_weight=weight, **given)
    noise, units = watched.em.data.corruption.noise, watched.em.data.units
    measured = 1 / (1 + (noise / 0.5) ** 2)  # of an entry that was seen: all of it, but for the noise
    assert 0.99 < measured < 1
    for mirrored in (False, True):
        _, shown, found, _, whole, _ = watched.batches(iteration, mirrored)
        expected = torch.where(whole, weight + (1 - weight) * measured, weight)
        torch.testing.assert_close(found, expected)
        assert (shown != whole).any()  # it is not what was shown that counts
        assert (whole != whole.flip(-1)).any()
    theirs = units.scale(torch.from_numpy(examples).float())
    theirs, some = torch.cat((theirs, theirs.flip(-1))), 0
    for x, *_, weigh in watched.iterations[iteration][1]:
        mine = among(x, theirs)
        some += int(mine.sum())
        assert torch.equal(weigh(x)[mine], x[mine])  # 1 everywhere
        # W is linear, symmetric and, of a mask, diagonal
        a, b = (torch.randn(x.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
        torch.testing.assert_close(weigh(a), a * weigh(torch.ones_like(a)))
        torch.testing.assert_close(weigh(a + 2 * b), weigh(a) + 2 * weigh(b))
    assert some > 50


class Paper(DiffEM):
    """The loop of the paper: its loss sees reconstructions and what is simulated of them, and no observation."""

    def losses(self, x, generator, dropout):
        config, corruption = self.config.m_step, self.data.corruption
        clean = x[self.train[torch.randint(len(self.train), (config.batch,), generator=generator).numpy()]]
        y, params = corruption.observe(clean, generator)
        kept, _ = corruption.thin(y, params, generator)
        thinned = (torch.rand(len(clean), generator=generator) < config.thinned)[:, None, None, None]
        mask, y = torch.where(thinned, kept[1]["mask"], params["mask"]), torch.where(thinned, kept[0], y)
        return [self.trainer.denoiser.loss(clean, y, {"mask": mask}, generator, dropout)]


def test_where_imputed_entries_weigh_as_much_the_loop_is_that_of_the_paper(tmp_path, monkeypatch):
    batches = spy(monkeypatch)
    sections = {"m_step": {"imputed_weight": 1.0}}
    for name, kind in (("ours", DiffEM), ("paper", Paper)):
        for _row in make(tmp_path / name, kind=kind, **sections).iterate():
            pass
    assert len(batches) == 2 * (15 + 5)
    assert all(weigh is None for *_, weigh in batches)
    assert_same(tmp_path / "ours", tmp_path / "paper")
    assert bare(tmp_path / "ours") == bare(tmp_path / "paper")
    train(tmp_path / "weighted")  # which is another loop
    ours, other = (load_file(tmp_path / n / "posterior" / "model.safetensors") for n in ("ours", "weighted"))
    assert any(not torch.equal(ours[k], other[k]) for k in ours)


def observed_by(corruption, shape) -> Observations:
    generator = torch.Generator().manual_seed(0)
    y, params = corruption.observe(torch.randn(60, *shape, generator=generator), generator)
    return Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()})


def test_projections_are_split_and_weighed_too(tmp_path, monkeypatch):
    batches, generator = spy(monkeypatch), torch.Generator().manual_seed(1)
    data = observed_by(RandomProjection(3, 0.1), (6,))
    em = DiffEM(settings(em={"iterations": 1}, m_step={"imputed_weight": 0.2}), data, tmp_path)
    rows = em.iterate()
    next(rows)
    items = model_units(tmp_path, em, em.train)
    next(rows)
    real, source = em.data.batch(em.train)
    for x, y, shown, _, weigh in batches:
        of = (x[:, None] == items).flatten(2).all(2).long().argmax(1)
        theirs = {k: v[of] for k, v in source.items()}
        a = torch.randn(x.shape, generator=generator)
        torch.testing.assert_close(weigh(a), 0.2 * a + 0.8 * em.data.corruption.measured(a, theirs))
        kept = (shown["matrix"] != 0).any(-1)  # one row is gone
        assert (kept.sum(1) == 2).all()
        assert torch.equal(shown["matrix"], theirs["matrix"] * kept[..., None])
        torch.testing.assert_close(y, real[of] * kept)


def test_a_projection_on_a_single_row_is_shown_simulated(tmp_path, monkeypatch):
    """Thinning hides the only row: a real observation would show nothing."""
    batches, data = spy(monkeypatch), observed_by(RandomProjection(1, 0.1), (6,))
    train(tmp_path, data, em={"iterations": 1, "guard": False}, m_step={"imputed_weight": 0.2, "thinned": 0.0})
    assert batches
    assert all((shown["matrix"] != 0).all() for _, _, shown, *_ in batches)


@pytest.mark.parametrize(("corruption", "shape"), [(GaussianBlur(1.0, 0.1), SHAPE), (GaussianNoise(0.3), (6,))])
def test_where_all_observations_measure_the_same_the_loop_is_that_of_the_paper(
    corruption, shape, tmp_path, monkeypatch
):
    batches, data = spy(monkeypatch), observed_by(corruption, shape)
    for name, weight in (("whole", 1.0), ("weighed", 0.2)):
        train(tmp_path / name, data, em={"iterations": 1, "guard": False}, m_step={"imputed_weight": weight})
    assert all(weigh is None for *_, weigh in batches)
    assert_same(tmp_path / "weighed", tmp_path / "whole")


@pytest.mark.parametrize("what", ["poisoned", "deleted"])
def test_invariant_1_clean_items_do_not_train(what, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                **SETTINGS,
                "data": {
                    "source": "digits",
                    "limit": 40,
                    "corruption": {"name": "RandomMask", "rate": 0.5, "noise": 0.1},
                },
                "em": {"iterations": 2, "guard": False},
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
    em = make(tmp_path / "run")
    em.hooks = [against(x.numpy())]
    rows = list(em.iterate())
    columns = {"psnr", "energy_distance", "precision", "recall", "density", "coverage"}
    assert all(row["clean"].keys() == columns for row in rows)
    assert_same(tmp_path / "run", whole)
    assert [{k: v for k, v in row.items() if k != "clean"} for row in bare(tmp_path / "run")] == bare(whole)
    last, truth = model_units(tmp_path / "run", em, np.arange(60)), em.data.units.scale(x)
    assert rows[-1]["clean"]["psnr"] == pytest.approx(-10 * math.log10((last - truth).square().mean() / 4), rel=1e-5)
    assert rows[-1]["clean"]["energy_distance"] == pytest.approx(
        metrics.energy_distance(last, truth, of_one_row=True), rel=1e-5
    )


def test_reference_of_another_shape_is_refused(tmp_path):
    em = make(tmp_path / "run")
    em.hooks = [against(clean()[0][1:].numpy())]
    with pytest.raises(DiffemError) as caught:
        next(em.iterate())
    assert str(caught.value) == "reference: shape (59, 1, 4, 4), but the reconstructions have (60, 1, 4, 4)"


def test_features_of_a_reference_add_a_frechet_distance(whole, tmp_path):
    x, features = clean()[0], lambda a: a.flatten(1)[:, :3]
    em = make(tmp_path / "run")
    em.hooks = [against(x.numpy(), features)]
    rows = list(em.iterate())
    assert_same(tmp_path / "run", whole)
    last, truth = model_units(tmp_path / "run", em, np.arange(60)), em.data.units.scale(x)
    expected = metrics.frechet_distance(features(last), features(truth))
    assert rows[-1]["clean"]["frechet"] == pytest.approx(expected, rel=1e-4)


def test_rows_say_what_scores_took(tmp_path, monkeypatch):
    score = judging.score

    def slow(*arguments):
        time.sleep(0.05)
        return score(*arguments)

    monkeypatch.setattr(judging, "score", slow)
    rows = list(DiffEM(settings(), observations(), tmp_path).iterate())
    assert all(0.05 <= row["score_seconds"] <= row["seconds"] for row in rows)


# --- the start from an earlier run ----------------------------------------------------------------------


@pytest.mark.parametrize("network", [{}, UNET], ids=["mlp", "unet"])
def test_start_from_a_run(network, whole, tmp_path):
    if network:
        whole = tmp_path / "whole"
        train(whole, network=network)
    other = observations()
    other.y = 3 * other.y + 1
    em = train(tmp_path / "run", other, start={"kind": "run", "run": str(whole)}, em={"iterations": 0}, network=network)
    posterior = from_pretrained(whole / "posterior")
    assert em.data.units == posterior.units != other.units(em.train)
    x, earlier = np.load(tmp_path / "run" / "reconstructions.npy"), posterior.sampler
    assert isinstance(earlier, DiffusionSampler)
    for rows in other.chunks(size=16):
        assert np.array_equal(x[rows], drawn(whole / "posterior", rows, 0, other))
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


# --- what is not finite ------------------------------------------------------------------------------------


def exploding(monkeypatch, times: int) -> None:
    """Draws of observation 20 in iteration 1 are not finite, so often."""
    draw, left = DiffusionSampler.draw, [times]

    def explode(self, y, params, seeds, withheld=None):
        x = draw(self, y, params, seeds, withheld)
        hit = seeds == seeding.item_seeds(0, 1, "e_step", [20])
        if hit.any() and left[0]:
            left[0] -= 1
            x[hit] = torch.nan
        return x

    monkeypatch.setattr(DiffusionSampler, "draw", explode)


def test_draws_that_stay_not_finite_end_the_run(tmp_path, monkeypatch):
    exploding(monkeypatch, 99)
    with pytest.raises(DiffemError) as caught:
        train(tmp_path)
    assert str(caught.value) == (
        "training: the draws of 1 observations (first: 20) are not finite at iteration 1, also at a 16th of "
        "m_step.learning_rate; lower it, or look at the observations"
    )
    monkeypatch.undo()  # the same command goes on
    em = train(tmp_path)
    assert [row["failures"] for row in em.rows] == [0, 4, 4, 4, 4]


def test_draws_of_the_start_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    draw = MixtureSampler.draw
    monkeypatch.setattr(MixtureSampler, "draw", lambda *given: draw(*given) * math.nan)
    with pytest.raises(DiffemError) as caught:
        train(tmp_path)
    assert str(caught.value) == "start: the draws of 16 observations (first: 0) are not finite at iteration 0"


@pytest.mark.parametrize("what", ["draws", "loss", "last loss", "last gradient"])
def test_what_is_not_finite_rolls_back_to_the_last_commit_at_half_the_learning_rate(what, tmp_path, monkeypatch):
    rates: list[float] = []
    begun: list[dict] = []
    update = Trainer.update

    def listen(self, losses, rate):
        if self.updates in (0, 5):  # an M-step begins
            begun.append({k: v.clone() for k, v in self.denoiser.network.state_dict().items()})
        failed = len(rates) == {"loss": 3, "last loss": 4}.get(what)
        rates.append(math.nan if failed else rate)
        done = update(self, [loss * (math.nan if failed else 1.0) for loss in losses], rate)
        if what == "last gradient" and len(rates) == 5:  # a finite loss does not tell it
            self.weights[0].data.fill_(math.nan)
        return done

    monkeypatch.setattr(Trainer, "update", listen)
    if what == "draws":
        exploding(monkeypatch, 1)
    em = train(tmp_path, em={"iterations": 2}, m_step={"schedule": "constant"}, prior={"kind": "joint"})
    assert [row["failures"] for row in em.rows] == [0, 1, 1, 1]
    whole = em.config.m_step.learning_rate
    first = {"draws": [whole] * 5, "loss": [whole] * 3 + [math.nan, whole], "last loss": [whole] * 4 + [math.nan]}
    first["last gradient"] = [whole] * 5
    first = first[what]  # a loss is read during the next update
    np.testing.assert_array_equal(rates, [*first, *[whole / 2] * 10])
    assert all(torch.equal(begun[0][k], begun[1][k]) for k in begun[0])  # the weights before it
    assert any(not torch.equal(begun[1][k], begun[2][k]) for k in begun[0])
    assert not (tmp_path / "good.safetensors").exists()
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / "posterior" / "model.safetensors").values())


def test_a_prior_whose_last_update_spoils_it_is_trained_again(tmp_path, monkeypatch):
    update = Trainer.update

    def spoil(self, losses, rate):
        done = update(self, losses, rate)
        if rate == spoiling[0]:  # the second one; the first after the rollback has half of it
            self.weights[0].data.fill_(math.nan)
            spoiling[0] = None
        return done

    spoiling = [None]
    em = make(tmp_path, em={"iterations": 1}, prior={"steps": 2})
    for _ in em.iterate():
        if em.state.step == "prior":
            monkeypatch.setattr(Trainer, "update", spoil)
            spoiling[0] = em.config.m_step.rate(1 / 2)
    assert spoiling == [None]
    weights = load_file(tmp_path / "prior" / "model.safetensors")
    assert all(v.isfinite().all() for v in weights.values())


def test_what_does_not_change_the_result_may_change_when_a_run_goes_on(tmp_path):
    rows = make(tmp_path).iterate()
    next(rows)
    rows.close()
    other = settings(m_step={"micro_batch": 3})
    again = DiffEM(other, observations(), tmp_path, batch=7, checkpoint_minutes=1, device="cpu", precision="float32")
    assert len(list(again.iterate())) == len(train(tmp_path / "whole").rows)


def test_spoilt_weights_are_not_saved(tmp_path, monkeypatch):
    """Also if the run is stopped before the loss that tells it was read."""
    em, update = make(tmp_path), Trainer.update

    def spoil(self, losses, rate):
        factor = 1.0
        if self.updates == 3:
            factor, em.stop = math.nan, die_softly
        return update(self, [loss * factor for loss in losses], rate)

    monkeypatch.setattr(Trainer, "update", spoil)
    with pytest.raises(KeyboardInterrupt):
        list(em.iterate())
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert saved["updates"] == 3
    assert all(v.isfinite().all() for v in saved.values())


def test_metrics_are_json_of_finite_numbers(tmp_path, monkeypatch):
    certain = Score("crps", torch.ones(6), torch.zeros(6), torch.ones(6), torch.zeros(6))  # agree, and are wrong
    assert certain.criterion == math.inf
    monkeypatch.setattr(judging, "score", lambda *given: certain)
    train(tmp_path, em={"iterations": 1, "guard": True})
    text = (tmp_path / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    assert [row["criterion"] for row in rows] == [None, None, None]


def test_e_steps_renoise_the_last_reconstructions_and_the_end_draws_all_anew(tmp_path):
    em = make(tmp_path, em={"iterations": 3, "guard": False}, sampler={"steps": 6})
    rows, x = em.iterate(), []
    taken = []
    for _ in range(4):
        taken.append(next(rows)["network_evaluations"])
        x.append(torch.from_numpy(np.array(em.run.array("current"))))
        saved = from_pretrained(tmp_path / "posterior")
    y, params = observations().batch(np.arange(60))
    seeds = seeding.item_seeds(0, 3, "e_step", range(60))
    sampler, data = saved.sampler, em.data
    scaled = data.batch(np.arange(60))
    renoised = sampler.renoise(data.units.scale(x[2]), *scaled, seeds)
    torch.testing.assert_close(data.units.restore(renoised), x[3], rtol=1e-4, atol=1e-4)
    assert (x[3] - saved.sample(y, params, seeds=seeds)[0]).abs().max() > 1e-2  # from pure noise
    assert taken[1] == 3 * 80 + 60 * 7
    assert taken[2] == taken[3] == 3 * 80 + 60 * 3
    for _ in rows:
        pass
    last = drawn(tmp_path / "posterior", np.arange(60), 4, purpose="end")
    np.testing.assert_allclose(np.load(tmp_path / "reconstructions.npy"), last, rtol=1e-4, atol=1e-4)


def test_e_steps_begin_from_pure_noise_where_all_observations_measure_the_same(tmp_path):
    x, generator = clean(60)
    blur = GaussianBlur(1.0, 0.05)
    data = Observations(blur.apply(x, {}, generator).numpy(), blur)
    em = make(tmp_path, data, em={"iterations": 2, "guard": False}, sampler={"steps": 6})
    taken = [row["network_evaluations"] for row in em.iterate()]
    assert taken == [0, 3 * 80 + 60 * 7, 3 * 80 + 60 * 7, 0]  # the last draws are those of the second iteration
    last = drawn(tmp_path / "posterior", np.arange(60), 2, data)
    np.testing.assert_allclose(np.load(tmp_path / "reconstructions.npy"), last, rtol=1e-4, atol=1e-4)


def test_refresh_replaces_its_fraction_and_keeps_the_rest(tmp_path):
    em = make(tmp_path, em={"refresh": 0.5, "iterations": 2})
    rows = em.iterate()
    next(rows)
    before = np.array(em.run.array("current"))
    row = next(rows)
    x = np.array(em.run.array("current"))
    fresh = ~(x == before).all((1, 2, 3))
    assert row["network_evaluations"] == 3 * 80 + 4 * fresh.sum()
    assert abs(fresh.sum() - 30) < 4 * math.sqrt(15)
    found = drawn(tmp_path / "posterior", np.arange(60), 1)
    np.testing.assert_allclose(x[fresh], found[fresh], rtol=1e-4, atol=1e-5)


EVENTS = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
import test_em
from pathlib import Path
from diffem import files

def run(out, last):
    # dies at event `last`: before and after every file, and at every piece of progress; says how many there were
    torch.set_num_threads(1)
    count = 0
    def event(*arguments):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    def watched(write):
        def written(*arguments):
            event()
            write(*arguments)
            event()
        return written
    for name in ("replace", "link"):
        setattr(files, name, watched(getattr(files, name)))
    em = test_em.make(Path(out), em={{"guard": True, "refresh": 0.5, "patience": 2}})
    em.progress = event
    list(em.iterate())
    return count

def child(out, last):
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.write(writer, str(run(out, last)).encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(process, 0)[1]
    return os.read(reader, 99), status

events = int(child({folder!r} + "/whole", 0)[0])
print(events)
for k in range(20):
    last = 1 + (k * (events - 2) + 7 * k) // 19 % events
    out = {folder!r} + f"/{{k}}"
    assert os.WTERMSIG(child(out, last)[1]) == signal.SIGKILL, last
    assert child(out, 0)[1] == 0, last
"""


def test_invariant_3_kill_nine_at_twenty_moments(tmp_path):
    code = EVENTS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 100
    for k in range(20):
        assert_same(tmp_path / str(k), tmp_path / "whole")
        assert bare(tmp_path / str(k)) == bare(tmp_path / "whole")
        files = {p.relative_to(tmp_path / str(k)) for p in (tmp_path / str(k)).rglob("*") if p.is_file()}
        assert files == {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()}


def test_an_e_step_goes_on_where_it_was_killed(tmp_path):
    start_and_die(tmp_path, "e_step")
    seen: list[Progress] = []
    em = make(tmp_path)
    em.progress = seen.append
    rows = em.iterate()
    while next(rows)["iteration"] < 2:
        pass
    # 32 observations were done, and 16 of them are known to be on the disk
    assert [p.done for p in seen if (p.step, p.iteration) == ("e_step", 2)] == [32, 48, 60]


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_start_goes_on_where_it_was_killed(done, tmp_path, monkeypatch):
    """Each candidate is fitted once; random numbers are those of an uninterrupted run."""
    sections = {"start": {"components": [1, 2], "ranks": [1, 2]}, "em": {"iterations": 0}}
    train(tmp_path / "whole", **sections)
    fitted, converge = [], starts.converge

    def stop_at_the_third(guess, *rest):
        if len(fitted) == done:
            raise KeyboardInterrupt
        fitted.append((guess.components, guess.rank))
        return converge(guess, *rest)

    monkeypatch.setattr(starts, "converge", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", **sections)
    monkeypatch.setattr(
        starts, "converge", lambda *given: (fitted.append((given[0].components, given[0].rank)), converge(*given))[1]
    )
    train(tmp_path / "run", **sections)
    assert fitted == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "start.json").read_text() == (tmp_path / "whole" / "start.json").read_text()
    assert not (tmp_path / "run" / "partial").exists()


def test_a_start_of_other_settings_takes_nothing_over(tmp_path, monkeypatch):
    other = {"start": {"components": [1], "ranks": [2], "tolerance": 9.0}, "em": {"iterations": 0}}
    train(tmp_path / "whole", **other)
    one, spread = {"start": {"components": [1, 2], "ranks": [2]}, "em": {"iterations": 0}}, starts.spread
    monkeypatch.setattr(starts, "spread", lambda *given: die_softly())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", **one)
    assert (tmp_path / "run" / "partial").exists()
    monkeypatch.setattr(starts, "spread", spread)
    train(tmp_path / "run", **other)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_two_runs_in_one_folder(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    rows = one.iterate()
    next(rows)
    with pytest.raises(DiffemError) as caught:
        next(two.iterate())
    assert str(caught.value) == f"{tmp_path}: another process runs here; wait for it, or use another --out"
    rows.close()  # it is free again
    assert [row["iteration"] for row in two.iterate()] == [0, 1, 2, 3, 4]


def test_invariant_8_a_folder_that_is_no_run_is_not_touched(tmp_path):
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / "thesis.tex").write_text("mine")
    (tmp_path / "config.yaml").write_text("mine: 1")
    with pytest.raises(DiffemError, match=r"holds (prior|config\.yaml) but no run\.json, so it is not a run"):
        make(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1"
    assert (tmp_path / "prior" / "thesis.tex").read_text() == "mine"


def test_the_constructor_writes_nothing(tmp_path):
    make(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_invariant_2_the_callers_generators_are_left_as_they_were(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(tmp_path, em={"iterations": 1})
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_a_hook_adds_to_the_rows_and_decides_nothing(whole, tmp_path):
    em = make(tmp_path / "run")
    em.hooks = [lambda em, row: {"mine": em.state.iteration}, lambda em, row: None]
    assert [row["mine"] for row in em.iterate()] == [0, 1, 2, 3, 4]
    assert_same(tmp_path / "run", whole)


# --- what a reviewer found ----------------------------------------------------------------------------------


def test_more_patience_alone_does_not_make_a_finished_run_endless(tmp_path):
    before = train(tmp_path, em={"guard": True, "patience": 3})
    em = train(tmp_path, em={"guard": True, "patience": 0})
    assert em.rows == before.rows
    with pytest.raises(DiffemError, match=r"config\.yaml: em\.patience differs from this run's"):
        make(tmp_path, em={"guard": True, "patience": 8})  # 0 never ends a run: 8 is less


def test_a_longer_run_that_is_killed_at_once_is_still_longer(tmp_path, monkeypatch):
    train(tmp_path, em={"iterations": 2})
    with monkeypatch.context() as patched:
        patched.setattr(DiffEM, "build", lambda self: die_softly())
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, em={"iterations": 4})
    assert [row["iteration"] for row in train(tmp_path, em={"iterations": 4}).rows] == [0, 1, 2, 3, 4, 5]


def test_killed_before_the_weights_to_roll_back_to_were_kept(tmp_path, monkeypatch):
    rows = make(tmp_path).iterate()
    next(rows)
    rows.close()
    (tmp_path / "good.safetensors").unlink()  # of which only the checkpoint is known
    update, failed = Trainer.update, []

    def fail_once(self, losses, rate):
        factor = 1.0 if failed else math.nan
        failed.append(True)
        return update(self, [loss * factor for loss in losses], rate)

    monkeypatch.setattr(Trainer, "update", fail_once)
    assert [row["failures"] for row in train(tmp_path).rows] == [0, 1, 1, 1, 1]


def test_what_a_bad_e_step_had_drawn_is_thrown_away(tmp_path, monkeypatch):
    """The next try is of the same iteration, and begins at the first observation."""
    exploding(monkeypatch, 1)
    em, begun = make(tmp_path, em={"iterations": 1}), []
    growing = em.run.growing

    def listen(name, shape, iteration, dtype):
        array, done = growing(name, shape, iteration, dtype)
        begun.append((iteration, done))
        return array, done

    monkeypatch.setattr(em.run, "growing", listen)
    list(em.iterate())
    assert begun == [(0, 0), (1, 0), (1, 0)]


def test_last_draws_that_are_not_finite_leave_those_of_the_best_iteration(tmp_path, monkeypatch):
    draw = DiffusionSampler.draw

    def explode(self, y, params, seeds, withheld=None):
        x = draw(self, y, params, seeds, withheld)
        x[seeds == seeding.item_seeds(0, 4, "end", [20])] = torch.nan
        return x

    monkeypatch.setattr(DiffusionSampler, "draw", explode)
    monkeypatch.setattr(judging, "score", narrow)
    em = train(tmp_path, em={"guard": True})
    last = em.rows[-1]
    assert (last["final"], last["width"], last["examples"], last["failures"]) == (1, 1.0, 0, 0)
    found = drawn(tmp_path / "posterior", np.arange(60), 1)
    np.testing.assert_allclose(found, np.load(tmp_path / "reconstructions.npy"), rtol=1e-4, atol=1e-5)


def test_a_start_takes_the_weights_of_another_sampler(tmp_path):
    import diffem.rivals  # noqa: F401

    guided = {"sampler": {"kind": "mmps"}, "denoiser": {"observation_dropout": 1.0}}
    train(tmp_path / "one", em={"iterations": 1}, **guided)
    em = train(tmp_path / "two", start={"kind": "run", "run": str(tmp_path / "one")}, em={"iterations": 0})
    theirs = load_file(tmp_path / "one" / "posterior" / "model.safetensors")
    ours = em.trainer.denoiser.network.state_dict()
    assert all(torch.equal(v, theirs[f"denoiser.network.{k}"]) for k, v in ours.items())


@pytest.mark.parametrize("added", [{"accepted": False, "best": False}, {"score": -1.0}])
def test_a_hook_cannot_decide(added, whole, tmp_path):
    em = make(tmp_path / "run")
    em.hooks = [lambda em, row: added]
    list(em.iterate())
    assert_same(tmp_path / "run", whole)
    assert bare(tmp_path / "run") == bare(whole)


def test_what_a_hook_adds_must_be_json(tmp_path):
    em = make(tmp_path)
    em.hooks = [lambda em, row: {"mine": np.float32(1), "ours": torch.tensor(2)}]
    assert [(row["mine"], row["ours"]) for row in em.iterate()] == [(1, 2)] * 5
    em = make(tmp_path / "other")
    em.hooks = [lambda em, row: {"mine": object()}]
    with pytest.raises(DiffemError, match=r"^hooks: .* cannot be written as JSON: "):
        list(em.iterate())


def test_a_folder_of_observations_is_enough(tmp_path):
    observations().save(tmp_path / "data")
    em = DiffEM(settings(), tmp_path / "data", tmp_path / "run")
    assert next(em.iterate())["iteration"] == 0


def test_a_posterior_that_held_out_others_is_no_start(whole):
    with pytest.raises(DiffemError) as caught:
        DiffEM(settings(em={"seed": 1}), observations(), whole / "x", start=from_pretrained(whole / "posterior"))
    assert str(caught.value) == "start.run: start held out others of these observations; use --em.seed 0"


@pytest.mark.parametrize("model", ["start", "posterior"])
def test_a_mixture_is_no_start_where_it_has_no_posterior(model, whole, tmp_path):
    box = Observations(observations().y, BlackBox(lambda x: x.clamp(-1, 1)))
    sections = {"start": {"kind": "run", "run": str(whole)}}
    text = (
        "start.run: {} uses a mixture, whose posterior is not known for BlackBox; start from a run with this corruption"
    )
    with pytest.raises(DiffemError) as caught:
        DiffEM(settings(), box, tmp_path, start=from_pretrained(whole / model))
    assert str(caught.value) == text.format("start")
    with pytest.raises(DiffemError) as caught:
        DiffEM(settings(**sections), box, tmp_path)
    assert str(caught.value) == text.format(whole)


def test_a_run_of_an_own_network_wants_it_again(tmp_path):
    def own(channels, shape):
        return torch.nn.Conv2d(channels, 2 * shape[0], 1)

    class Own(torch.nn.Module):
        def __init__(self, channels, shape):
            super().__init__()
            self.layer = own(channels, shape)

        def forward(self, x, log_sigma):
            return self.layer(x)

    sections = {"em": {"iterations": 1}}
    list(DiffEM(settings(**sections), observations(), tmp_path, network=Own).iterate())
    with pytest.raises(DiffemError, match=r"config\.yaml: facts\.own_network differs from this run's"):
        DiffEM(settings(**sections), observations(), tmp_path)


def test_a_run_that_starts_again_leaves_nothing_of_the_one_before(tmp_path):
    train(tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    em = make(tmp_path, em={"seed": 3})
    em.progress = lambda progress: die_softly()
    with pytest.raises(KeyboardInterrupt):
        list(em.iterate())
    left = {p.name for p in tmp_path.iterdir()}
    assert not left & {"metrics.jsonl", "reconstructions.npy", "prior.json", "diagnostics.json"}


def test_other_held_out_observations_are_another_run(tmp_path):
    data = observations(400)
    data.held_out = np.arange(400) < 40
    other = observations(400)
    other.held_out = data.held_out.copy()
    other.held_out[[39, 41]] = other.held_out[[41, 39]]  # rows that a sample of 256 may not see
    assert data.digest() != other.digest()
