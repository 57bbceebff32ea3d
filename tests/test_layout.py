"""How people's arrays lie: what goes in comes out as it lay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffem import config as configuration
from diffem.corruptions import Fourier, GaussianNoise, Mask
from diffem.data import Dataset, Layout, Observations
from diffem.diagnostics.check import check
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.posterior import from_pretrained
from diffem.units import Units

CASES = {  # axes, the user's shape of three items, and the model's
    "NF": ((3, 5), (3, 5)),
    "NT": ((3, 9), (3, 1, 9)),
    "NCT": ((3, 2, 9), (3, 2, 9)),
    "NTF": ((3, 9, 2), (3, 2, 9)),
    "NHW": ((3, 6, 7), (3, 1, 6, 7)),
    "NHWC": ((3, 6, 7, 2), (3, 2, 6, 7)),
    "NCHW": ((3, 2, 6, 7), (3, 2, 6, 7)),
    "NWHC": ((3, 7, 6, 2), (3, 2, 7, 6)),
    "NDHW": ((3, 4, 5, 6), (3, 1, 4, 5, 6)),
    "NCDHW": ((3, 2, 4, 5, 6), (3, 2, 4, 5, 6)),
    "NDHWC": ((3, 4, 5, 6, 2), (3, 2, 4, 5, 6)),
}


def error(function, *args, **kwargs) -> str:
    with pytest.raises(DiffemError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("complex_numbers", [False, True])
@pytest.mark.parametrize("axes", CASES)
def test_there_and_back(axes, complex_numbers):
    given, expected = CASES[axes]
    rng = np.random.default_rng(0)
    y = rng.normal(size=given) + (1j * rng.normal(size=given) if complex_numbers else 0)
    layout = Layout(axes, complex_numbers)
    x = layout.to_model(y)
    assert x.shape == (3, expected[1] * (1 + complex_numbers), *expected[2:])
    assert layout.shape(given[1:]) == x.shape[1:]
    assert layout.users(x.shape[1:]) == given[1:]
    np.testing.assert_array_equal(layout.to_user(x), y)
    tensor = torch.from_numpy(y)  # tensors alike, with other axes before
    np.testing.assert_array_equal(layout.to_model(tensor).numpy(), x)
    np.testing.assert_array_equal(layout.to_user(layout.to_model(tensor)[None].expand(4, *x.shape))[3].numpy(), y)


def test_channels_and_parts_are_where_they_should_be():
    y = np.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    assert Layout("NHWC").to_model(y)[1, 1, 2, 3] == y[1, 2, 3, 1]
    z = y + 1000j * (y + 1)
    x = Layout("NHWC", True).to_model(z)
    np.testing.assert_array_equal(x[:, 2], z[..., 1].real)  # real and imaginary parts of a channel side by side
    np.testing.assert_array_equal(x[:, 3], z[..., 1].imag)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 5), "NF"), ((3, 4, 9), "NCT"), ((3, 5, 9), "NHW"), ((3, 2, 5, 5), "NCHW"), ((3, 1, 5, 5, 5), "NCDHW")],
)
def test_what_the_number_of_axes_suggests(shape, axes):
    assert Layout.of(shape).axes == axes


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            "HWN",
            "must be N and then, once each, C or F for channels and D, H, W, T for places, e.g. NHWC, NTF, NF, got 'HWN'",
        ),
        (
            "NHH",
            "must be N and then, once each, C or F for channels and D, H, W, T for places, e.g. NHWC, NTF, NF, got 'NHH'",
        ),
        (
            "NXY",
            "must be N and then, once each, C or F for channels and D, H, W, T for places, e.g. NHWC, NTF, NF, got 'NXY'",
        ),
        ("NCF", "NCF: C and F are both channels; name one of them"),
        ("NHWC", "NHWC has 4 letters where y.npy has 3 axes, (9, 5, 5)"),
    ],
)
def test_words_that_are_not_understood(axes, message):
    y = np.zeros((9, 5, 5), np.float32)
    assert error(Observations, y, GaussianNoise(0.1), axes=axes) == f"observations: axes: {message}"


def test_six_axes_must_be_named():
    y = np.zeros((9, 1, 2, 2, 2, 2), np.float32)
    assert error(Observations, y, GaussianNoise(0.1)) == (
        "observations: y.npy: shape (9, 1, 2, 2, 2, 2) has 6 axes; say what they are, e.g. `axes: NCHW`"
    )


def channels_last(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = rng.random((n, 6, 5, 1)) < 0.7
    return rng.normal(size=(n, 6, 5, 3)).astype(np.float32), mask


def test_a_folder_of_images_with_channels_last(tmp_path):
    y, mask = channels_last()
    Observations(np.where(mask, y, np.nan), Mask(0.1), {"mask": mask}, axes="NHWC").save(tmp_path)
    assert np.load(tmp_path / "y.npy").shape == y.shape  # as it was given
    loaded = Observations.load(tmp_path)
    assert loaded.shape == (3, 6, 5)
    batch, params = loaded.batch([4, 2])
    expected = np.moveaxis(np.where(mask, y, 0), -1, 1)
    np.testing.assert_array_equal(batch.numpy(), expected[[4, 2]])
    np.testing.assert_array_equal(params["mask"].numpy(), np.moveaxis(mask, -1, 1)[[4, 2]])


def test_nan_is_a_mask_whatever_the_axes():
    y, mask = channels_last()
    observations = Observations(np.where(mask, y, np.nan), Mask(0.1), axes="NHWC")
    _, params = observations.batch([1])
    np.testing.assert_array_equal(params["mask"][0].numpy(), np.broadcast_to(mask[1], (6, 5, 3)).transpose(2, 0, 1))


def test_one_noise_for_each_observation_may_be_a_row():
    y, _ = channels_last()
    level = np.linspace(0.1, 1, len(y)).astype(np.float32)
    observations = Observations(y, GaussianNoise(), {"noise": level}, axes="NHWC")
    np.testing.assert_array_equal(observations.batch([3])[1]["noise"].flatten().numpy(), level[[3]])


def test_check_says_how_it_reads_them():
    y, _ = channels_last(60)
    found = {f.name: f for f in check(Observations(np.pad(y, ((0, 0), (0, 0), (0, 3), (0, 0))), GaussianNoise(0.1)))}
    assert found["channels-last"].level == "problem"
    assert found["channels-last"].text == (
        "y of shape (60, 6, 8, 3) is read as 6 channels of 8 x 3 pixels; if its channels are last add `axes: NHWC` to "
        "corruption.yaml, else `axes: NCHW`"
    )
    for axes in ("NHWC", "NCHW"):
        assert "channels-last" not in {f.name for f in check(Observations(y, GaussianNoise(0.1), axes=axes))}
    lone = {f.name: f for f in check(Observations(y[..., 0], GaussianNoise(0.1)))}["layout"]
    assert (lone.level, lone.text) == (
        "note",
        "y is read as images of one channel, 6 x 5 pixels; if they are 6 series of length 5 add `axes: NCT` to corruption.yaml",
    )
    series = np.random.default_rng(0).normal(size=(60, 48, 4)).astype(np.float32)
    text = {f.name: f.text for f in check(Observations(series, GaussianNoise(0.1)))}["layout"]
    assert text.endswith("if they are series of length 48 with 4 columns add `axes: NTF` to corruption.yaml")


SETTINGS = {
    "network": {"channels": [8], "blocks": [1]},
    "m_step": {"first_steps": 4, "steps": 2, "batch": 8},
    "em": {"iterations": 1},
    "sampler": {"steps": 2},
    "start": {"components": [1], "ranks": [2]},
    "prior": {"steps": 2},
}


def run(out: Path, observations: Observations) -> None:
    list(DiffEM(configuration.from_dict(SETTINGS), observations, out).iterate())


def test_a_run_does_not_depend_on_how_its_data_lie(tmp_path):
    y, mask = channels_last()
    run(tmp_path / "last", Observations(y, Mask(0.1), {"mask": mask}, axes="NHWC"))
    first = np.ascontiguousarray(np.moveaxis(y, -1, 1)), np.moveaxis(mask, -1, 1)
    run(tmp_path / "first", Observations(first[0], Mask(0.1), {"mask": first[1]}))
    a, b = (np.load(tmp_path / name / "reconstructions.npy") for name in ("last", "first"))
    assert a.shape == y.shape
    np.testing.assert_array_equal(np.moveaxis(a, -1, 1), b)
    models = [from_pretrained(tmp_path / name / "posterior") for name in ("last", "first")]
    seeds = torch.arange(3)
    draws = [
        m.sample(v[:3], {"mask": w[:3]}, n=2, seeds=seeds)
        for m, v, w in zip(models, (y, first[0]), (mask, first[1]), strict=True)
    ]
    assert draws[0].shape == (2, 3, 6, 5, 3)
    np.testing.assert_array_equal(np.moveaxis(draws[0], -1, 2), draws[1])
    assert models[0].sample_prior(4).shape == (4, 6, 5, 3)
    assert error(models[0].sample, y[0], {}) == "y: has shape (6, 5, 3), where the model's observations are NHWC"


def test_complex_numbers_come_back_as_complex_numbers(tmp_path):
    rng = np.random.default_rng(0)
    y = (rng.normal(size=(40, 6, 5)) + 1j * rng.normal(size=(40, 6, 5))).astype(np.complex64)
    y.real *= 3
    observations = Observations(y, GaussianNoise(0.05))
    assert observations.shape == (2, 6, 5)
    units = observations.units(np.arange(40))
    assert units == Units(0.0, float(units.half))  # one scale for both parts: phases keep their meaning
    batch, _ = Dataset(observations, units).batch([7])
    np.testing.assert_allclose(batch[0].numpy() * float(units.half), np.stack([y[7].real, y[7].imag]), rtol=1e-6)
    run(tmp_path / "run", observations)
    found = np.load(tmp_path / "run" / "reconstructions.npy")
    assert (found.shape, found.dtype) == (y.shape, np.complex64)
    error_of = lambda part: np.abs(part(found) - part(y)).mean()  # noqa: E731
    assert max(error_of(np.real), error_of(np.imag)) < 0.15  # nothing is dropped, and nothing is swapped
    assert json.loads((tmp_path / "run" / "posterior" / "config.json").read_text())["layout"] == ["NHW", True]
    assert np.iscomplexobj(from_pretrained(tmp_path / "run" / "posterior").sample(y[:2]))


@pytest.mark.parametrize("items", ["complex", "real"])
def test_k_space_as_it_is(items, tmp_path):
    """Complex k-space of two coils, every second line of it: images come back as what they are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 1, 8, 6)) + (1j * rng.normal(size=(40, 1, 8, 6)) if items == "complex" else 0)
    coils = (rng.normal(size=(1, 2, 8, 6)) + 1j * rng.normal(size=(1, 2, 8, 6))).astype(np.complex64)
    axes = (2, 3)
    k = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(x * coils, axes), norm="ortho"), axes).astype(np.complex64)
    mask = np.broadcast_to(np.arange(6) % 2 == np.arange(40)[:, None, None, None] % 2, (40, 1, 1, 6))
    observations = Observations(np.where(mask, k, 0), Fourier(items, noise=1e-3), {"mask": mask, "coils": coils})
    y, params = observations.batch(np.arange(40))
    real = observations.item_layout.to_model(x.astype(np.complex64 if items == "complex" else np.float32))
    torch.testing.assert_close(observations.corruption.forward(torch.from_numpy(real), params), y, atol=1e-5, rtol=1e-4)
    run(tmp_path / "run", observations)
    found = np.load(tmp_path / "run" / "reconstructions.npy")
    assert (found.shape, np.iscomplexobj(found)) == (x.shape, items == "complex")
