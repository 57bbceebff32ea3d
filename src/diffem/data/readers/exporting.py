"""Writes results in the format, and with the names and headers, of the files that the observations were read from."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from diffem.errors import DiffemError

from .importing import SOURCE, SUFFIXES, described
from .source import Shape, corners, window

FORMATS = {  # format: the family that writes it, and the suffix
    "tiff": ("images", ".tiff"),
    "png": ("images", ".png"),
    "fits": ("fits", ".fits"),
    "nifti": ("nifti", ".nii.gz"),
    "csv": ("tables", ".csv"),
}


class Export:
    """Writes arrays with one item for each observation of an imported folder.

    Whole numbers are rounded, and clipped to the range. Patches are assembled; where they overlap, the later one wins.

    Arguments:
        folder: The folder, with source.json.
        kind: One of :data:`FORMATS`.
        shape: The shape of an item, in the layout of models.
        range: The (low, high) of clean values, or None.

    Raises:
        DiffemError: If the folder was not imported, or items of this shape cannot be written in this format.
    """

    def __init__(self, folder: str | Path, kind: str, shape: Shape, range: Sequence[float] | None = None) -> None:
        if kind not in FORMATS:
            raise DiffemError(f"--as: must be one of {', '.join(FORMATS)}, got {kind}")
        family, self.suffix = FORMATS[kind]
        self.kind, self.range, self.module = kind, range, importlib.import_module(f"{__package__}.{family}")
        source = described(Path(folder))
        self.source = Path(folder) / SOURCE
        try:
            stored = _checked(source)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise DiffemError(
                f"{self.source}: is not what diffem import wrote ({what}); import the data again"
            ) from None
        self.patch = source["patch"]
        self.dtype = np.dtype(np.uint8) if stored.kind == "b" else stored
        if stored.kind == "c":
            raise DiffemError(f"--as {kind}: complex numbers are in mean.npy only")
        if stored.kind == "f":
            self.dtype = np.result_type(stored, np.float32)
        if self.patch is not None and tuple(source["shape"]) != tuple(shape):
            raise DiffemError(
                f"--as {kind}: items of shape {tuple(shape)} do not fit patches of {tuple(source['shape'])}"
            )
        self.shape, self.files = tuple(shape), source["files"]
        same = source["family"] == family
        self.about = [file if same else {"name": file["name"], "items": file["items"]} for file in self.files]
        self.paths = [_path(file["name"], self.suffix) for file in self.files]
        if len(set(self.paths)) < len(self.paths):
            twice = next(path for path in self.paths if self.paths.count(path) > 1)
            raise DiffemError(
                f"--as {kind}: two files would be written as {twice}; give them different names and import again"
            )
        whole = {tuple(of) for file in self.files for _, of in file["items"]}
        for of in {self.shape} if self.patch is None else whole:
            self.module.refuse(kind, of, self.dtype)

    def write(self, values: np.ndarray, out: Path, whole: bool = True) -> None:
        """Writes files into the folder `out`.

        Arguments:
            values: (N, *shape).
            out: The folder, which is created.
            whole: Whether they are values, with the dtype of y; else standard deviations: float32 if the format allows.
        """
        told = sum(n * self._patches(of) for about in self.about for n, of in about["items"])
        if told != len(values):
            raise DiffemError(
                f"{self.source}: tells of {told} observations instead of {len(values)}; import them again"
            )
        at = 0
        for path, about in zip(self.paths, self.about, strict=True):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            count = sum(n for n, _ in about["items"])
            rows = sum(n * self._patches(of) for n, of in about["items"])
            dtype = self.dtype if whole or self.kind == "png" else np.dtype(np.float32)
            items = (self._cast(item, dtype) for item in self._items(values[at : at + rows], about["items"]))
            try:
                self.module.write(self.kind, out / path, items, {**about, "count": count, "whole": whole})
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                raise DiffemError(f"{self.source}: what it tells of {path} cannot be written ({what})") from None
            at += rows

    def _patches(self, shape: Sequence[int]) -> int:
        return 1 if self.patch is None else len(corners(tuple(shape), self.patch))

    def _items(self, values: np.ndarray, runs: list) -> Iterator[np.ndarray]:
        rows = iter(values)
        for shape in itertools.chain.from_iterable(itertools.repeat(tuple(of), n) for n, of in runs):
            if self.patch is None:
                yield next(rows)
                continue
            item = np.empty(shape, values.dtype)
            for corner in corners(shape, self.patch):
                item[window(corner, self.patch)] = next(rows)
            yield item

    def _cast(self, item: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if dtype.kind not in "iu":
            return item.astype(dtype)
        low, high = self.range or (-math.inf, math.inf)
        info = np.iinfo(dtype)
        return np.clip(np.rint(item), max(low, info.min), min(high, info.max)).astype(dtype)


def _checked(source: dict) -> np.dtype:
    """The dtype that source.json tells; raises a ValueError or the like unless it is as :mod:`.importing` writes it."""
    patch, whole = source["patch"], lambda value: type(value) is int and value > 0
    shapes = [source["shape"]]
    for file in source["files"]:
        if not isinstance(file["name"], str) or not file["name"]:
            raise ValueError(f"the name of a file is {file['name']!r}")
        if not all(whole(n) for n, _ in file["items"]):
            raise ValueError(f"the items of {file['name']} are {file['items']}")
        shapes += [shape for _, shape in file["items"]]
    if not (patch is None or whole(patch)) or not all(map(whole, itertools.chain.from_iterable(shapes))):
        raise ValueError("patch and shapes must be whole numbers")
    if (dtype := np.dtype(source["dtype"])).kind not in "biufc":
        raise ValueError(f"dtype is {dtype}")
    return dtype


def _path(name: str, suffix: str) -> str:
    """The name of a file with another suffix; a name that leads out of the folder is refused."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DiffemError(f"{SOURCE}: names a file {name!r}, outside of the folder; import the data again")
    known = sorted((known for suffixes in SUFFIXES.values() for known in suffixes), key=len, reverse=True)
    return name[: len(name) - len(next((end for end in known if name.lower().endswith(end)), ""))] + suffix
