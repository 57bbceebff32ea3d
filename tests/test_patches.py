"""Large images as patches: what is cut, what is held out, what is refused; and a run on them from the command line."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from diffem import cli
from diffem.corruptions import Corruption, GaussianBlur, GaussianNoise, RandomMask
from diffem.data import Observations
from diffem.data.layout import Layout
from diffem.data.patches import Grid, Patches
from diffem.errors import DiffemError

RNG = np.random.default_rng(0)


def images(n: int = 2, shape=(3, 10, 13)) -> np.ndarray:
    return RNG.normal(size=(n, *shape)).astype(np.float32)


def masked(n: int = 2, shape=(3, 10, 13), patch=4, **kwargs) -> Observations:
    mask = RNG.random((n, 1, *shape[1:])) < 0.8
    return Observations(images(n, shape), RandomMask(0.2, 0.1), {"mask": mask}, patch=patch, **kwargs)


def test_a_grid_covers_an_item_and_its_last_places_overlap():
    grid = Grid((10, 13), (4, 5))
    assert grid.starts == [[0, 4, 6], [0, 5, 8]]
    assert Grid((8,), 4).starts == [[0, 4]]
    assert Grid((8,), 8).starts == [[0]]
    assert Grid((9,), 4, 2).starts == [[0, 2, 4, 5]]
    covered = np.zeros((10, 13), int)
    for place in grid.places:
        covered[place] += 1
    assert covered.min() == 1
    assert covered.max() == 4


def test_patches_are_the_parts_of_the_array():
    array = images()
    patches, grid = Patches(array, Grid((10, 13), 4)), Grid((10, 13), 4)
    assert patches.shape == (2 * 12, 3, 4, 4) == (len(patches), 3, 4, 4)
    rows = np.array([[17, 3], [3, 23]])
    expected = np.stack([array[row // 12][:, *grid.places[row % 12]] for row in rows.ravel()])
    np.testing.assert_array_equal(patches[rows], expected.reshape(2, 2, 3, 4, 4))
    np.testing.assert_array_equal(patches[3], expected[1])
    np.testing.assert_array_equal(patches[:2], patches[np.arange(2)])


def test_parameters_are_cut_where_they_lie_like_y_and_repeated_where_not():
    y, lines = images(), RNG.random((2, 1, 1, 13)) < 0.5
    noise = np.array([0.1, 0.2], np.float32)
    of = Observations(y, RandomMask(0.5), {"mask": lines, "noise": noise}, patch=4)
    params = of.batch(np.arange(len(of)))[1]
    assert params["mask"].shape == (24, 1, 1, 4)
    np.testing.assert_array_equal(params["mask"][14, 0, 0], lines[1, 0, 0, 8:12])
    np.testing.assert_array_equal(params["noise"].ravel(), np.repeat(noise, 12))


def test_nan_is_a_mask_and_axes_are_the_users():
    whole = images(2, (10, 13, 2))
    whole[0, 5, 7] = np.nan
    of = Observations(whole, GaussianNoise(0.1), patch=5, axes="NHWC")
    y, params = of.batch([4])  # rows 5 to 9, columns 5 to 9
    assert of.shape == (2, 5, 5)
    assert not params["mask"][0, :, 0, 2].any()
    assert params["mask"].sum() == 48
    np.testing.assert_array_equal(y[0, :, 1], whole[0, 6, 5:10].T)
    np.testing.assert_array_equal(of.cut(whole)[4], whole[0, 5:10, 5:10])


def test_complex_images_are_cut_before_their_parts_are_taken():
    whole = images(2, (10, 13)) + 1j * images(2, (10, 13))
    of = Observations(whole, GaussianNoise(0.1), patch=[10, 4])
    assert of.shape == (2, 10, 4)
    np.testing.assert_array_equal(of.batch([5])[0][0, 1], whole[1, :, 4:8].imag)
    np.testing.assert_array_equal(
        Patches(whole, of.grid, Layout("NHW", True))[5], whole[1, :, 4:8].astype(np.complex64)
    )


def test_only_the_patches_that_are_read_are_in_memory(tmp_path):
    (tmp_path / "corruption.yaml").write_text("name: GaussianNoise\nnoise: 0.1\npatch: 32\nrange: [0, 1]\n")
    array = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, (4, 1, 2048, 2048))  # 64 MB
    array.flush()
    of = Observations.load(tmp_path)
    tracemalloc.start()
    of.batch(np.arange(0, len(of), 700))
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert len(of) == 4 * 64**2


def test_they_are_saved_as_they_were(tmp_path):
    of = masked()
    of.save(tmp_path)
    again = Observations.load(tmp_path)
    assert np.load(tmp_path / "y.npy").shape == (2, 3, 10, 13)
    assert (len(again), again.shape, again.digest()) == (len(of), of.shape, of.digest())
    assert again.digest() != masked(patch=5).digest()


def pixels(of: Observations, rows: np.ndarray) -> np.ndarray:
    """Which pixels of the images the patches show."""
    assert of.grid is not None
    shown = np.zeros((len(of.images), *of.grid.size), bool)
    for row in rows:
        shown[row // len(of.grid.places)][of.grid.places[row % len(of.grid.places)]] = True
    return shown


@pytest.mark.parametrize(("n", "size"), [(5, (10, 13)), (3, (9, 9)), (2, (33, 34))])
def test_patches_that_share_a_pixel_with_held_out_ones_do_not_train(n, size):
    of = masked(n, (3, *size))
    train, validation, test = of.split(1)
    held_out = pixels(of, validation) | pixels(of, test)
    assert not (pixels(of, train) & held_out).any()
    assert not (pixels(of, validation) & pixels(of, test)).any()
    left_out = np.setdiff1d(np.arange(len(of)), np.concatenate([train, validation, test]))
    assert all((pixels(of, left_out[[i]]) & held_out).any() for i in range(len(left_out)))


@pytest.mark.parametrize("named", [True, False])
def test_whole_images_are_held_out_where_there_are_many(named):
    held_out = np.arange(20) >= 15 if named else None
    of = masked(20, held_out=held_out)
    parts = [np.unique(rows // 12) for rows in of.split(0)]
    assert [12 * len(part) for part in parts] == [len(rows) for rows in of.split(0)]
    assert sorted(np.concatenate(parts)) == list(range(20))
    assert [len(part) for part in parts] == ([15, 2, 3] if named else [16, 2, 2])


class Gain(Corruption):
    """y = gain x, entry by entry."""

    by_entry = True

    def apply(self, x, params, generator):
        return params["gain"] * x


def test_parameters_of_a_corruption_of_the_users_own_are_cut_too():
    gain = RNG.random((2, 1, 10, 13)).astype(np.float32)
    of = Observations(images(), Gain(), {"gain": gain}, patch=4)
    np.testing.assert_array_equal(of.batch([13])[1]["gain"][0, 0], gain[1, 0, :4, 4:8])


def test_what_cannot_be_cut_is_refused():
    y = images()
    cases = [
        (y, GaussianBlur(1.0, 0.1), 4, "GaussianBlur makes an entry of y of several of x, so that it cannot be cut; leave patch out"),
        (y, GaussianNoise(0.1), 11, "[11, 11] is larger than the images, [10, 13]"),
        (y, GaussianNoise(0.1), [4, 0], "must be a number of pixels, or one for each of the 2 axes that are not channels, got [4, 0]"),
        (y, GaussianNoise(0.1), "4", "must be a number of pixels, or one for each of the 2 axes that are not channels, got '4'"),
        (y[:, :, 0, 0], GaussianNoise(0.1), 2, "must be a number of pixels, or one for each of the 0 axes that are not channels, got 2"),
    ]  # fmt: skip
    for array, corruption, patch, text in cases:
        with pytest.raises(DiffemError) as caught:
            Observations(array, corruption, patch=patch)
        assert str(caught.value) == f"observations: patch: {text}"
    with pytest.raises(
        DiffemError, match=r"^observations: patch: \[9, 9\]: too few that do not overlap; use a smaller one$"
    ):
        masked(2, (1, 17, 17), patch=9).split(0)


SMALL = [
    *("--em.iterations", "1", "--em.score_items", "8", "--m_step.first_steps", "2", "--m_step.batch", "4"),
    *("--network.channels", "[4,8]", "--network.blocks", "[1,1]", "--sampler.steps", "2", "--prior.steps", "1"),
    *("--start.ranks", "[2]", "--start.components", "[1]", "--start.iterations", "2", "--prior.sampler_steps", "2"),
]


def test_a_run_on_patches_reconstructs_whole_images(tmp_path, capsys):
    clean = np.cumsum(images(6, (1, 40, 44)), 3) / 5
    mask = RNG.random(clean.shape) < 0.7
    folder, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    Observations(clean * mask, RandomMask(0.3, 0.1), {"mask": mask}, patch=16).save(folder)
    np.save(folder / "clean.npy", clean)
    assert cli.main(["check", str(folder)]) in (0, 1)
    assert cli.main(["train", "--observations", str(folder), "--out", str(run), "--force", *SMALL]) == 0
    assert np.load(run / "reconstructions.npy").shape == (6 * 9, 1, 16, 16)
    pictures = np.load(run / "pictures.npz")
    patches = Patches(clean, Grid((40, 44), 16))[:]
    assert all((patches == item).all((1, 2, 3)).any() for item in pictures["clean"])
    assert cli.main(["evaluate", str(run), "--reference", str(folder / "clean.npy")]) == 0
    assert cli.main(["reconstruct", str(run), "--observations", str(folder), "--draws", "2", "--out", str(out)]) == 0
    assert np.load(out / "draws.npy").shape == (6, 2, 1, 40, 44)
    assert capsys.readouterr().err == ""
    error = np.load(out / "mean.npy") - clean
    assert np.sqrt(np.square(error[mask]).mean()) < 0.3  # what was seen comes back, to the noise
    (folder / "corruption.yaml").write_text("name: RandomMask\nrate: 0.3\nnoise: 0.1\n")
    again = ["reconstruct", str(run), "--observations", str(folder), "--draws", "2", "--out", str(tmp_path / "again")]
    assert cli.main([*again, "--batch", "7"]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "again" / "draws.npy"), np.load(out / "draws.npy"), atol=1e-3)
