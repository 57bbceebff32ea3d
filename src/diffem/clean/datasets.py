"""Clean data sets, for benchmarks and for simulating observations of one's own clean data.

A data set is an array (N, *shape) with shape = (features,) or (channels, *spatial), in the units in which it is
stored, with the (low, high) range of its values. Nothing is normalised here: uint8 images have range (0, 255), and
models take their scaling from the range.

Registered names, and the files they need under `root` (nothing is ever downloaded):

    manifold        a random smooth curve in five dimensions, from the seed; float32 (65536, 5), range (-2, 2)
    digits          scikit-learn's digits; float32 (1797, 1, 8, 8), range (0, 16)
    fashion-mnist   ROOT/FashionMNIST/raw/train-images-idx3-ubyte (or .gz; or in ROOT itself); uint8 (60000, 1, 28, 28)
    cifar10         ROOT/cifar-10-batches-py/data_batch_1 to 5, or ROOT/*.parquet; uint8 (50000, 3, 32, 32)
    celeba          ROOT/celeba/img_align_celeba/*.jpg or ROOT/img_align_celeba/*.jpg; uint8 (202599, 3, 64, 64)

Anything else is the path of a .npy array or of a folder of images.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import pickle
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from diffem import files, memory, seeding
from diffem.config import Config
from diffem.corruptions import Corruption, from_config
from diffem.data import Observations
from diffem.data.observations import CHUNK
from diffem.data.readers.importing import SUFFIXES
from diffem.errors import DiffemError, optional, suggest

IMAGES = SUFFIXES["images"]
MANIFOLD_POINTS = 65_536
BYTE_RANGE = (0.0, 255.0)


@dataclass(frozen=True)
class CleanData:
    """Clean items (N, *shape) in stored units, the (low, high) range of their values, and labels (N,) or None."""

    items: np.ndarray
    range: tuple[float, float]
    labels: np.ndarray | None


def load(source: str, root: str | Path | None = None, limit: int | None = None, seed: int = 0) -> CleanData:
    """Loads a data set by its registered name or its path.

    Arguments:
        source: A registered name (see the module docstring); or a .npy array (N, *shape), which is memory-mapped (its
            range is 0 to 255 for uint8, else the minimum and maximum of the loaded items); or a folder of 8-bit RGB or
            greyscale images of one size, sorted by name. Registered names take precedence: write ./digits for a folder.
        root: The folder that holds a registered data set.
        limit: Load only the first `limit` items.
        seed: Selects the curve of `manifold`; no effect on the others.

    Raises:
        DiffemError: If the source is unknown, or a file is missing or invalid.
    """
    if limit is not None and limit < 1:
        raise DiffemError(f"limit: must be at least 1, got {limit}")
    if source in REGISTRY:
        return REGISTRY[source](None if root is None else Path(root).expanduser(), limit, seed)
    path = Path(source).expanduser()
    if path.is_dir():
        return CleanData(_folder(path, limit), BYTE_RANGE, None)
    if path.suffix == ".npy":
        return _npy(path, limit)
    if path.exists():
        raise DiffemError(f"{source}: is neither a .npy array nor a folder of images")
    raise DiffemError(f"{source}: no such data set, .npy file or folder of images;{suggest(source, REGISTRY)}")


def corrupt(
    source: str,
    corruption: Corruption,
    out: str | Path,
    root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    keep_clean: bool = False,
) -> Observations:
    """Simulates observations of a clean data set and writes them as an observation folder.

    Arguments:
        source: As in :func:`load`, and so are `root` and `limit`.
        corruption: Draws the parameters and the observations, in chunks with one generator each.
        out: The folder to write. It must be empty or not exist; it appears only when it is complete.
        seed: The same seed gives the same bytes.
        keep_clean: Also writes clean.npy (as stored) and labels.npy, for evaluation.

    Returns:
        The observations, memory-mapped.
    """
    out = Path(out).expanduser()
    if (out / "y.npy").exists():
        raise DiffemError(f"{out}: already holds observations (y.npy); choose another folder or remove it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiffemError(f"{out}: is in the way; give a folder that does not exist yet or is empty")
    data = load(source, root, limit, seed)
    work = out.parent / f".{out.name}.{secrets.token_hex(4)}"  # next to it, so that renaming does not copy
    try:
        with _writing(out):
            (work / "parts").mkdir(parents=True)
        arrays = _simulate(data, corruption, seed, work / "parts")
        y = arrays.pop("y")
        observations = Observations(y, corruption, arrays, data.range, data.items.shape[1:], source=str(out))
        with _writing(out):
            observations.save(work / "data")
            if keep_clean:
                np.save(work / "data" / "clean.npy", data.items)
                if data.labels is not None:
                    np.save(work / "data" / "labels.npy", data.labels)
            (work / "data").rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Observations.load(out, corruption)


def make_observations(
    config: Config,
    preset: str,
    folder: Path,
    root: str | None = None,
    own: Corruption | type[Corruption] | None = None,
) -> None:
    """Writes the observations that a preset makes from clean data, together with the clean items."""
    data = config.data
    folder.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(own, type):
        raise DiffemError(f"--corruption {own.__name__}: give a function, or the class a folder of observations")
    corruption = own or from_config(data.corruption, f"{preset}: data.corruption")
    corrupt(data.source, corruption, folder, root, data.limit or None, config.em.seed, keep_clean=True)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiffemError(f"{out}: cannot be written: {error.strerror or _line(error)}") from None


def _simulate(data: CleanData, corruption: Corruption, seed: int, folder: Path) -> dict[str, np.ndarray]:
    """Simulates the observations 'y' and the parameters of all items, memory-mapped in `folder`."""
    arrays: dict[str, np.ndarray] = {}
    n = len(data.items)
    size = memory.at_once(math.prod(data.items.shape[1:]), CHUNK, 2 * memory.NUMBERS)
    for number, start in enumerate(range(0, n, size)):
        x = torch.from_numpy(np.array(data.items[start : start + size], dtype=np.float32))
        generator = seeding.generator(seed, 0, "data", number)
        with torch.no_grad():
            y, params = corruption.observe(x, generator)
        for name, tensor in {"y": y, **params}.items():
            part = tensor.detach().cpu().numpy()
            if name not in arrays:
                arrays[name] = files.make_array(folder / f"{name}.npy", (n, *part.shape[1:]), part.dtype)
            if part.shape[1:] != arrays[name].shape[1:]:
                raise DiffemError(
                    f"corruption: {name} of item {start} has shape {part.shape[1:]} where the first items have {arrays[name].shape[1:]}"
                )
            arrays[name][start : start + len(part)] = part
    return arrays


# The curve


def manifold_curve(seed: int, points: int = MANIFOLD_POINTS) -> np.ndarray:
    """Points along the curve of `manifold`, in the same units: float32 (points, 5), for t on a grid over [0, 1]."""
    return _manifold_points(seed, points)[1]


def _manifold_points(seed: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    r"""The random points of the data set, and points evenly spaced in t.

    .. math:: x_i(t) = \sum_{k=1}^{10} \frac{a_{ik}}{k^3} \sin(2 \pi (k b_{ik} t + c_{ik})) \, ,
        \qquad a, b, c, t \sim \mathcal{U}(0, 1) \, ,

    each coordinate then rescaled so that the random points span [-2, 2].
    """
    if seed < 0:
        raise DiffemError(f"seed: must be at least 0, got {seed}")
    rng = np.random.default_rng(seed)
    a, b, c = rng.random((3, 5, 10))
    k = np.arange(1, 11)
    curve = lambda t: (a / k**3 * np.sin(2 * np.pi * (k * b * t + c))).sum(-1)  # noqa: E731
    x = curve(rng.random((MANIFOLD_POINTS, 1, 1)))
    low, high = x.min(0), x.max(0)
    rescaled = lambda v: (4 * (v - low) / (high - low) - 2).astype(np.float32)  # noqa: E731
    return rescaled(x), rescaled(curve(np.linspace(0, 1, points)[:, None, None]))


def _manifold(root: Path | None, limit: int | None, seed: int) -> CleanData:
    return CleanData(_manifold_points(seed, 1)[0][:limit], (-2.0, 2.0), None)


# Files of one's own


def _npy(file: Path, limit: int | None) -> CleanData:
    if not file.exists():
        raise DiffemError(f"{file}: no such file")
    try:
        items = np.lib.format.open_memmap(file, mode="r")  # never unpickles
    except (ValueError, OSError, EOFError) as error:
        raise DiffemError(f"{file}: is not a complete .npy array of numbers: {_line(error)}") from None
    if items.dtype.kind not in "fiub":
        raise DiffemError(f"{file}: holds {items.dtype}; it must hold real numbers")
    if items.ndim < 2 or 0 in items.shape:
        raise DiffemError(f"{file}: must have shape (N, features) or (N, channels, *spatial), got {items.shape}")
    items = items[:limit]
    if items.dtype == np.uint8:
        return CleanData(items, BYTE_RANGE, None)
    low, high = float(items.min()), float(items.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DiffemError(f"{file}: holds values that are not finite; clean data must be complete")
    if low == high:
        raise DiffemError(f"{file}: all values are {low:g}, so there is no range to work in")
    return CleanData(items, (low, high), None)


def _image(file: str | Path | BinaryIO, name: str | Path) -> Image.Image:
    """Decodes an image as L or RGB; `name` is for error messages."""
    try:
        with Image.open(file) as image:
            mode = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}.get(image.mode)
            if mode is None or (image.mode == "P" and "transparency" in image.info):
                raise DiffemError(f"{name}: is an image of mode {image.mode}; convert it to 8-bit RGB or greyscale")
            return image.convert(mode)
    except DiffemError:
        raise
    except Exception as error:  # decoders raise all kinds of exceptions on broken files
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a complete image"
        raise DiffemError(f"{name}: cannot be read as an image ({reason}); replace it or remove it") from None


def _channels_first(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _list(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    files = sorted(
        f for f in folder.iterdir() if f.suffix.lower() in suffixes and not f.name.startswith(".") and f.is_file()
    )
    if not files:
        raise DiffemError(f"{folder}: holds no images ({', '.join(suffixes)})")
    return files


def _folder(folder: Path, limit: int | None) -> np.ndarray:
    files = _list(folder, IMAGES)[:limit]
    items = np.empty(0, dtype=np.uint8)
    for i, file in enumerate(files):
        pixels = _channels_first(_image(file, file))
        if i == 0:
            items = np.empty((len(files), *pixels.shape), dtype=np.uint8)
        if pixels.shape != items.shape[1:]:
            raise DiffemError(
                f"{file}: is {_size(pixels.shape)} where {files[0].name} is {_size(items.shape[1:])}; all images must be alike"
            )
        items[i] = pixels
    return items


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} {'RGB' if shape[0] == 3 else 'greyscale'}"


# Registered data sets


def _digits(root: Path | None, limit: int | None, seed: int) -> CleanData:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return CleanData(data.images[:limit, None].astype(np.float32), (0.0, 16.0), data.target[:limit].astype(np.int64))


def _root(root: Path | None, name: str, layout: str) -> Path:
    if root is None:
        raise DiffemError(f"{name}: is read from your disk; say with --root which folder holds {layout}")
    if not root.is_dir():
        raise DiffemError(f"{root}: no such folder; --root of {name} must hold {layout}")
    return root


def _fashion_mnist(root: Path | None, limit: int | None, seed: int) -> CleanData:
    layout = "FashionMNIST/raw/train-images-idx3-ubyte"
    root = _root(root, "fashion-mnist", layout)
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    for folder in (root / "FashionMNIST" / "raw", root):
        files = [next((f for f in (folder / n, folder / f"{n}.gz") if f.exists()), folder / n) for n in names]
        if files[0].exists():
            break
    else:
        raise DiffemError(f"{root}: --root of fashion-mnist must hold {layout} (.gz will do)")
    images, labels = (_idx(file) for file in files)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DiffemError(f"{files[0]}: has shape {images.shape} where Fashion-MNIST has (N, 28, 28)")
    if labels.shape != images.shape[:1]:
        raise DiffemError(f"{files[1]}: has shape {labels.shape} where there are {len(images)} images")
    return CleanData(images[:limit, None], BYTE_RANGE, labels[:limit].astype(np.int64))


def _idx(file: Path) -> np.ndarray:
    """An array of bytes in the idx format: 0, 0, 8 (unsigned bytes), the number of axes, their sizes, the data."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except FileNotFoundError:
        raise DiffemError(f"{file}: missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DiffemError(f"{file}: cannot be read ({_line(error)}); fetch it again") from None
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise DiffemError(f"{file}: is not an idx file of unsigned bytes; fetch it again")
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) != start + math.prod(shape):
        raise DiffemError(
            f"{file}: has {len(content)} bytes where its header promises {start + math.prod(shape)}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar10(root: Path | None, limit: int | None, seed: int) -> CleanData:
    layout = "cifar-10-batches-py/data_batch_1 or parquet files"
    root = _root(root, "cifar10", layout)
    folder = next((f for f in (root / "cifar-10-batches-py", root) if (f / "data_batch_1").exists()), None)
    files = sorted(root.glob("*.parquet"))
    files = [f for f in files if "train" in f.name] or files
    if folder is not None:
        batches = (_cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6))
    elif files:
        batches = (batch for file in files for batch in _parquet_batches(file))
    else:
        raise DiffemError(f"{root}: --root of cifar10 must hold {layout}")
    images, labels, count = [], [], 0
    for batch_images, batch_labels in batches:
        images.append(batch_images)
        labels.append(batch_labels)
        count += len(batch_images)
        if limit is not None and count >= limit:
            break
    if not count:
        raise DiffemError(f"{root}: the files of cifar10 hold no images")
    items = np.concatenate(images)[:limit]
    known = [part for part in labels if part is not None]
    return CleanData(items, BYTE_RANGE, np.concatenate(known)[:limit] if len(known) == len(labels) else None)


