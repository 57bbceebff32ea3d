"""Observation folders: what is stored comes back, only what may be read is read, and errors say what to do."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
import yaml

from diffem.corruptions import (
    REGISTRY,
    BlackBox,
    Corruption,
    GaussianBlur,
    GaussianNoise,
    Mask,
    RandomMask,
    RandomProjection,
)
from diffem.data import Observations
from diffem.data.observations import CHUNK, unobserved
from diffem.errors import DiffemError
from diffem.units import Units


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def masked(n: int = 20, shape=(2, 3, 4), dtype=np.float32, **kwargs) -> Observations:
    """Observations of a RandomMask, NaN where the mask says unobserved."""
    y = rng(0).normal(size=(n, *shape)).astype(dtype)
    mask = rng(1).random((n, 1, *shape[1:]) if len(shape) > 1 else (n, *shape)) > 0.4
    y[np.broadcast_to(~mask, y.shape)] = np.nan
    return Observations(y, RandomMask(0.4, 0.1), {"mask": mask}, **kwargs)


def projected(n: int = 6) -> Observations:
    matrix = rng(2).normal(size=(n, 2, 5)).astype(np.float32)
    return Observations(rng(3).normal(size=(n, 2)).astype(np.float32), RandomProjection(2, 0.1), {"matrix": matrix})


def error(function, *args, **kwargs) -> str:
    with pytest.raises(DiffemError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "original",
    [
        masked(),
        masked(shape=(5,), dtype=np.float64, range=(-1, 2.5)),
        projected(),
        Observations(rng().integers(0, 256, (4, 3, 2, 2)).astype(np.uint8), GaussianNoise(3.0)),
        Observations(rng().integers(0, 4096, (4, 1, 8)).astype(np.int16), GaussianBlur(1.5, 20.0), range=[0, 4095]),
        Observations(rng().normal(size=(4, 2)), GaussianNoise(0.1), shape=(1, 3, 3)),
    ],
    ids=["mask", "features", "projection", "uint8", "int16", "shape"],
)
def test_save_and_load(original, tmp_path):
    folder = tmp_path / "deep" / "folder"
    original.save(folder)
    loaded = Observations.load(folder)
    assert type(loaded.corruption) is type(original.corruption)
    assert loaded.corruption.config == original.corruption.config
    assert (loaded.range, loaded.shape, len(loaded)) == (original.range, original.shape, len(original))
    assert loaded.y.dtype == original.y.dtype
    assert np.array_equal(loaded.y, original.y, equal_nan=original.y.dtype.kind == "f")
    assert loaded.params.keys() == original.params.keys()
    for name, array in original.params.items():
        assert loaded.params[name].dtype == array.dtype
        assert np.array_equal(loaded.params[name], array)
    for a, b in zip(_flat(original.batch([3, 1])), _flat(loaded.batch([3, 1])), strict=True):
        assert torch.equal(a, b)


def _flat(batch):
    return [batch[0], *batch[1].values()]


def test_shapes_and_ranges_by_default(tmp_path):
    assert masked().shape == (2, 3, 4)
    assert masked().range is None
    assert projected().shape == (5,)
    assert Observations(np.zeros((2, 3), np.uint8), GaussianNoise(1.0)).range == (0.0, 255.0)
    assert Observations(np.zeros((2, 3), np.uint8), GaussianNoise(1.0), range=(10, 20)).range == (10.0, 20.0)
    assert isinstance(Observations(np.zeros((2, 3)), GaussianNoise(1.0), range=np.array([0, 1])).range[0], float)


def test_the_yaml_is_flat_and_plain(tmp_path):
    masked(range=(0, 1)).save(tmp_path)
    expected = {"name": "RandomMask", "rate": 0.4, "noise": 0.1, "block": 1, "range": [0.0, 1.0]}
    assert yaml.safe_load((tmp_path / "corruption.yaml").read_text()) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corruption.yaml", "mask.npy", "y.npy"]


def test_a_black_box_is_not_written(tmp_path):
    box = BlackBox(torch.abs, "torch:abs")
    Observations(np.ones((4, 3), np.float32), box, range=(0, 2)).save(tmp_path)
    assert yaml.safe_load((tmp_path / "corruption.yaml").read_text()) == {"range": [0.0, 2.0]}
    loaded = Observations.load(tmp_path, box)
    assert loaded.corruption is box
    assert loaded.range == (0.0, 2.0)
    known = f"(known: {', '.join(sorted(REGISTRY))})"
    expected = f"{tmp_path / 'corruption.yaml'}: name: missing; say how y came about, e.g. `name: Mask` {known}"
    assert error(Observations.load, tmp_path) == expected


def test_a_given_corruption_replaces_that_of_the_file(tmp_path):
    masked().save(tmp_path)
    other = RandomMask(0.1, 0.7)
    assert Observations.load(tmp_path, other).corruption is other
    (tmp_path / "corruption.yaml").unlink()
    assert Observations.load(tmp_path, other).corruption is other


def test_files_are_mapped_not_read(tmp_path):
    n, d = 60_000, 100
    np.save(tmp_path / "y.npy", np.zeros((n, d), np.float32))  # 24 MB
    np.save(tmp_path / "mask.npy", np.ones((n, d), bool))
    (tmp_path / "corruption.yaml").write_text("name: RandomMask\nrate: 0.5\nnoise: 0.1\nrange: [0, 1]\n")
    tracemalloc.start()
    try:
        observations = Observations.load(tmp_path)
        unobserved(observations)
        observations.units(observations.split(0)[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(observations.y, np.memmap)
    assert isinstance(observations.params["mask"], np.memmap)
    assert not observations.y.flags.writeable
    assert CHUNK * d * 4 < n * d * 4 / 10
    assert peak < 8e6
    y, _ = observations.batch([0, 1])  # a batch is a copy that may be written to
    y += 1
    assert observations.y[0, 0] == 0


def test_batches_zero_what_is_masked():
    observations = masked()
    indices = np.array([4, 0, 17])
    y, params = observations.batch(indices)
    assert y.dtype == torch.float32
    assert params["mask"].dtype == torch.bool
    assert torch.isfinite(y).all()
    seen = np.broadcast_to(observations.params["mask"][indices], y.shape)
    assert np.array_equal(y.numpy()[seen], observations.y[indices][seen])
    assert (y.numpy()[~seen] == 0).all()
    assert not seen.all()
    for same in ([4, 0, 17], torch.tensor([4, 0, 17])):
        assert torch.equal(observations.batch(same)[0], y)


def test_masked_integers_are_zeroed_and_integer_masks_are_masks():
    y = np.full((3, 4), 7, np.uint8)
    mask = np.array([[1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]], np.uint8)
    batch, params = Observations(y, RandomMask(0.3, 0.0), {"mask": mask}).batch([0, 1, 2])
    assert torch.equal(batch, torch.from_numpy(mask) * 7.0)
    assert torch.equal(params["mask"], torch.from_numpy(mask).bool())


def test_matrices_come_as_floats():
    observations = projected()
    observations.params["matrix"] = observations.params["matrix"].astype(np.float64)
    matrix = observations.batch([5, 2])[1]["matrix"]
    assert matrix.dtype == torch.float32
    assert np.array_equal(matrix.numpy(), observations.params["matrix"][[5, 2]].astype(np.float32))


def test_chunks_cover_all_in_order():
    observations = masked(10)
    assert [c.tolist() for c in observations.chunks(size=4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [c.tolist() for c in observations.chunks(np.array([7, 3, 9]), size=2)] == [[7, 3], [9]]


@pytest.mark.parametrize(
    ("n", "validation", "test"), [(8, 2, 2), (9, 2, 2), (44, 2, 2), (50, 2, 3), (1003, 50, 50), (1010, 50, 51)]
)
def test_split(n, validation, test):
    observations = Observations(np.zeros((n, 1)), GaussianNoise(0.1))
    parts = observations.split(5)
    assert [len(part) for part in parts] == [n - validation - test, validation, test]
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert all(np.array_equal(a, b) for a, b in zip(parts, observations.split(5), strict=True))


@pytest.mark.parametrize("part", [1, 2])
def test_split_is_seeded_and_spread(part):
    observations = Observations(np.zeros((1000, 1)), GaussianNoise(0.1))
    counts = np.zeros(1000)
    for seed in range(200):
        counts[observations.split(seed)[part]] += 1
    assert counts.sum() == 10_000
    assert abs(counts[:500].sum() - 5000) < 4 * 69  # std of a half's count: sqrt(200 * 50 * 0.25 * 0.95)
    assert counts.max() < 30  # binomial(200, 0.05): mean 10
    assert not np.array_equal(observations.split(0)[part], observations.split(1)[part])


@pytest.mark.parametrize("last", [7, 8])
def test_a_named_split_is_cut_in_the_middle_saved_and_part_of_the_checksum(last, tmp_path):
    named = np.isin(np.arange(9), [0, 3, 4, 6, last])
    observations = Observations(np.zeros((9, 1)), GaussianNoise(0.1), held_out=named)
    observations.save(tmp_path)
    for one in (observations, Observations.load(tmp_path)):
        for seed in (3, 4):
            train, validation, test = one.split(seed)
            assert train.tolist() == [1, 2, 5, 15 - last]
            assert (validation.tolist(), test.tolist()) == ([0, 3], [4, 6, last])  # neighbours stay together
    assert observations.digest() != Observations(np.zeros((9, 1)), GaussianNoise(0.1)).digest()


@pytest.mark.parametrize(
    ("held_out", "got"),
    [
        (np.ones(6, bool), "shape (6,) of bool with 6 true"),
        (np.arange(6) > 2, "shape (6,) of bool with 3 true"),
        (np.arange(5) > 0, "shape (5,) of bool with 4 true"),
        (np.arange(6), "shape (6,) of int64 with 5 true"),
    ],
)
def test_a_split_that_cannot_be(held_out, got):
    with pytest.raises(DiffemError) as error:
        Observations(np.zeros((6, 1)), GaussianNoise(0.1), source="data", held_out=held_out)
    assert str(error.value) == (
        f"data: held_out.npy: must be 6 of bool, at least 4 of them true and one false, got {got}"
    )


def test_units_from_the_range():
    assert masked(range=(-1, 3)).units(np.arange(5)) == Units(1.0, 2.0)
    assert Observations(np.zeros((3, 2), np.uint8), GaussianNoise(1.0)).units(np.arange(2)) == Units(127.5, 127.5)


def test_units_read_only_observed_training_values():
    n = 400
    observations = masked(n, shape=(5,))
    train, *halves = observations.split(0)
    held = np.concatenate(halves)
    units = observations.units(train)
    for column, centre, half in zip(observations.y[train].T, units.centre, units.half, strict=True):
        low, high = np.quantile(column[np.isfinite(column)], [0.001, 0.999])
        assert centre == pytest.approx((low + high) / 2, rel=1e-5)
        assert half == pytest.approx((high - low) / 2, rel=1e-5)
    poisoned = observations.y.copy()
    poisoned[held] = np.where(np.isfinite(poisoned[held]), 1e6, np.nan)
    poisoned[~observations.params["mask"]] = -1e9  # neither do masked values count
    other = Observations(poisoned, observations.corruption, observations.params)
    assert other.units(train) == units
    assert (other.units(held).centre == 1e6).all()


def test_units_where_values_say_no_range():
    observations = projected(200)
    train, *halves = observations.split(0)
    observations.y[np.concatenate(halves)] = 1e6
    units = observations.units(train)
    assert units.centre == 0
    assert units.half == pytest.approx(2 * np.sqrt(np.square(observations.y[train]).mean()), rel=1e-5)
    assert Observations(np.full((9, 3), 2.0), GaussianNoise(0.1)).units(np.arange(8)) == Units(
        np.full(3, 2.0), np.ones(3)
    )  # constant
    assert Observations(np.zeros((9, 3)), GaussianNoise(0.1)).units(np.arange(8)) == Units(np.zeros(3), np.ones(3))
    other_shape = Observations(np.full((9, 3), 2.0) + np.arange(3), BlackBox(torch.abs), shape=(1, 2, 2))
    assert other_shape.units(np.arange(8)).centre == 0.0


def test_zeroed_projections_do_not_count_for_the_units():
    observations = projected(50)
    observations.params["matrix"][:, 1] = 0
    half = observations.units(np.arange(50)).half
    assert half == pytest.approx(2 * np.sqrt(np.square(observations.y[:, 0]).mean()), rel=1e-5)


def test_unobserved_names_the_pixels():
    n = CHUNK + 10
    mask = np.ones((n, 1, 3, 4), bool)
    y = np.zeros((n, 2, 3, 4), np.float32)
    mask[:, 0, 2, 1] = mask[:, 0, 0, 3] = False
    corruption = RandomMask(0.5, 0.1)
    assert unobserved(Observations(y, corruption, {"mask": mask})) == [(0, 0, 3), (0, 2, 1)]
    mask[-1, 0, 2, 1] = True  # seen once, by the last item
    assert unobserved(Observations(y, corruption, {"mask": mask})) == [(0, 0, 3)]
    mask[0, 0, 0, 3] = True
    assert unobserved(Observations(y, corruption, {"mask": mask})) == []
    assert unobserved(Observations(y[:5], GaussianNoise(0.1))) == []


# Errors --------------------------------------------------------------------------------------------


def test_missing_folder_and_files(tmp_path):
    assert error(Observations.load, tmp_path / "no") == f"{tmp_path / 'no'}: no such folder of observations"
    assert error(Observations.load, tmp_path) == (
        f"{tmp_path / 'corruption.yaml'}: missing; it says how y came about, e.g. `name: Mask`, `noise: 0.01`"
    )
    (tmp_path / "corruption.yaml").write_text("name: GaussianNoise\nnoise: 0.1\n")
    assert error(Observations.load, tmp_path) == f"{tmp_path / 'y.npy'}: missing"
    np.save(tmp_path / "y.npy", np.zeros((3, 2)))
    assert len(Observations.load(tmp_path)) == 3
    (tmp_path / "corruption.yaml").write_text("name: RandomMask\nrate: 0.5\nnoise: 0.1\n")
    assert error(Observations.load, tmp_path) == (
        f"{tmp_path}: mask.npy: missing; RandomMask needs to know which entries were observed (true = observed)"
    )
    (tmp_path / "corruption.yaml").write_text("name: RandomProjection\nrows: 2\nnoise: 0.1\n")
    assert error(Observations.load, tmp_path) == (
        f"{tmp_path}: matrix.npy: missing; RandomProjection needs one matrix (rows, features) per observation"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML: line 1: expected the node content, but found '<stream end>'"),
        ("- RandomMask\n- 0.5\n", "must hold `key: value` lines"),
        ("RandomMask", "must hold `key: value` lines"),
        (
            "name: GaussianNose\nnoise: 0.1",
            "name: unknown corruption 'GaussianNose'; did you mean 'GaussianNoise'? "
            f"(known: {', '.join(sorted(REGISTRY))})",
        ),
        ("name: GaussianNoise\nnoise: [a]", "noise: must be a number, got ['a']"),
        (
            "name: BlackBox\nfunction: os:system",
            "a data folder never names code to run; give the function with --corruption package.module:function",
        ),
        (
            "name: !!python/object/apply:os.system [exit 1]",
            "is not YAML: line 1: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    np.save(tmp_path / "y.npy", np.zeros((3, 2)))
    (tmp_path / "corruption.yaml").write_text(text)
    assert error(Observations.load, tmp_path) == f"{tmp_path / 'corruption.yaml'}: {message}"


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("[1, 0]", "[1, 0]"),
        ("[1, 1]", "[1, 1]"),
        ("[0, 1, 2]", "[0, 1, 2]"),
        ("[.nan, 1]", "[nan, 1]"),
        ("5", "5"),
        ("ab", "'ab'"),
        ("[a, b]", "['a', 'b']"),
        ("{low: 0, high: 1}", "{'low': 0, 'high': 1}"),
    ],
)
def test_bad_range(tmp_path, text, got):
    np.save(tmp_path / "y.npy", np.zeros((3, 2)))
    (tmp_path / "corruption.yaml").write_text(f"name: GaussianNoise\nnoise: 0.1\nrange: {text}\n")
    expected = f"{tmp_path}: range: must be [low, high] with low < high, got {got}"
    assert error(Observations.load, tmp_path) == expected


def test_bad_range_given_directly():
    y = np.zeros((3, 2))
    expected = "observations: range: must be [low, high] with low < high, got [2, 1]"
    assert error(Observations, y, GaussianNoise(0.1), range=(2, 1)) == expected


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64, bool])
def test_integers_need_a_range(dtype):
    y = np.zeros((3, 2), dtype)
    assert error(Observations, y, GaussianNoise(0.1), source="here") == (
        f"here: y.npy: holds {np.dtype(dtype)} but no range is stated; add e.g. `range: [0, 4095]` to corruption.yaml"
    )
    assert Observations(y, GaussianNoise(0.1), range=(0, 1)).range == (0.0, 1.0)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), ()])
def test_bad_y(shape):
    assert error(Observations, np.zeros(shape), GaussianNoise(0.1), source="here") == (
        f"here: y.npy: needs at least one observation of shape (features,) or (channels, *spatial), got {shape}"
    )


@pytest.mark.parametrize("shape", [(5, 1, 3, 3), (5, 3, 4), (5, 2, 3, 4, 1), (5, 4, 3, 4)])
def test_mask_that_does_not_fit(shape):
    y = np.zeros((5, 2, 3, 4))
    assert error(Observations, y, RandomMask(0.5, 0.1), {"mask": np.ones(shape, bool)}, source="here") == (
        f"here: mask.npy: shape {shape} does not broadcast against y's (5, 2, 3, 4)"
    )


def test_mask_with_more_channels_than_y():
    mask = np.ones((5, 2, 3, 4), bool)
    assert error(Observations, np.zeros((5, 1, 3, 4)), RandomMask(0.5, 0.1), {"mask": mask}, source="here") == (
        "here: mask.npy: shape (5, 2, 3, 4) does not broadcast against y's (5, 1, 3, 4)"
    )


def test_lengths_that_differ():
    y = np.zeros((5, 4))
    assert error(Observations, y, RandomMask(0.5, 0.1), {"mask": np.ones((4, 4), bool)}, source="here") == (
        "here: mask.npy: has 4 rows where y.npy has 5; the first axis is that of the observations, of length 1 if it is one for all"
    )
    assert error(Observations, y, RandomMask(0.5, 0.1), {"mask": np.ones((2, 4), bool)}, source="here") == (
        "here: mask.npy: has 2 rows where y.npy has 5; the first axis is that of the observations, of length 1 if it is one for all"
    )
    matrix = np.ones((6, 4, 3))
    assert error(Observations, y, RandomProjection(4, 0.1), {"matrix": matrix}, source="here") == (
        "here: matrix.npy: has 6 rows where y.npy has 5; the first axis is that of the observations, of length 1 if it is one for all"
    )


@pytest.mark.parametrize("shape", [(5, 3, 7), (5, 4), (5, 4, 7, 1)])
def test_matrix_that_does_not_fit(shape):
    matrix = np.ones(shape)
    assert error(Observations, np.zeros((5, 4)), RandomProjection(4, 0.1), {"matrix": matrix}, source="here") == (
        f"here: matrix.npy: shape {shape} does not fit y's (5, 4); it must be (N, rows, features)"
    )


@pytest.mark.parametrize("corruption", [Mask(0.1), RandomMask(0.5, 0.1), GaussianNoise(0.1)])
def test_nan_is_a_mask_where_there_is_none(corruption, tmp_path):
    rng = np.random.default_rng(0)
    y, shown = rng.normal(size=(CHUNK + 10, 6)).astype(np.float32), np.ones((CHUNK + 10, 6), bool)
    shown[CHUNK + 3 :, 2:4] = False
    data = Observations(np.where(shown, y, np.nan), corruption)
    given = Observations(np.where(shown, y, 0), corruption, {"mask": shown})
    for rows in (np.arange(5), np.arange(CHUNK, CHUNK + 10)):
        for a, b in zip(data.batch(rows), given.batch(rows), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    data.save(tmp_path)
    assert np.array_equal(Observations.load(tmp_path).params["mask"], shown)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("item", [0, CHUNK + 3])
def test_not_finite_where_observed(value, item):
    y = np.zeros((CHUNK + 10, 1, 2, 3), np.float32)
    y[item, 0, 1, 2] = value
    message = f"here: y.npy: entry [{item}, 0, 1, 2] is not finite although it counts as observed; mask it or remove it"
    if not np.isnan(value):
        assert error(Observations, y, GaussianNoise(0.1), source="here") == message
    mask = np.ones(y.shape, bool)
    assert error(Observations, y, RandomMask(0.5, 0.1), {"mask": mask}, source="here") == message
    mask[item, 0, 1, 2] = False
    Observations(y, RandomMask(0.5, 0.1), {"mask": mask})


@pytest.mark.parametrize("n", [1, 7])
def test_too_few_to_split(n):
    observations = Observations(np.zeros((n, 3)), GaussianNoise(0.1), source="here")
    assert error(observations.split, 0) == (
        f"here: {n} observation(s) are too few: a tenth, and at least 4, are held out, the rest trains"
    )


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", ["y", "mask"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncate", "mmap length is greater than file size"),
        ("header", "EOF"),
        ("empty", "No data left in file"),
        ("text", "pickled"),
        ("object", ""),
        ("pickle", "pickled"),
    ],
)
def test_files_that_are_no_arrays(tmp_path, name, damage, reason):
    masked().save(tmp_path)
    file = tmp_path / f"{name}.npy"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "header":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("1,2,3\n")
    elif damage == "object":
        np.save(file, np.array([[Bomb(), 1], [2, 3]], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(Bomb()))
    message = error(Observations.load, tmp_path)
    if damage == "object":
        assert message == f"{file}: holds text or objects; give numbers"
        return
    assert message.startswith(f"{file}: is not a complete .npy array: ")
    assert reason in message  # numpy's own words


def test_a_function_of_items_alone_takes_no_parameters():
    mask = np.ones((4, 3), dtype=bool)
    with pytest.raises(DiffemError) as caught:
        Observations(np.zeros((4, 3), np.float32), BlackBox(torch.abs, "torch:abs"), {"mask": mask})
    assert str(caught.value) == (
        "observations: mask.npy: BlackBox takes no parameters; write it as f(x, params); put other files elsewhere"
    )


@pytest.mark.parametrize("name", ["sigma", "kernel", "matrix", "draws"])
def test_a_file_that_no_one_reads_is_refused(name, tmp_path):
    masked().save(tmp_path)
    np.save(tmp_path / f"{name}.npy", np.ones(len(masked())))
    assert error(Observations.load, tmp_path) == (
        f"{tmp_path}: {name}.npy: RandomMask takes mask.npy, noise.npy; put other files elsewhere"
    )


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (np.full((20, 3), "a"), "y.npy: holds text or objects (<U1); give numbers"),
        (np.full((20, 3), None), "y.npy: holds text or objects (object); give numbers"),
        (np.zeros((20, 3), "datetime64[s]"), "y.npy: holds dates (datetime64[s]); give numbers"),
    ],
)
def test_what_are_not_numbers_is_refused(y, text):
    with pytest.raises(DiffemError) as caught:
        Observations(y, GaussianNoise(0.1), range=(0, 1))
    assert str(caught.value) == f"observations: {text}"


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, np.nan])
def test_a_mask_of_other_numbers_is_refused(value):
    mask = np.ones((20, 3), np.float32)
    mask[7, 1] = value
    with pytest.raises(DiffemError) as caught:
        Observations(np.zeros((20, 3), np.float32), RandomMask(0.5, 0.1), {"mask": mask})
    assert str(caught.value) == (
        f"observations: mask.npy: holds {value:g}; a mask is true or 1 where y was observed, else false or 0"
    )


def test_one_mask_for_all_observations():
    y = np.random.default_rng(0).standard_normal((20, 1, 3, 4)).astype(np.float32)
    mask = np.random.default_rng(1).random((1, 1, 3, 4)) > 0.4
    one = Observations(y, RandomMask(0.4, 0.1), {"mask": mask})
    many = Observations(y, RandomMask(0.4, 0.1), {"mask": np.repeat(mask, 20, 0)})
    for (a, p), (b, q) in [(one.batch([3, 5]), many.batch([3, 5]))]:
        assert torch.equal(a, b)
        assert torch.equal(p["mask"], q["mask"])
    assert one.digest() == many.digest()


def test_units_are_those_of_all_training_rows_not_of_the_first():
    """Data come sorted."""
    y = np.linspace(0, 100, 30_000, dtype=np.float32).reshape(10_000, 3)
    units = Observations(y, GaussianNoise(0.1)).units(np.arange(10_000))
    assert units.scale(0.0) == pytest.approx(-1, abs=0.01)
    assert units.scale(100.0) == pytest.approx(1, abs=0.01)


def test_any_parameter_of_a_users_corruption_is_written_and_read(tmp_path):
    class Gained(Corruption):
        def apply(self, x, params, generator):
            return x * params["gain"]

    gain = np.arange(40.0)[:, None]
    Observations(np.zeros((40, 3)), Gained(), {"gain": gain}, range=(0, 1)).save(tmp_path)
    assert np.array_equal(Observations.load(tmp_path, Gained()).params["gain"], gain)


def test_clip_is_saved_too(tmp_path):
    box = BlackBox(torch.sqrt, "torch:sqrt", (0.0, 4.0))
    Observations(np.zeros((40, 3)), box, range=(0, 4)).save(tmp_path)
    assert Observations.load(tmp_path, BlackBox(torch.sqrt, "torch:sqrt")).corruption.config == box.config


def test_tensors_and_lists_are_arrays():
    mask, y = torch.rand(40, 3) > 0.5, torch.randn(40, 3)
    one = Observations(y, RandomMask(0.5, 0.1), {"mask": mask})
    two = Observations(y.tolist(), RandomMask(0.5, 0.1), {"mask": mask.tolist()})
    assert torch.equal(one.batch([1, 2])[0], two.batch([1, 2])[0])


@pytest.mark.parametrize(
    ("corruption", "params", "text"),
    [
        ("RandomMask", None, "corruption: must be a corruption, e.g. Mask(0.1), got 'RandomMask'"),
        (
            RandomMask(0.5, 0.1),
            np.ones((40, 3), bool),
            'params: must be named arrays, e.g. {"mask": mask}, got ndarray',
        ),
    ],
)
def test_what_is_not_a_corruption_or_named_arrays(corruption, params, text):
    with pytest.raises(DiffemError) as caught:
        Observations(np.zeros((40, 3)), corruption, params)
    assert str(caught.value) == f"observations: {text}"
