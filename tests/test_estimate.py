"""Noise that nobody told us: the estimate against the noise that was added, and what is said where it cannot be told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import correlate1d, gaussian_filter
from sklearn.datasets import load_digits, load_sample_images

from diffem.cli import main
from diffem.corruptions import GaussianBlur, GaussianNoise, PoissonGaussian, RandomMask
from diffem.data import Observations
from diffem.diagnostics.check import Finding, check, quick
from diffem.diagnostics.noise import Noise, clipped, described, estimate
from diffem.errors import DiffemError

TABLE = "rows of a table have no neighbours that would tell their noise; state it"
FEW = "too few neighbours were observed together to tell the noise; state it"
NOT_WHITE = "even the flattest patches vary less from pixel to pixel than over a few: the noise is correlated between neighbours (interpolated, demosaiced, JPEG), or no patch is flat; no number can be given, state it, or add images with an even background"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photographs(size: int = 64) -> np.ndarray:
    """Crops of scikit-learn's two photographs, each colour by itself, from 0 to 255, (n, 1, size, size)."""
    planes = np.concatenate([np.moveaxis(image, -1, 0) for image in load_sample_images().images]).astype(float)
    rows, columns = (n // size for n in planes.shape[1:])
    cut = planes[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size)
    return cut.swapaxes(2, 3).reshape(-1, 1, size, size)


def cells(n: int = 60) -> np.ndarray:
    """Bright blobs on a dark ground, as a fluorescence microscope shows them, from 0 to 128, (n, 1, 128, 128)."""
    spots = np.stack([gaussian_filter((rng(i).random((128, 128)) < 0.002).astype(float), 5) for i in range(n)])
    return 128 * np.minimum(spots / spots.max() / 0.6, 1)[:, None]


def observed(x: np.ndarray, gain: float, noise: float, eight: bool, seed: int = 0) -> np.ndarray:
    """Photons of `gain` and read noise, rounded and clipped as by a camera of 8 bits if `eight`."""
    random = rng(seed)
    y = (gain * random.poisson(x / gain) if gain else x) + noise * random.standard_normal(x.shape)
    return (np.rint(y).clip(0, 255) if eight else y).astype(np.float32)


# --- how large it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("noise", [2.0, 10.0, 30.0])
def test_one_number(noise, eight):
    found = estimate(observed(photographs(), 0.0, noise, eight))
    assert found.gain == 0
    assert found.std() == pytest.approx(noise, rel=0.1)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize(("gain", "noise"), [(1.0, 5.0), (2.0, 10.0), (5.0, 20.0), (20.0, 20.0)])
def test_a_line(gain, noise, eight):
    found = estimate(
        observed(photographs() / (1 + (gain > 10)), gain, noise, eight)
    )  # what is brighter would be cut off
    assert found.gain == pytest.approx(gain, rel=0.1)
    assert found.std() == pytest.approx(noise, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_microscopy_of_eight_bits(seed):
    """Half of the dark is cut off at 0, as of the data that the standard deviations of 10 and 45 were taken from."""
    found = estimate(observed(cells(), 15.0, 10.0, True, seed))
    assert found.gain == pytest.approx(15, rel=0.1)
    assert found.std() == pytest.approx(10, rel=0.1)
    assert found.ends[0] == 0
    assert 38 < found.std(found.ends[1]) < 46


def test_small_images_and_patches_of_a_large_one_agree():
    small = estimate(observed(photographs(32), 0.0, 5.0, True))
    assert small.std() == pytest.approx(5, rel=0.1)
    whole = np.mean([image[:426, :640, 1] for image in load_sample_images().images], 0)[None, None]
    large = observed(whole, 0.0, 10.0, True)
    cut = large[:, :, :416].reshape(1, 1, 13, 32, 20, 32).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 1, 32, 32)
    assert estimate(large).std() == pytest.approx(10, rel=0.1)
    assert estimate(cut).std() == pytest.approx(10, rel=0.1)


def test_of_nothing_but_noise_it_is_unbiased_and_knows_its_error():
    z = [
        (found.std() - 3) / found.error
        for seed in range(12)
        for found in [estimate(100 + 3 * rng(seed).standard_normal((60, 1, 32, 32)).astype(np.float32))]
    ]
    assert abs(np.mean(z)) < 4 / np.sqrt(12)
    assert 0.5 < np.std(z) < 1.5


def test_series_and_volumes():
    time = np.arange(512) / 512
    waves = sum(np.sin(2 * np.pi * (k * time + rng(k).random((200, 1)))) for k in (3, 7))[:, None]
    assert estimate(observed(waves, 0.0, 0.1, False)).std() == pytest.approx(0.1, rel=0.05)
    smooth = 30 * np.stack([gaussian_filter(rng(i).normal(size=(24, 24, 24)), 3) for i in range(20)])[:, None]
    assert estimate(observed(smooth, 0.0, 2.0, False)).std() == pytest.approx(2, rel=0.05)


def test_channels_that_differ():
    x = np.repeat(photographs(), 3, 1)
    y = x + np.array([5, 10, 20])[:, None, None] * rng().standard_normal(x.shape)
    found = estimate(y.astype(np.float32))
    assert found.channels == pytest.approx((5, 10, 20), rel=0.1)
    assert found.arguments == {"noise": [float(f"{level:.3g}") for level in found.channels]}
    assert estimate((x + 5 * rng().standard_normal(x.shape)).astype(np.float32)).channels == ()


def test_masks_dead_pixels_and_rounding():
    y, mask = observed(photographs(), 0.0, 10.0, False), np.ones((1, 1, 64, 64), bool)
    mask[..., 20:40, 10:50] = False
    y[:, :, 20:40, 10:50] = 1e6
    y[:, 0, 7, 9] = -300  # dead
    seen = np.broadcast_to(mask, y.shape)
    assert estimate(y, seen).std() == pytest.approx(10, rel=0.1)
    flat = np.rint(100 + 0.6 * rng().standard_normal((100, 1, 32, 32))).astype(np.float32)
    assert estimate(flat).std() == pytest.approx(0.6, rel=0.03)


def test_an_offset():
    found = estimate(observed(cells(), 15.0, 2.0, False) + 50)
    assert found.offset == pytest.approx(50 - 4 / 15, abs=1)
    text = (
        "no corruption.yaml is right while zero photons are not at 0: subtract the dark level of the camera from y.npy, and estimate"
        f" again; it is at least {found.offset:.3g}, and (read noise)^2 / gain higher"
    )
    with pytest.raises(DiffemError) as error:
        described({}, found)
    assert str(error.value) == text
    assert f"variance = {found.gain:.3g} * (signal - {found.offset:.3g}) (gain +- " in found.text


# --- where it cannot be told -------------------------------------------------------------------------


def refused(y: np.ndarray, seen: np.ndarray | None = None) -> str:
    with pytest.raises(DiffemError) as error:
        estimate(y.astype(np.float32), seen)
    return str(error.value)


def test_tables_and_lone_neighbours():
    assert refused(rng().normal(size=(500, 8))) == TABLE
    assert refused(rng().normal(size=(500, 1, 3, 3))) == FEW
    assert refused(rng().normal(size=(50, 1, 16, 16)), np.zeros((50, 1, 16, 16), bool)) == FEW


@pytest.mark.parametrize("kernel", [[1, 2, 1], [1, 4, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_noise_of_interpolated_pixels(kernel, seed):
    noise = rng(seed).standard_normal((150, 1, 64, 64))
    for axis in (2, 3):
        noise = correlate1d(noise, np.array(kernel) / sum(kernel), axis)
    assert refused(100 + 10 * noise) == NOT_WHITE
    assert refused(photographs()[:150] + 10 * noise[: len(photographs())]) == NOT_WHITE


def test_noise_of_rows_and_clean_digits():
    assert refused(photographs() + 10 * rng().normal(size=(len(photographs()), 1, 64, 1))) == NOT_WHITE
    assert refused(load_digits().images[:, None]) == NOT_WHITE


# --- the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.0, 0.5, 15.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 60.0), (-np.inf, 60.0), (-np.inf, np.inf)])
def test_moments_of_clipped_noise(gain, low, high):
    signal, random, n = np.array([5.0, 30.0, 58.0]), rng(1), 400_000
    y = (gain * random.poisson(signal / gain, (n, 3)) if gain else signal) + 6 * random.standard_normal((n, 3))
    y = y.clip(low, high)
    mean, variance, inside = clipped(signal, 36.0, gain, low, high, 0.5)
    assert mean == pytest.approx(y.mean(0), abs=0.15)
    assert variance == pytest.approx(y.var(0), rel=0.02)
    assert inside == pytest.approx(((y > low + 0.5) & (y < high - 0.5)).mean(0), abs=0.005)
    if gain:  # zero photons at 10
        shifted = clipped(signal + 10, 36.0, gain, low + 10, high + 10, offset=10.0)
        assert shifted[1] == pytest.approx(variance)


def test_words():
    number = Noise(100.0, 0.0, 2.0, 0.0, (0.0, 128.0))
    assert number.text == "the noise has a standard deviation of 10 +- 0.1, whatever the signal"
    assert number.arguments == {"noise": 10.0}
    line = Noise(100.0, 15.0, 2.0, 0.3, (0.0, 128.0))
    text = "the noise grows with the signal: variance = 15 * signal + 10^2 (gain +- 0.3, read noise +- 0.1), a standard deviation of 10 in the dark and 44.9 in the bright"
    assert line.text == text
    channels = Noise(1.0, 0.0, 0.1, 0.0, (0.0, 1.0), (0.5, 1.25))
    assert channels.text == "the noise has a standard deviation of 0.5, 1.25 in the channels, whatever the signal"


def test_what_is_written():
    number, line = Noise(1.0, 0.0, 0.1, 0.0, (0.0, 9.0)), Noise(4.0, 3.0, 0.1, 0.1, (0.0, 9.0))
    assert described({}, number) == {"name": "GaussianNoise", "noise": 1.0}
    before = {"name": "RandomMask", "rate": 0.5, "noise": 7, "range": [0, 9], "axes": "NHW"}
    assert described(before, number) == {**before, "noise": 1.0}
    after = {"name": "PoissonGaussian", "gain": 3.0, "noise": 2.0, "range": [0, 9]}
    assert described({"range": [0, 9]}, line) == after
    assert described(after, number) == {"name": "GaussianNoise", "noise": 1.0, "range": [0, 9]}
    assert described({"name": "Mask", "noise": 1}, line) == {"name": "PoissonGaussian", "gain": 3.0, "noise": 2.0}
    text = "name: RandomMask has noise that does not depend on the signal; only `name: PoissonGaussian` does"
    with pytest.raises(DiffemError) as error:
        described(before, line)
    assert str(error.value) == text


# --- what check says ---------------------------------------------------------------------------------

ABOUT_NOISE = {"noise", "noise-too-small", "noise-too-large", "noise-not-uniform", "clipped"}


def about_noise(observations: Observations) -> list[Finding]:
    return [finding for finding in check(observations) if finding.name in ABOUT_NOISE]


def test_check_finds_a_line():
    y = observed(photographs(), 2.0, 20.0, False)
    (finding,) = about_noise(Observations(y, GaussianNoise(25.0), range=(0, 255)))
    told = estimate(y)
    use = f"use `name: PoissonGaussian`, `gain: {told.gain:.3g}`, `noise: {told.std():.3g}`"
    text = f"declared noise 25 everywhere, but {told.text}; {use}"
    assert finding == Finding("warning", "noise-not-uniform", text)
    eight = Observations(observed(cells(), 15.0, 10.0, True).astype(np.uint8), GaussianNoise(17.6))
    (finding,) = about_noise(eight)
    assert (finding.level, finding.name) == ("problem", "noise-not-uniform")
    assert "noise-not-uniform" in [f.name for f in quick(eight)]
    blurred = Observations(y, GaussianBlur(1.0, 25.0), range=(0, 255))
    end = (
        "; GaussianBlur has one noise for all, so that error bars are too wide in the dark or too narrow in the bright"
    )
    assert about_noise(blurred)[0].text.endswith(end)
    offset = Observations(observed(cells(), 15.0, 2.0, False) + 50, GaussianNoise(17.6), range=(0, 255))
    assert "; subtract the dark level of the camera from y, at least " in about_noise(offset)[0].text


def test_check_compares_the_declared_noise_with_the_estimate():
    y = observed(photographs(), 0.0, 10.0, False)
    told = estimate(y).std()

    def say(declared: float) -> Finding:
        (finding,) = about_noise(Observations(y, GaussianNoise(declared), range=(0, 255)))
        return finding

    text = f"but flat patches vary by {told:.3g}"
    assert say(20) == Finding(
        "problem", "noise-too-large", f"declared noise 20, {text}; use `noise: {told:.3g}` or less"
    )
    small = f"declared noise 7, {text}; if nothing but noise is there, use `noise: {told:.3g}`"
    assert say(7) == Finding("warning", "noise-too-small", small)
    assert say(10).level == "note"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["noise", "mask", "half", "blur", "none", "digits", "map"])
def test_no_false_alarms(name, seed):
    x = load_digits().images[:, None] if name == "digits" else photographs()
    corruption = {
        "noise": GaussianNoise(10.0),
        "mask": RandomMask(0.2, 10.0),
        "half": RandomMask(0.5, 10.0),
        "blur": GaussianBlur(1.0, 5.0),
        "none": GaussianNoise(0.0),
        "digits": GaussianNoise(0.0),
        "map": GaussianNoise(),
    }[name]
    params = {"noise": torch.rand(len(x), 1, 1, 1) * 20} if name == "map" else {}
    generator = torch.Generator().manual_seed(seed)
    drawn = {**params, **corruption.draw(len(x), x.shape[1:], generator)}
    y = corruption.apply(torch.from_numpy(x.astype(np.float32)), drawn, generator).numpy()
    low = float(y.min()), float(y.max())
    found = about_noise(Observations(y, corruption, {k: v.numpy() for k, v in drawn.items()}, range=low))
    assert [finding for finding in found if finding.level != "note"] == []
    assert name != "map" or found == []


@pytest.mark.parametrize("value", [-999.0, -9999.0, 1e20, 65535.0])
def test_sentinels(value):
    y = rng().normal(size=(500, 3, 8, 8)).astype(np.float32)
    y += np.array([0, 100, -50], np.float32)[:, None, None]  # an offset between channels is none
    observations = Observations(y, GaussianNoise(1.0), range=(-60, 110))
    assert "sentinel" not in [f.name for f in check(observations)]
    bad = rng(1).random((500, 8, 8)) < 0.01
    y[:, 1][bad] = value
    rest = y[:, 1][~bad]
    text = f"{100 * bad.mean():.3g} % of the values of channel 1 are exactly {value:g}, far from all others ({rest.min():g} to {rest.max():g}), as where nothing was measured; write NaN there, or hide them by mask.npy"
    assert Finding("problem", "sentinel", text) in check(observations)
    assert Finding("problem", "sentinel", text) in quick(observations)
    mask = np.ones(y.shape, bool)
    mask[:, 1] = ~bad
    hidden = Observations(y, GaussianNoise(1.0), {"mask": mask}, range=(-60, 110))
    assert "sentinel" not in [f.name for f in check(hidden)]


@pytest.mark.parametrize(
    "y",
    [
        load_digits().images[:, None],
        rng().integers(0, 2, (500, 6)).astype(float),
        rng().poisson(0.2, (500, 6)).astype(float),
        rng().standard_cauchy((500, 6)),
        rng().normal(size=(500, 6)).clip(-1, 1),
    ],
    ids=["digits", "binary", "counts", "heavy tails", "clipped"],
)
def test_no_sentinels(y):
    observations = Observations(y.astype(np.float32), GaussianNoise(0.0))
    assert "sentinel" not in [f.name for f in check(observations)]


# --- the command -------------------------------------------------------------------------------------


def command(capsys, *argv: str) -> tuple[int, list[str], str]:
    status = main(["check", *argv])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "obs").mkdir()
    y = observed(photographs(), 0.0, 10.0, True).astype(np.uint8)
    np.save("obs/y.npy", y)
    told = estimate(y.astype(np.float32))
    shown = [told.text, "corruption.yaml:", "    name: GaussianNoise", f"    noise: {told.std():.3g}"]
    assert command(capsys, "obs", "--estimate") == (0, shown, "")
    assert not (tmp_path / "obs" / "corruption.yaml").exists()
    assert command(capsys, "obs", "--estimate", "--write") == (0, [*shown, "written: obs/corruption.yaml"], "")
    assert Observations.load("obs").corruption.noise == float(f"{told.std():.3g}")
    assert main(["check", "obs"]) == 0
    capsys.readouterr()
    status, out, err = command(capsys, "obs", "--estimate", "--write")
    assert (status, out) == (2, [])
    assert err == "diffem: obs/corruption.yaml: is there already; --overwrite replaces it\n"
    (tmp_path / "obs" / "corruption.yaml").write_text("name: GaussianBlur\nstd: 0.5\nrange: [0, 255]\n")  # lacks noise
    assert command(capsys, "obs", "--estimate", "--write", "--overwrite")[0] == 0
    written = yaml.safe_load((tmp_path / "obs" / "corruption.yaml").read_text())
    assert written == {"name": "GaussianBlur", "noise": float(f"{told.std():.3g}"), "std": 0.5, "range": [0, 255]}


def blobs(n: int = 220, size: int = 24) -> np.ndarray:
    """Small bright blobs on an even background of 33: nothing bright is flat, (n, 1, size, size)."""
    random, at = rng(), np.arange(size)
    x = np.full((n, 1, size, size), 33.0)
    for item in x[:, 0]:
        (row, column), width = random.uniform(3, size - 3, 2), random.uniform(1.5, 3)
        hill = [np.exp(-((at - centre) ** 2) / 2 / width**2) for centre in (row, column)]
        item += random.uniform(150, 770) * np.outer(*hill)
    return x


def test_noise_that_was_measured_in_the_dark_only_is_not_called_the_same_everywhere():
    y, background = observed(blobs(), 2.2, 4.0, False), (2.2 * 33 + 16) ** 0.5
    found = estimate(y)
    assert (found.gain, found.only_dark) == (0, True)
    assert found.std() == pytest.approx(background, rel=0.05)
    assert 30 < found.reach < 45
    assert found.text == (
        f"the noise has a standard deviation of {found.std():.3g} +- {found.error:.2g}, where the signal is below "
        f"{found.reach:.3g}; there are no flat patches up to {found.ends[1]:.3g}, where photon noise would be larger"
    )
    with pytest.raises(DiffemError) as caught:
        described({"name": "Mask"}, found)
    assert str(caught.value) == (
        f"no corruption.yaml is written: {found.text}; with one noise for all signals write `name: Mask` and "
        f"`noise: {found.std():.3g}`, for photons `name: PoissonGaussian` with the gain of the camera"
    )
    assert described({"name": "Downsample", "factor": 2}, found)["noise"] == pytest.approx(background, rel=0.05)
    said = lambda gain, noise: [f.text for f in quick_photons(y, gain, noise)]  # noqa: E731
    assert said(2.2, 4.0) == []
    declared, level = (20 * found.reach + 16) ** 0.5, f"{found.reach:.3g}"
    assert said(20.0, 4.0) == [
        f"declared gain 20 and noise 4 make a standard deviation of {declared:.3g} where the observations show "
        f"{found.std():.3g} up to a signal of {level}"
    ]


def quick_photons(y: np.ndarray, gain: float, noise: float) -> list[Finding]:
    """The findings about photon noise."""
    return [f for f in check(Observations(y, PoissonGaussian(gain, noise), range=(0, 900))) if f.name == "photons"]


def test_command_with_photons(tmp_path, capsys):
    np.save(tmp_path / "y.npy", observed(cells(), 15.0, 10.0, True).astype(np.uint8))
    status, out, err = command(capsys, str(tmp_path), "--estimate")
    assert (status, err) == (0, "")
    assert out[0].startswith("the noise grows with the signal: variance = ")
    assert out[1:3] == ["corruption.yaml:", "    name: PoissonGaussian"]


@pytest.mark.parametrize(
    ("prepare", "options", "text"),
    [
        (lambda d: np.save(d / "y.npy", np.ones((50, 6))), [], f": {TABLE}"),
        (
            lambda d: np.save(d / "noise.npy", np.ones(50)),
            [],
            ": noise.npy: says how large the noise is; there is nothing to estimate",
        ),
        (
            lambda d: np.save(d / "y.npy", np.ones((50, 1, 8, 8), int)),
            [],
            ": y.npy: holds int64 but no range is stated;",
        ),
        (
            lambda d: (
                np.save(d / "y.npy", np.ones((50, 8, 8), complex)),
                (d / "corruption.yaml").write_text("name: Fourier\nitems: real\n"),
            ),
            [],
            ": y of Fourier is not an image whose flat patches would tell the noise; take it from repeated measurements, or",
        ),
        (
            lambda d: None,
            ["--corruption", "torch:abs"],
            "--estimate: is for corruptions that corruption.yaml names, not --corruption",
        ),
    ],
    ids=["table", "noise.npy", "integers", "k-space", "black box"],
)
def test_mistakes(prepare, options, text, tmp_path, capsys):
    np.save(tmp_path / "y.npy", np.ones((50, 1, 8, 8)))
    prepare(tmp_path)
    status, out, err = command(capsys, str(tmp_path), "--estimate", *options)
    assert (status, out) == (2, [])
    assert text in err
    assert err.count("\n") == 1
    assert main(["check", str(tmp_path), "--write"]) == 2
    assert capsys.readouterr().err == "diffem: diffem check: --write and --overwrite: are for --estimate\n"