def _cifar_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream, file).load()
    except FileNotFoundError:
        raise DiffemError(f"{file}: missing") from None
    except DiffemError:
        raise
    except Exception as error:  # a broken pickle can raise any exception
        raise DiffemError(f"{file}: is not a complete batch of CIFAR-10 ({_line(error)}); fetch it again") from None
    content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in _mapping(content).items()}
    data, labels = content.get("data"), content.get("labels")
    pixels = data.value if isinstance(data, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise DiffemError(f"{file}: data: must be an array of bytes (N, 3072)")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(v) is int for v in labels):
        raise DiffemError(f"{file}: labels: must be a list of {len(pixels)} integers")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


class _StandIn:
    # A pickle can call the objects that it names, and set their state: so it gets these stand-ins, never numpy's own.
    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype(_StandIn):
    """Stands in for numpy.dtype: bytes are the only numbers in an array of CIFAR-10."""

    def __init__(self, name: str | bytes, *_flags: object) -> None:
        if name not in ("u1", b"u1"):
            raise ValueError(f"array of {name!r} where bytes are expected")


class _Array(_StandIn):
    """Stands in for numpy.ndarray, and for the function that creates an empty array, later filled by its state."""

    value: np.ndarray | None = None

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _version, shape, _dtype, fortran, data = state
        if isinstance(data, str):
            data = data.encode("latin1")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Buffer(_Array):
    """Stands in for numpy's _frombuffer, which pickles of protocol 5 use."""

    def __init__(self, data: Any, _dtype: object, shape: Any, order: str, *_axes: object) -> None:
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if order == "F" else "C")


