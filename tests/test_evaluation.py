"""Evaluation: what it says of reconstructions whose distances are known, and of what it cannot compare."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffem import config as configuration
from diffem.clean import metrics
from diffem.clean.evaluation import as_text, evaluate
from diffem.corruptions import GaussianBlur, RandomMask
from diffem.data import Items, Observations
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.posterior import Posterior
from diffem.samplers import ObservationSampler
from diffem.units import Units

N, SHAPE, NOISE = 60, (1, 4, 4), 0.05


def config(iterations: int) -> configuration.Config:
    return configuration.from_dict(
        {
            "em": {"iterations": iterations, "guard": False},
            "m_step": {"steps": 3, "first_steps": 3, "batch": 16},
            "sampler": {"steps": 3},
            "start": {"components": [1], "ranks": [2], "iterations": 10},
            "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
            "prior": {"steps": 3, "sampler_steps": 3},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with clean.npy, the observations obs, and the runs `run` and `start` (which has no iterations)."""
    here = tmp_path_factory.mktemp("evaluation")
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(N, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    x = x.view(N, *SHAPE)
    corruption = RandomMask(0.5, NOISE)
    params = corruption.draw(N, SHAPE, generator)
    y = corruption.apply(x, params, generator).numpy()
    np.save(here / "clean.npy", x.numpy())
    Observations(y, corruption, {k: v.numpy() for k, v in params.items()}).save(here / "obs")
    for name, iterations in (("run", 1), ("start", 0)):
        list(DiffEM(config(iterations), Observations.load(here / "obs"), here / name).iterate())
    return here


@pytest.fixture
def here(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "here"))


def error(*arguments) -> str:
    with pytest.raises(DiffemError) as caught:
        evaluate(*arguments)
    return str(caught.value)


def test_columns(trained):
    overlap = {"precision", "recall", "density", "coverage"}
    both = {"psnr", "energy_distance", "nearest_clean", "nearest_item", *overlap}
    table = evaluate(trained / "run", trained / "clean.npy", Observations.load(trained / "obs"))
    assert list(table) == ["start", "reconstructions", "prior"]
    assert table["start"].keys() == table["reconstructions"].keys() == both | {"residual"}
    assert table["prior"].keys() == both - {"psnr"}
    assert all(math.isfinite(v) for column in table.values() for v in column.values())
    without = evaluate(trained / "run", trained / "clean.npy")
    assert list(without) == ["reconstructions", "prior"]
    assert without["prior"] == table["prior"]
    assert without["reconstructions"] == {k: table["reconstructions"][k] for k in both}


def test_start_is_the_start(trained):
    table = evaluate(trained / "start", trained / "clean.npy", Observations.load(trained / "obs"))
    assert table["start"] == pytest.approx(table["reconstructions"], rel=1e-4, abs=1e-5)
    assert table["start"] == pytest.approx(
        evaluate(trained / "run", trained / "clean.npy", Observations.load(trained / "obs"))["start"], rel=1e-4
    )


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_residual_is_in_units_of_the_noise(c, here):
    data = Observations.load(here / "obs")
    y, params = data.batch(np.arange(N))
    sign = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (N, *SHAPE)))
    x = torch.where(params["mask"], y + c * NOISE * sign, 1e3)  # what was not observed does not count
    np.save(here / "run" / "reconstructions.npy", x.float().numpy())
    assert evaluate(here / "run", here / "clean.npy", data)["reconstructions"]["residual"] == pytest.approx(c, rel=1e-3)


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_residual_of_a_blur(c, here):
    corruption, generator = GaussianBlur(0.7, NOISE), torch.Generator().manual_seed(0)
    x = 3 + torch.randn(N, *SHAPE, generator=generator)
    data = Observations((corruption.forward(x, {}) + c * NOISE).numpy(), corruption)
    units = Units(3.0, 2.0)
    posterior = Posterior(ObservationSampler(corruption.scaled(units), SHAPE), corruption, units)
    for name in ("posterior", "start", "prior"):
        posterior.save_pretrained(here / "run" / name)
    np.save(here / "run" / "reconstructions.npy", x.numpy())
    assert evaluate(here / "run", here / "clean.npy", data)["reconstructions"]["residual"] == pytest.approx(c, rel=1e-3)


def test_reconstructions_that_are_right(here):
    clean = np.load(here / "clean.npy")
    np.save(here / "run" / "reconstructions.npy", clean)
    found = evaluate(here / "run", here / "clean.npy")["reconstructions"]
    assert found["psnr"] == math.inf
    assert found["nearest_clean"] == found["nearest_item"] == pytest.approx(0, abs=1e-5)


def test_reconstructions_that_are_moved(here):
    data = Observations.load(here / "obs")
    half = data.units(data.split(0)[0]).half
    np.save(here / "run" / "reconstructions.npy", np.load(here / "clean.npy") + 1e-3 * half)
    found = evaluate(here / "run", here / "clean.npy")["reconstructions"]
    assert found["psnr"] == pytest.approx(20 * math.log10(2 / 1e-3), abs=0.05)  # the range has width 2
    assert found["nearest_clean"] == pytest.approx(1e-3 * 4, rel=0.02)  # 16 entries


def test_values_are_those_of_metrics(trained):
    found = evaluate(trained / "run", trained / "clean.npy")["reconstructions"]
    data = Observations.load(trained / "obs")
    units = data.units(data.split(0)[0])
    x, clean = (Items(np.load(trained / name), units)[:] for name in ("run/reconstructions.npy", "clean.npy"))
    assert found == pytest.approx({"psnr": metrics.psnr(x, clean, 2.0), **metrics.distances(x, clean)}, rel=1e-5)


def test_errors(trained, tmp_path):
    run, clean = trained / "run", trained / "clean.npy"
    assert error(trained, clean) == f"{trained}: is not a run folder (no config.yaml)"
    missing = tmp_path / "none.npy"
    assert error(run, missing) == f"{missing}: no such file; --reference is a .npy of clean items"
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((5, *SHAPE)))
    assert error(run, other) == f"{other}: shape (5, 1, 4, 4), but the run has reconstructions of (60, 1, 4, 4)"


def test_reference_that_is_no_array(trained, tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    line = error(trained / "run", tmp_path / "text.npy")
    assert line.startswith(f"{tmp_path / 'text.npy'}: is not a complete .npy array: ")


def test_text():
    table = {"start": {"psnr": 12.5, "residual": 1.0}, "reconstructions": {"psnr": 20.0}, "prior": {"residual": -0.25}}
    lines = as_text(table).split("\n")
    assert {len(line) for line in lines} == {18 + 3 * 17}
    assert [line.split() for line in lines] == [
        ["start", "reconstructions", "prior"],
        ["psnr", "12.5000", "20.0000", "-"],
        ["residual", "1.0000", "-", "-0.2500"],
    ]
    ends = [[m.end() for m in re.finditer(r"\S+", line)] for line in lines]
    assert ends[1][1:] == ends[2][1:] == ends[0]  # aligned to the right, below their heads
