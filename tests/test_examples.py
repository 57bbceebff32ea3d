"""The gallery: its scripts refuse missing data in one line, and prepare data and rivals as they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffem

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("name", ["winds", "mri", "hubble"])
def test_a_missing_file_is_refused_in_one_line(example, monkeypatch, name):
    module = example(name)
    monkeypatch.setattr(module, "FILE", f"/nowhere/{name}")
    with pytest.raises(SystemExit, match=rf"^/nowhere/{name}: not found; on Debian or Ubuntu: apt install [\w-]+$"):
        module.main()


@pytest.mark.parametrize("name", ["fertility", "co2"])
def test_a_missing_package_is_refused_in_one_line(example, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(SystemExit, match=r"^statsmodels: not found; pip install 'diffem-torch\[benchmarks\]'$"):
        example(name).main()


def test_settings_of_every_example_are_settings(example):
    for name in ("winds", "mri", "hubble", "co2"):
        diffem.load_config(None, example(name).SETTINGS)
    diffem.load_config("demo", example("digits").SETTINGS)


def test_digits(example):
    digits, rng = example("digits"), np.random.default_rng(0)
    clean = np.broadcast_to(rng.uniform(0, 255, (40, 1, 1, 1)), (40, 1, 8, 8))  # flat: more smoothing is better
    noisy = clean + rng.normal(0, 20, clean.shape)
    assert np.array_equal(digits.smoothed(clean, clean), clean)
    assert np.abs(digits.smoothed(noisy, clean) - clean).mean() < 8
    cut = np.where(clean > 153, 153.0, clean)
    filled = digits.usual("cut off at 60 %", cut, clean)
    np.testing.assert_array_equal(filled[clean <= 153], clean[clean <= 153])
    assert filled[clean > 153] == pytest.approx(clean[clean > 153].mean())
    photons = rng.poisson(clean * 5 / 255) * 51.0
    found = digits.usual("5 photons", photons, clean)
    assert np.sqrt(np.square(found - clean).mean()) < 0.5 * np.sqrt(np.square(photons - clean).mean())


def test_winds(example):
    winds, rng = example("winds"), np.random.default_rng(0)
    row, column = np.mgrid[:72, :144]
    plane = np.broadcast_to(0.5 * row - column, (3, 2, 72, 144)).astype(float)
    seen = winds.swaths(plane.shape, rng)
    assert seen.mean() == pytest.approx(6 / 16, abs=0.03)
    filled = winds.interpolated(np.where(seen, plane, np.nan))
    np.testing.assert_allclose(filled[..., 20:50, 20:120], plane[..., 20:50, 20:120], atol=1e-9)
    cut = winds.patches(plane)
    assert cut.shape == (54, 2, 24, 24)
    np.testing.assert_array_equal(cut[7], plane[0, :, 24:48, 24:48])


def test_mri(example):
    mri, rng = example("mri"), np.random.default_rng(0)
    volume = np.zeros((110, 120, 100))
    volume[5:105, 5:115, 5:95] = 7
    x = mri.slices(volume)
    assert x.shape[1:] == (1, mri.SIZE, mri.SIZE)
    assert x.max() == 1
    disc = (np.hypot(*np.mgrid[-16:16, -16:16]) < 10).astype(np.float32)
    x = torch.from_numpy(disc).expand(2, 1, 32, 32)
    mask = mri.lines(2, rng)
    assert mask.mean() == pytest.approx(1 / 3, abs=0.05)
    corruption, params = diffem.Fourier("real", 0.0), {"mask": torch.from_numpy(mask)}
    y = corruption.forward(x, params)
    zero_filled = corruption.adjoint(y, params)
    smooth = mri.total_variation(corruption, y, params, zero_filled, 0.003)
    assert (smooth - x).square().mean() < 0.2 * (zero_filled - x).square().mean()


def test_hubble(example):
    hubble, rng = example("hubble"), np.random.default_rng(0)
    row, column = np.mgrid[:64, :96]
    plane = (3.0 * row + column).astype(np.float64)
    y = np.where(rng.random(plane.shape) < 0.2, np.nan, plane)
    np.testing.assert_allclose(hubble.linear(y)[4:-4, 4:-4], plane[4:-4, 4:-4], atol=1e-9)
    y[10:20, 10:20] = np.nan
    filled = hubble.median(y)
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[np.isfinite(y)], y[np.isfinite(y)])
    np.testing.assert_array_equal(hubble.patches(plane)[4, 0], plane[32:, 32:64])


def test_fertility(example):
    hide = example("fertility").gaps((2000, 52), np.random.default_rng(0))
    assert set(hide.sum(1)) == {0, 10}
    assert hide.any(1).mean() == pytest.approx(0.5, abs=0.05)
    assert (np.diff(hide.astype(int), axis=1) == 1).sum(1).max() == 1  # one gap each


def test_co2(example):
    co2 = example("co2")
    week = np.arange(2284)
    season = np.sin(2 * np.pi * week / 52.1775)
    y = np.where(co2.gaps(len(week), np.random.default_rng(0)), np.nan, 315 + 0.02 * week + 1e-5 * week**2 + season)
    left = y - co2.trend(y)
    assert np.nanstd(left - season) < 0.02
    assert np.abs(co2.climatology(left) - season).max() < 0.1
    np.testing.assert_allclose(co2.line(np.where(np.isnan(y), np.nan, 2.0 * week)), 2.0 * week)


def test_coverage_of_the_law_itself_is_nine_tenths(example):
    gallery, rng = example("gallery"), np.random.default_rng(0)
    covered = gallery.coverage(rng.normal(size=(gallery.DRAWS, 20_000)), rng.normal(size=20_000))
    assert covered == pytest.approx(gallery.LEVEL, abs=4 * np.sqrt(0.09 / 20_000))


def test_pictures_and_figures_are_written(example, monkeypatch, tmp_path):
    gallery = example("gallery")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    gallery.images("none", [[np.eye(4), np.full((4, 4), np.nan)]], ["a", "b"], ["row"], [(0, 1)], ["m/s"], "RdBu_r")
    gallery.write("none", {"RMSE": {"diffem": 1.0}}, observations=3)
    assert (tmp_path / "docs" / "gallery-none.png").stat().st_size > 1000
    found = json.loads((tmp_path / "benchmarks" / "results" / "gallery" / "none.json").read_text())
    assert found["command"] == "python examples/none.py"
    assert found["figures"] == {"RMSE": {"diffem": 1.0}}