class _Latin1(_StandIn):
    """Stands in for _codecs.encode, which old pickle protocols use for bytes."""

    def __new__(cls, text: str, encoding: object = "latin1") -> Any:
        return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads pickles of dictionaries, lists, numbers, strings and arrays of bytes; refuses any other object."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        super().__init__(stream, encoding="bytes")
        self.file = file

    def find_class(self, module: str, name: str) -> type:
        where = module.replace("numpy._core.", "numpy.core.")
        allowed = {
            ("numpy", "dtype"): _Dtype,
            ("numpy", "ndarray"): _Array,
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy.core.numeric", "_frombuffer"): _Buffer,
            ("_codecs", "encode"): _Latin1,
        }
        if (where, name) not in allowed:
            raise DiffemError(
                f"{self.file}: refused: this pickle asks for {module}.{name}, and CIFAR-10 is made of arrays, lists and names only"
            )
        return allowed[where, name]


def _parquet_batches(file: Path) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    pyarrow, parquet = optional("pyarrow", "tables"), optional("pyarrow.parquet", "tables")
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            column = next((c for c in ("img", "image") if c in names), None)
            if column is None:
                raise DiffemError(f"{file}: has no column img or image; it has {', '.join(names)}")
            columns = [column, "label"] if "label" in names else [column]
            row = 0
            for batch in table.iter_batches(1000, columns=columns):
                images = np.empty((len(batch), 3, 32, 32), dtype=np.uint8)
                for i, value in enumerate(batch.column(column)):
                    content = value.as_py()
                    content = content.get("bytes") if isinstance(content, dict) else content
                    name = f"{file}: {column} of row {row + i}"
                    if not isinstance(content, bytes):
                        raise DiffemError(f"{name}: must be the bytes of an image file")
                    pixels = _channels_first(_image(io.BytesIO(content), name))
                    if pixels.shape != (3, 32, 32):
                        raise DiffemError(f"{name}: is {_size(pixels.shape)} where CIFAR-10 is 32x32 RGB")
                    images[i] = pixels
                row += len(batch)
                labels = batch.column("label").to_numpy(zero_copy_only=False) if "label" in names else None
                if labels is not None and labels.dtype.kind not in "iu":
                    raise DiffemError(f"{file}: label: must be an integer in every row")
                yield images, None if labels is None else labels.astype(np.int64)
    except (pyarrow.ArrowException, OSError) as error:
        raise DiffemError(f"{file}: is not a complete parquet file ({_line(error)})") from None


