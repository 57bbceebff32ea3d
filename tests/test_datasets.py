"""Data sets: exact pixels out of the real layouts, errors that name the file, and corrupted folders that come back."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffem.clean import datasets
from diffem.clean.datasets import corrupt, load, manifold_curve
from diffem.corruptions import BlackBox, Corruption, GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.data import Observations
from diffem.data.observations import CHUNK
from diffem.errors import DiffemError

NAMES = "celeba, cifar10, digits, fashion-mnist, manifold"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(0, 256, shape).astype(np.uint8)


def error(function, *args, **kwargs) -> str:
    with pytest.raises(DiffemError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(data: datasets.CleanData, items: np.ndarray, value_range, labels=None) -> None:
    assert data.items.dtype == items.dtype
    np.testing.assert_array_equal(data.items, items)
    assert data.range == value_range
    if labels is None:
        assert data.labels is None
    else:
        assert data.labels.dtype == np.int64
        np.testing.assert_array_equal(data.labels, labels)


# The curve and the digits


@pytest.mark.parametrize("seed", [0, 3])
def test_manifold(seed):
    data = load("manifold", seed=seed)
    assert (data.items.shape, data.items.dtype, data.range, data.labels) == ((65_536, 5), np.float32, (-2, 2), None)
    np.testing.assert_array_equal(data.items.min(0), -2)
    np.testing.assert_array_equal(data.items.max(0), 2)
    np.testing.assert_array_equal(load("manifold", seed=seed).items, data.items)
    np.testing.assert_array_equal(load("manifold", seed=seed, limit=7).items, data.items[:7])


def test_manifold_is_the_stated_curve():
    draws = rng(5)
    a, b, c = draws.random((3, 5, 10))
    t = draws.random((65_536, 1, 1))[:, 0, 0]

    def curve(t):
        x = np.zeros((len(t), 5))
        for i in range(5):
            for k in range(1, 11):
                x[:, i] += a[i, k - 1] / k**3 * np.sin(2 * np.pi * (k * b[i, k - 1] * t + c[i, k - 1]))
        return x

    x = curve(t)
    rescale = lambda v: -2 + 4 * (v - x.min(0)) / np.ptp(x, 0)  # noqa: E731
    np.testing.assert_allclose(load("manifold", seed=5).items, rescale(x), atol=1e-5)
    np.testing.assert_allclose(manifold_curve(5, 101), rescale(curve(np.linspace(0, 1, 101))), atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_point_is_on_the_curve(seed):
    from scipy.spatial import cKDTree

    curve = manifold_curve(seed)
    assert (curve.shape, curve.dtype) == ((65_536, 5), np.float32)
    distance, _ = cKDTree(curve).query(load("manifold", seed=seed).items)
    assert distance.max() < 1e-3
    other, _ = cKDTree(manifold_curve(seed + 1)).query(curve[::64])
    assert np.median(other) > 0.1


def test_manifold_seeds():
    assert not np.array_equal(load("manifold", seed=0, limit=9).items, load("manifold", seed=1, limit=9).items)
    assert error(load, "manifold", seed=-1) == "seed: must be at least 0, got -1"


def test_digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    same(load("digits"), raw.images[:, None].astype(np.float32), (0, 16), raw.target)
    same(load("digits", limit=5), raw.images[:5, None].astype(np.float32), (0, 16), raw.target[:5])
    assert load("digits").items.shape == (1797, 1, 8, 8)


# Paths


def test_npy_uint8(tmp_path):
    items = pixels(6, 2, 3)
    np.save(tmp_path / "a.npy", items)
    same(load(str(tmp_path / "a.npy")), items, (0, 255))
    same(load(str(tmp_path / "a.npy"), limit=4), items[:4], (0, 255))
    same(load(str(tmp_path / "a.npy"), limit=400), items, (0, 255))


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_npy_takes_its_range_from_the_data(tmp_path, dtype):
    items = np.array([[-3, 1], [2, 7], [100, 0]], dtype=dtype)
    np.save(tmp_path / "a.npy", items)
    same(load(str(tmp_path / "a.npy")), items, (-3, 100))
    same(load(str(tmp_path / "a.npy"), limit=2), items[:2], (-3, 7))


def test_npy_is_memory_mapped(tmp_path):
    np.save(tmp_path / "a.npy", pixels(6, 2, 3))
    assert isinstance(load(str(tmp_path / "a.npy")).items, np.memmap)


def test_npy_errors(tmp_path):
    file = tmp_path / "a.npy"
    assert error(load, str(file)) == f"{file}: no such file"
    for items, text in [
        (np.zeros(3), "must have shape (N, features) or (N, channels, *spatial), got (3,)"),
        (np.zeros((0, 3)), "must have shape (N, features) or (N, channels, *spatial), got (0, 3)"),
        (np.zeros((2, 3), complex), "holds complex128; it must hold real numbers"),
        (np.array([["a", "b"]]), "holds <U1; it must hold real numbers"),
        (np.full((2, 3), 4.5), "all values are 4.5, so there is no range to work in"),
        (np.array([[0, 1], [np.nan, 2]]), "holds values that are not finite; clean data must be complete"),
        (np.array([[0, 1], [-np.inf, 2]]), "holds values that are not finite; clean data must be complete"),
    ]:
        np.save(file, items)
        assert error(load, str(file)) == f"{file}: {text}"
    np.save(file, np.zeros((20, 3)))
    file.write_bytes(file.read_bytes()[:-8])
    assert error(load, str(file)).startswith(f"{file}: is not a complete .npy array of numbers: ")
    np.save(file, np.array([[{}, 1]], dtype=object), allow_pickle=True)
    assert error(load, str(file)).startswith(f"{file}: is not a complete .npy array of numbers: ")
    file.write_bytes(b"")
    assert error(load, str(file)).startswith(f"{file}: is not a complete .npy array of numbers: ")


def test_unknown_names(tmp_path):
    tail = f"no such data set, .npy file or folder of images; did you mean 'digits'? (known: {NAMES})"
    assert error(load, "digit") == f"digit: {tail}"
    assert error(load, "./nowhere") == (f"./nowhere: no such data set, .npy file or folder of images; (known: {NAMES})")
    (tmp_path / "a.csv").write_text("1,2")
    assert error(load, str(tmp_path / "a.csv")) == f"{tmp_path}/a.csv: is neither a .npy array nor a folder of images"
    assert error(load, "digits", limit=0) == "limit: must be at least 1, got 0"


def test_folder_of_rgb_images_in_the_order_of_their_names(tmp_path):
    images = pixels(4, 5, 7, 3)
    for name, image in zip(("b.png", "a.bmp", "d.TIF", "c.webp"), images, strict=True):
        Image.fromarray(image).save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves")
    expected = images[[1, 0, 3, 2]].transpose(0, 3, 1, 2)
    same(load(str(tmp_path)), expected, (0, 255))
    same(load(str(tmp_path), limit=2), expected[:2], (0, 255))


def test_folder_of_greyscale_images(tmp_path):
    images = pixels(2, 4, 6)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    same(load(str(tmp_path)), images[:, None], (0, 255))


def test_folder_with_palette_and_bilevel_images(tmp_path):
    image = Image.fromarray(pixels(4, 4, 3)).quantize(8)
    (tmp_path / "p").mkdir()
    image.save(tmp_path / "p" / "0.png")
    np.testing.assert_array_equal(
        load(str(tmp_path / "p")).items[0].transpose(1, 2, 0), np.asarray(image.convert("RGB"))
    )
    (tmp_path / "1").mkdir()
    Image.fromarray(np.eye(3) > 0).save(tmp_path / "1" / "0.png")
    np.testing.assert_array_equal(load(str(tmp_path / "1")).items[0, 0], 255 * np.eye(3))


def test_folder_errors(tmp_path):
    assert error(load, str(tmp_path)) == f"{tmp_path}: holds no images (.png, .jpg, .jpeg, .bmp, .webp, .tif, .tiff)"
    Image.fromarray(pixels(4, 6, 3)).save(tmp_path / "a.png")
    Image.fromarray(pixels(6, 4, 3)).save(tmp_path / "b.png")
    text = f"{tmp_path}/b.png: is 4x6 RGB where a.png is 6x4 RGB; all images must be alike"
    assert error(load, str(tmp_path)) == text
    Image.fromarray(pixels(4, 6)).save(tmp_path / "b.png")
    text = f"{tmp_path}/b.png: is 6x4 greyscale where a.png is 6x4 RGB; all images must be alike"
    assert error(load, str(tmp_path)) == text
    for image, mode in [(pixels(4, 6, 4), "RGBA"), (pixels(4, 6).astype(np.uint16), "I;16")]:
        Image.fromarray(image).save(tmp_path / "b.png")
        text = f"{tmp_path}/b.png: is an image of mode {mode}; convert it to 8-bit RGB or greyscale"
        assert error(load, str(tmp_path)) == text
    good = (tmp_path / "a.png").read_bytes()
    for content in (b"", b"rubbish", good[:40], good[:-30]):
        (tmp_path / "b.png").write_bytes(content)
        text = f"{tmp_path}/b.png: cannot be read as an image (not a complete image); replace it or remove it"
        assert error(load, str(tmp_path)) == text


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


def fashion(folder, n=5, suffix=""):
    images, labels = pixels(n, 28, 28), np.arange(n) % 10
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        (folder / f"train-{name}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return images[:, None], labels


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["FashionMNIST/raw", "."])
def test_fashion_mnist(tmp_path, inside, suffix):
    images, labels = fashion(tmp_path / inside, suffix=suffix)
    same(load("fashion-mnist", tmp_path), images, (0, 255), labels)
    same(load("fashion-mnist", str(tmp_path), limit=2), images[:2], (0, 255), labels[:2])


def test_fashion_mnist_errors(tmp_path):
    layout = "FashionMNIST/raw/train-images-idx3-ubyte"
    assert error(load, "fashion-mnist") == (
        f"fashion-mnist: is read from your disk; say with --root which folder holds {layout}"
    )
    assert error(load, "fashion-mnist", tmp_path / "no") == (
        f"{tmp_path}/no: no such folder; --root of fashion-mnist must hold {layout}"
    )
    assert error(load, "fashion-mnist", tmp_path) == (
        f"{tmp_path}: --root of fashion-mnist must hold {layout} (.gz will do)"
    )
    fashion(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    content = images.read_bytes()
    for cut, text in [
        (3936 - 1, "has 3935 bytes where its header promises 3936; fetch it again"),
        (3, "is not an idx file of unsigned bytes; fetch it again"),
        (0, "is not an idx file of unsigned bytes; fetch it again"),
    ]:
        images.write_bytes(content[:cut])
        assert error(load, "fashion-mnist", tmp_path) == f"{images}: {text}"
    for cut in range(4, 16):
        images.write_bytes(content[:cut])
        assert error(load, "fashion-mnist", tmp_path).startswith(f"{images}: has {cut} bytes where its header promises")
    images.write_bytes(idx(pixels(5, 27, 28)))
    text = f"{images}: has shape (5, 27, 28) where Fashion-MNIST has (N, 28, 28)"
    assert error(load, "fashion-mnist", tmp_path) == text
    images.write_bytes(content)
    labels.write_bytes(idx(np.zeros(4)))
    assert error(load, "fashion-mnist", tmp_path) == f"{labels}: has shape (4,) where there are 5 images"
    labels.unlink()
    assert error(load, "fashion-mnist", tmp_path) == f"{labels}: missing"


def test_fashion_mnist_broken_gz(tmp_path):
    fashion(tmp_path, suffix=".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    for broken in (content[:-100], b"not gzip at all", bytes(flipped)):
        file.write_bytes(broken)
        text = error(load, "fashion-mnist", tmp_path)
        assert text.startswith(f"{file}: cannot be read (")
        assert text.endswith("); fetch it again")


# CIFAR-10


def cifar(folder, n=3, protocol=2, keys=str.encode, order="C"):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = pixels(5 * n, 3, 32, 32), rng(1).integers(0, 10, 5 * n)
    for i in range(5):
        part = slice(i * n, (i + 1) * n)
        content = {
            keys("batch_label"): keys(f"training batch {i + 1} of 5"),
            keys("labels"): labels[part].tolist(),
            keys("data"): np.array(images[part].reshape(n, 3072), order=order),
            keys("filenames"): [keys(f"{j}.png") for j in range(n)],
        }
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(content, protocol=protocol))
    return images, labels


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("keys", [str.encode, str], ids=["bytes", "str"])
def test_cifar10(tmp_path, protocol, keys):
    images, labels = cifar(tmp_path / "cifar-10-batches-py", protocol=protocol, keys=keys)
    same(load("cifar10", tmp_path), images, (0, 255), labels)
    same(load("cifar10", tmp_path, limit=4), images[:4], (0, 255), labels[:4])


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10_in_fortran_order_and_in_the_root_itself(tmp_path, protocol):
    images, labels = cifar(tmp_path, protocol=protocol, order="F")
    same(load("cifar10", tmp_path), images, (0, 255), labels)


def test_cifar10_as_python_2_wrote_it(tmp_path):
    """The opcodes of the published files: protocol 2, every string a byte string, numpy.core by its old name."""
    images = pixels(2, 3072)

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    array += b"(K\x01K\x02M\x00\x0c\x86" + dtype + b"\x89" + string(images.tobytes()) + b"tb"
    labels = b"](K\x06K\x09e"
    content = b"\x80\x02}(" + string(b"data") + array + string(b"labels") + labels + b"u."
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], images)
    (tmp_path / "data_batch_1").write_bytes(content)
    same(load("cifar10", tmp_path, limit=2), images.reshape(2, 3, 32, 32), (0, 255), [6, 9])


class Runs:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickles_are_refused(tmp_path, protocol):
    cifar(tmp_path)
    file, trace = tmp_path / "data_batch_1", tmp_path / "trace"
    tail = ", and CIFAR-10 is made of arrays, lists and names only"
    builtins = "__builtin__" if protocol < 3 else "builtins"
    for attack, name in [
        (Runs(os.mkdir, str(trace)), f"{os.mkdir.__module__}.mkdir"),
        (Runs(eval, f"__import__('os').mkdir({str(trace)!r})"), f"{builtins}.eval"),
        (Runs(getattr, "text", "upper"), f"{builtins}.getattr"),
        (Runs(np.load, "x.npy"), "numpy.load"),
    ]:
        file.write_bytes(pickle.dumps({b"data": attack, b"labels": []}, protocol=protocol))
        text = error(load, "cifar10", tmp_path)
        assert text.startswith(f"{file}: refused: this pickle asks for ")
        assert text.endswith(tail)
        if "load" not in name:
            assert text == f"{file}: refused: this pickle asks for {name}{tail}"
        assert not trace.exists()
    file.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x10f2py.os.getpid.x\x93.")  # dotted names reach through modules
    assert error(load, "cifar10", tmp_path) == f"{file}: refused: this pickle asks for numpy.f2py.os.getpid.x{tail}"


def test_pickles_cannot_alter_the_stand_ins(tmp_path):
    file = tmp_path / "data_batch_1"
    for where, name in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
        file.write_bytes(f"c{where}\n{name}\nN(Vchanged\nI1\nd".encode() + b"\x86b.")
        assert error(load, "cifar10", tmp_path).startswith(f"{file}: ")
    kinds = (datasets._Array, datasets._Dtype, datasets._Latin1, datasets._StandIn)
    assert not any(hasattr(kind, "changed") for kind in kinds)


def test_cifar10_errors(tmp_path):
    layout = "cifar-10-batches-py/data_batch_1 or parquet files"
    assert error(load, "cifar10") == f"cifar10: is read from your disk; say with --root which folder holds {layout}"
    assert error(load, "cifar10", tmp_path) == f"{tmp_path}: --root of cifar10 must hold {layout}"
    cifar(tmp_path)
    file = tmp_path / "data_batch_2"
    content = file.read_bytes()
    for cut in (0, 1, 100, len(content) - 1):
        file.write_bytes(content[:cut])
        text = error(load, "cifar10", tmp_path)
        assert text.startswith(f"{file}: is not a complete batch of CIFAR-10 (")
        assert text.endswith("); fetch it again")
    assert len(load("cifar10", tmp_path, limit=3).items) == 3  # the broken file is not needed
    data = pixels(2, 3072)
    for batch, text in [
        ([], "data: must be an array of bytes (N, 3072)"),
        ({b"labels": [1, 2]}, "data: must be an array of bytes (N, 3072)"),
        ({b"data": data[:, :3000].copy(), b"labels": [1, 2]}, "data: must be an array of bytes (N, 3072)"),
        ({b"data": [1], b"labels": [1]}, "data: must be an array of bytes (N, 3072)"),
        ({b"data": data}, "labels: must be a list of 2 integers"),
        ({b"data": data, b"labels": [1]}, "labels: must be a list of 2 integers"),
        ({b"data": data, b"labels": [1, 2.0]}, "labels: must be a list of 2 integers"),
    ]:
        file.write_bytes(pickle.dumps(batch, protocol=2))
        assert error(load, "cifar10", tmp_path) == f"{file}: {text}"
    file.write_bytes(pickle.dumps({b"data": data.astype(np.float32), b"labels": [1, 2]}, protocol=2))
    assert error(load, "cifar10", tmp_path) == (
        f"{file}: is not a complete batch of CIFAR-10 (array of 'f4' where bytes are expected); fetch it again"
    )
    file.unlink()
    assert error(load, "cifar10", tmp_path) == f"{file}: missing"


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def parquet(file, images, labels=None, column="img", struct=True):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = [i if i is None or isinstance(i, bytes) else encoded(i.transpose(1, 2, 0)) for i in images]
    values = [{"bytes": c, "path": None} for c in contents] if struct else contents
    columns = {column: values} if labels is None else {column: values, "label": labels}
    parquet.write_table(pyarrow.table(columns), file)


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("struct", [True, False])
def test_cifar10_from_parquet(tmp_path, column, struct):
    images, labels = pixels(5, 3, 32, 32), np.array([3, 1, 4, 1, 5])
    parquet(tmp_path / "train-0.parquet", images[:3], labels[:3].tolist(), column, struct)
    parquet(tmp_path / "train-1.parquet", images[3:], labels[3:].tolist(), column, struct)
    parquet(tmp_path / "a-test.parquet", images[:1], [9], column, struct)
    same(load("cifar10", tmp_path), images, (0, 255), labels)
    same(load("cifar10", tmp_path, limit=4), images[:4], (0, 255), labels[:4])


def test_cifar10_from_parquet_of_other_names_and_without_labels(tmp_path):
    images = pixels(2, 3, 32, 32)
    parquet(tmp_path / "part.parquet", images)
    same(load("cifar10", tmp_path), images, (0, 255))


def test_cifar10_parquet_errors(tmp_path):
    file = tmp_path / "train.parquet"
    good = pixels(2, 3, 32, 32)
    parquet(file, good, [1, 2], column="picture")
    assert error(load, "cifar10", tmp_path) == f"{file}: has no column img or image; it has picture, label"
    parquet(file, [good[0], pixels(3, 16, 32)], [1, 2])
    assert error(load, "cifar10", tmp_path) == f"{file}: img of row 1: is 32x16 RGB where CIFAR-10 is 32x32 RGB"
    parquet(file, [good[0], None], [1, 2])
    assert error(load, "cifar10", tmp_path) == f"{file}: img of row 1: must be the bytes of an image file"
    parquet(file, [b"rubbish", good[0]], [1, 2])
    assert error(load, "cifar10", tmp_path) == (
        f"{file}: img of row 0: cannot be read as an image (not a complete image); replace it or remove it"
    )
    for labels in ([1, None], ["cat", "dog"]):
        parquet(file, good, labels)
        assert error(load, "cifar10", tmp_path) == f"{file}: label: must be an integer in every row"
    parquet(file, good[:0], [])
    assert error(load, "cifar10", tmp_path) == f"{tmp_path}: the files of cifar10 hold no images"
    parquet(file, good, [1, 2])
    file.write_bytes(file.read_bytes()[:-20])
    assert error(load, "cifar10", tmp_path).startswith(f"{file}: is not a complete parquet file (")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error(load, "cifar10", tmp_path) == ("pyarrow is not installed: pip install 'diffem-torch[tables]'")


# CelebA


def celeba(folder, n=3):
    folder.mkdir(parents=True, exist_ok=True)
    column, row = np.meshgrid(np.arange(178), np.arange(218))
    for i in range(n):
        image = np.stack([column, row, np.full_like(row, 40 * i + 20)], -1).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i + 1:06}.jpg", quality=100, subsampling=0)


@pytest.mark.parametrize("inside", ["celeba/img_align_celeba", "img_align_celeba"])
def test_celeba(tmp_path, inside):
    celeba(tmp_path / inside)
    data = load("celeba", tmp_path)
    assert (data.items.shape, data.items.dtype, data.range, data.labels) == ((3, 3, 64, 64), np.uint8, (0, 255), None)
    # Ramps show which part is cut out: pixel j of 64 is centred on 19 + (j + 0.5) * 140 / 64 - 0.5 of 178.
    centre = (np.arange(64) + 0.5) * 140 / 64 - 0.5
    inner = slice(2, -2)
    red, green, blue = data.items[:, 0], data.items[:, 1], data.items[:, 2]
    assert np.abs(red - (19 + centre))[:, :, inner].max() < 2
    assert np.abs(green - (39 + centre)[:, None])[:, inner].max() < 2
    assert np.abs(red - (19 + centre))[:, :, inner].mean() < 0.6
    assert np.abs(blue - np.array([20, 60, 100])[:, None, None]).max() <= 2
    np.testing.assert_array_equal(load("celeba", tmp_path, limit=2).items, data.items[:2])


def test_celeba_pixels_and_the_folder_itself(tmp_path):
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    Image.fromarray(pixels(218, 178, 3)).save(folder / "000001.jpg")
    with Image.open(folder / "000001.jpg") as image:
        expected = np.asarray(image.crop((19, 39, 159, 179)).resize((64, 64), Image.Resampling.BICUBIC))
    same(load("celeba", folder), expected.transpose(2, 0, 1)[None], (0, 255))


def test_celeba_errors(tmp_path):
    layout = "celeba/img_align_celeba"
    assert error(load, "celeba") == f"celeba: is read from your disk; say with --root which folder holds {layout}"
    assert error(load, "celeba", tmp_path) == f"{tmp_path}: --root of celeba must hold {layout}"
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    assert error(load, "celeba", tmp_path) == f"{folder}: holds no images (.jpg)"
    Image.fromarray(pixels(178, 178, 3)).save(folder / "1.jpg")
    text = f"{folder}/1.jpg: is 178x178 RGB where CelebA's aligned images are 178x218 RGB"
    assert error(load, "celeba", tmp_path) == text
    Image.fromarray(pixels(218, 178)).save(folder / "1.jpg")
    text = f"{folder}/1.jpg: is 178x218 greyscale where CelebA's aligned images are 178x218 RGB"
    assert error(load, "celeba", tmp_path) == text
    (folder / "1.jpg").write_bytes(b"\xff\xd8\xff")
    text = f"{folder}/1.jpg: cannot be read as an image (not a complete image); replace it or remove it"
    assert error(load, "celeba", tmp_path) == text


# Corrupted folders


def files(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_corrupt_with_masks(tmp_path):
    rate, noise = 0.75, 0.5
    observations = corrupt("digits", RandomMask(rate, noise), tmp_path / "new" / "out", seed=4)
    assert sorted(files(tmp_path / "new" / "out")) == ["corruption.yaml", "mask.npy", "y.npy"]
    assert os.listdir(tmp_path / "new") == ["out"]  # nothing temporary is left
    config = yaml.safe_load((tmp_path / "new" / "out" / "corruption.yaml").read_text())
    assert config == {"name": "RandomMask", "rate": 0.75, "noise": 0.5, "block": 1, "range": [0.0, 16.0]}
    assert isinstance(observations.y, np.memmap)
    y, mask, x = np.asarray(observations.y), np.asarray(observations.params["mask"]), load("digits").items
    assert (y.shape, y.dtype, mask.shape, mask.dtype) == ((1797, 1, 8, 8), np.float32, (1797, 1, 8, 8), bool)
    n = mask.size
    assert abs(mask.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / n)
    assert np.abs(mask.mean(0) - (1 - rate)).max() < 4.5 * np.sqrt(rate * (1 - rate) / 1797)
    residual = (y - x)[mask]
    assert abs(residual.mean()) < 4 * noise / np.sqrt(residual.size)
    assert abs(residual.var() / noise**2 - 1) < 4 * np.sqrt(2 / residual.size)
    assert not y[~mask].any()
    loaded = Observations.load(tmp_path / "new" / "out")
    assert (loaded.range, loaded.shape, loaded.corruption.config) == (
        (0, 16),
        (1, 8, 8),
        observations.corruption.config,
    )


def test_corrupt_by_blur_without_noise(tmp_path):
    corruption = GaussianBlur(1.0, 0.0)
    observations = corrupt("digits", corruption, tmp_path / "out", limit=6)
    expected = corruption.forward(torch.from_numpy(load("digits", limit=6).items), {})
    np.testing.assert_allclose(observations.y, expected, atol=1e-5)


def test_corrupt_by_projections_in_chunks(tmp_path):
    n = CHUNK + 100
    observations = corrupt("manifold", RandomProjection(2, 0.1), tmp_path / "out", limit=n, seed=2)
    matrix = np.asarray(observations.params["matrix"])
    assert (observations.y.shape, matrix.shape, observations.shape) == ((n, 2), (n, 2, 5), (5,))
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=-1), 1, atol=1e-5)
    residual = observations.y - np.einsum("nrf,nf->nr", matrix, load("manifold", limit=n, seed=2).items)
    assert abs(residual.var() / 0.01 - 1) < 4 * np.sqrt(2 / residual.size)
    assert not np.isclose(matrix[:100], matrix[CHUNK:]).all(axis=(1, 2)).any()  # the chunks draw differently


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        corrupt("digits", RandomMask(0.5, 0.1), tmp_path / name, limit=50, seed=seed, keep_clean=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    a, c = files(tmp_path / "a"), files(tmp_path / "c")
    assert {name for name in a if a[name] != c[name]} == {"y.npy", "mask.npy"}


def test_keep_clean_as_stored(tmp_path):
    images, labels = fashion(tmp_path / "root")
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    corrupt("fashion-mnist", GaussianNoise(20.0), out, root=tmp_path / "root", keep_clean=True)
    clean = np.load(out / "clean.npy")
    assert clean.dtype == np.uint8
    np.testing.assert_array_equal(clean, images)
    np.testing.assert_array_equal(np.load(out / "labels.npy"), labels)
    corrupt("manifold", GaussianNoise(0.1), tmp_path / "other", limit=5, keep_clean=True)
    assert np.load(tmp_path / "other" / "clean.npy").dtype == np.float32
    assert not (tmp_path / "other" / "labels.npy").exists()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_corrupt_by_a_black_box_of_another_shape(tmp_path, dtype):
    def halve(x):
        x += 1  # what it does to its argument must not reach the clean data
        return x[..., ::2, ::2] + torch.rand(())

    items = pixels(9, 3, 4, 6).astype(dtype)
    items[0, 0, 0, :2] = 0, 255
    np.save(tmp_path / "a.npy", items)
    observations = corrupt(str(tmp_path / "a.npy"), BlackBox(halve, "m:halve"), tmp_path / "out", keep_clean=True)
    assert (observations.y.shape, observations.shape, observations.range) == ((9, 3, 2, 3), (3, 4, 6), (0, 255))
    extra = observations.y - items[..., ::2, ::2]
    assert np.ptp(extra) < 1e-4
    assert 1 <= extra.min() < 2
    clean = np.load(tmp_path / "out" / "clean.npy")
    assert clean.dtype == dtype
    np.testing.assert_array_equal(clean, items)
    config = yaml.safe_load((tmp_path / "out" / "corruption.yaml").read_text())
    assert config == {"range": [0.0, 255.0], "shape": [3, 4, 6]}


def test_corrupt_refuses_to_overwrite(tmp_path):
    out = tmp_path / "out"
    corrupt("digits", GaussianNoise(1.0), out, limit=3)
    before = files(out)
    text = f"{out}: already holds observations (y.npy); choose another folder or remove it"
    assert error(corrupt, "digits", GaussianNoise(2.0), out, limit=3) == text
    assert files(out) == before
    (out / "y.npy").unlink()
    text = f"{out}: is in the way; give a folder that does not exist yet or is empty"
    assert error(corrupt, "digits", GaussianNoise(2.0), out, limit=3) == text
    shutil.rmtree(out)
    out.write_text("a file")
    assert error(corrupt, "digits", GaussianNoise(2.0), out, limit=3) == text
    assert error(corrupt, "digits", GaussianNoise(2.0), out / "below", limit=3) == (
        f"{out}/below: cannot be written: Not a directory"
    )


def test_a_failure_leaves_nothing_behind(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((CHUNK + 1, 2)) * [0, 1])

    def later(what):
        return BlackBox(lambda x: x if len(x) == CHUNK else what(x), "m:f")

    def boom(x):
        raise OSError("of the user's function")

    out, source = tmp_path / "out", str(tmp_path / "a.npy")
    assert error(corrupt, source, later(boom), out) == "corruption m:f: raised OSError: of the user's function"
    text = f"corruption: y of item {CHUNK} has shape (1,) where the first items have (2,)"
    assert error(corrupt, source, later(lambda x: x[:, :1]), out) == text
    assert error(corrupt, source, later(lambda x: x / 0), out) == "corruption m:f: gave values that are not finite"
    text = "RandomProjection: items must have shape (features,), got (1, 8, 8)"
    assert error(corrupt, "digits", RandomProjection(2, 0.1), out) == text
    assert os.listdir(tmp_path) == ["a.npy"]


def test_corruption_is_asked_for_each_chunk_once(tmp_path):
    class Counts(Corruption):
        config = {"name": "GaussianNoise", "noise": 0.0}  # noqa: RUF012
        seen_shapes: list = []  # noqa: RUF012

        def draw(self, n, shape, generator):
            self.seen_shapes.append((n, shape))
            return {}

        def apply(self, x, params, generator):
            assert x.dtype == torch.float32
            return x

    observations = corrupt("manifold", Counts(), tmp_path / "out", limit=2 * CHUNK + 5)
    assert Counts.seen_shapes == [(CHUNK, (5,)), (CHUNK, (5,)), (5, (5,))]
    np.testing.assert_array_equal(observations.y, load("manifold", limit=2 * CHUNK + 5).items)