def _celeba(root: Path | None, limit: int | None, seed: int) -> CleanData:
    """The aligned images: the central 140x140 of 178x218, reduced to 64x64 (Pillow's bicubic, which is antialiased)."""
    layout = "celeba/img_align_celeba"
    root = _root(root, "celeba", layout)
    folders = [root / "celeba" / "img_align_celeba", root / "img_align_celeba"]
    folders += [root] if root.resolve().name == "img_align_celeba" else []
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise DiffemError(f"{root}: --root of celeba must hold {layout}")
    files = _list(folder, (".jpg",))[:limit]
    items = np.empty((len(files), 3, 64, 64), dtype=np.uint8)
    for i, file in enumerate(files):
        image = _image(file, file)
        if image.size != (178, 218) or image.mode != "RGB":
            size = _size((len(image.getbands()), image.height, image.width))
            raise DiffemError(f"{file}: is {size} where CelebA's aligned images are 178x218 RGB")
        image = image.crop((19, 39, 159, 179)).resize((64, 64), Image.Resampling.BICUBIC)
        items[i] = _channels_first(image)
    return CleanData(items, BYTE_RANGE, None)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


REGISTRY: dict[str, Callable[[Path | None, int | None, int], CleanData]] = {
    "manifold": _manifold,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "celeba": _celeba,
}
