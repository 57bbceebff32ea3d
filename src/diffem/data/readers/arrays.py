"""Arrays: .npy, .npz, HDF5 and Zarr.

`FILE:PATH` names one array of a file. Without PATH, the file must hold a single array, or one called y: then the arrays
next to y are its parameters (mask, noise, matrix, ...). The first axis of an array is that of the observations.
"""

from __future__ import annotations

import contextlib
import math
import os
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffem.data.observations import open_array
from diffem.errors import DiffemError, optional

from .source import Array, File, Options, numbers, plausible, steps

NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)  # names of parameters: each becomes NAME.npy
LINKS = 16  # the longest chain of soft links in an HDF5 file that is followed
CODECS = (  # allowed codecs of Zarr, for numbers; others can run code
    *("blosc", "bz2", "crc32", "crc32c", "delta", "fletcher32", "gzip", "lz4", "lzma", "shuffle", "zlib", "zstd"),
    *("bytes", "sharding_indexed", "transpose"),
)


def read(path: Path, name: str, options: Options) -> File:
    """The arrays of a file."""
    kinds: dict[str, Callable] = {".npy": _npy, ".npz": _npz, ".zarr": _zarr}
    arrays = kinds.get(path.suffix.lower(), _hdf5)(path, name, options.inside)
    y = arrays.pop("y")
    if len(y.shape) < 2:
        raise DiffemError(f"{name}: has shape {y.shape}; y needs (N, features) or (N, channels, *spatial)")
    items = [(y.shape[0], y.shape[1:])]
    return File(name, items, y.dtype, lambda: ({"y": block} for block in y.blocks()), beside=arrays)


def _chosen(name: str, found: list[str], inside: str | None) -> dict[str, str]:
    """The arrays to read: {new name: path in the file}."""
    if inside is not None:
        inside = inside.strip("/")
        if inside not in found:
            raise DiffemError(f"{name}: has no array {inside}; it has {_some(found)}")
        return {"y": inside}
    if len(found) == 1:
        return {"y": found[0]}
    if ys := [path for path in found if posixpath.basename(path) == "y"]:
        folder = posixpath.dirname(ys[0])
        chosen = {posixpath.basename(path): path for path in found if posixpath.dirname(path) == folder}
        if wrong := [key for key in chosen if not NAME.fullmatch(key)]:
            raise DiffemError(f"{name}: holds an array {wrong[0]!r}; a parameter needs a plain name such as mask")
        if len(ys) == 1:
            return chosen
    raise DiffemError(f"{name}: which array? it has {_some(found)}; write FILE:PATH, or call one y")


def _some(found: list[str]) -> str:
    return ", ".join(sorted(found)[:8]) + (", ..." if len(found) > 8 else "") or "none"


def _array(name: str, opened: Callable[[], Any]) -> Array:
    """An array that is read by slices; `opened()` opens it."""
    with opened() as array:
        shape, dtype = tuple(array.shape), numbers(name, np.dtype(array.dtype))

    def blocks() -> Iterator[np.ndarray]:
        with opened() as array:
            for rows in steps(shape[0], math.prod(shape[1:]) * dtype.itemsize):
                yield array[rows]

    return Array(shape, dtype, blocks)


# --- numpy -------------------------------------------------------------------------------------------


def _npy(path: Path, name: str, inside: str | None) -> dict[str, Array]:
    return {"y": _array(name, lambda: contextlib.nullcontext(open_array(path)))}


def _npz(path: Path, name: str, inside: str | None) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    chosen = _chosen(name, list(members), inside)
    return {key: _member(path, f"{name}: {of}", members[of]) for key, of in chosen.items()}


def _member(path: Path, name: str, info: zipfile.ZipInfo) -> Array:
    """An array of a .npz file, which can only be read sequentially."""

    def header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return readers[np.lib.format.read_magic(stream)](stream)

    with zipfile.ZipFile(path) as archive, archive.open(info) as stream:
        shape, fortran, stored = header(stream)
        start = stream.tell()
    dtype = numbers(name, stored)
    plausible(name, shape, stored, info.compress_size)
    if info.file_size != start + math.prod(shape) * stored.itemsize:
        raise DiffemError(
            f"{name}: declares {shape} of {stored}, but holds {info.file_size - start:,} bytes; save it again"
        )
    if fortran and len(shape) > 1:
        raise DiffemError(f"{name}: is in Fortran order; save np.ascontiguousarray of it")

    def blocks() -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive, archive.open(info) as stream:
            header(stream)
            for rows in steps(shape[0], math.prod(shape[1:]) * stored.itemsize):
                part = (rows.stop - rows.start, *shape[1:])
                yield np.frombuffer(stream.read(math.prod(part) * stored.itemsize), stored).reshape(part)

    return Array(shape, dtype, blocks)


# --- HDF5 --------------------------------------------------------------------------------------------


def _hdf5(path: Path, name: str, inside: str | None) -> dict[str, Array]:
    h5py = optional("h5py", "mri")
    found: list[str] = []
    with h5py.File(path, "r") as file:
        file.visititems(lambda at, thing: found.append(at) if isinstance(thing, h5py.Dataset) else None)  # no links
        if inside is not None:
            inside = _followed(file, name, inside.strip("/"))
        chosen = _chosen(name, found, inside)
        for at in chosen.values():
            dataset, called = file[at], f"{name}: {at}"
            if dataset.is_virtual or dataset.external:
                raise DiffemError(f"{called}: lies in other files; save it as one dataset of its own")
            numbers(called, dataset.dtype)
            plausible(called, dataset.shape or (), dataset.dtype, dataset.id.get_storage_size())

    def opened(at: str) -> Callable[[], Any]:
        @contextlib.contextmanager
        def open_it() -> Iterator[Any]:
            with h5py.File(path, "r") as file:
                yield file[at]

        return open_it

    return {key: _array(f"{name}: {at}", opened(at)) for key, at in chosen.items()}


def _followed(file: Any, name: str, inside: str) -> str:
    """The path with soft links resolved; links to other files are refused before anything is opened."""
    links = optional("h5py", "mri").h5l
    for _ in range(LINKS):
        at = ""
        for part in inside.split("/"):
            group = (file[at] if at else file).id
            at = posixpath.join(at, part)
            try:
                kind = group.links.get_info(part.encode()).type
            except (KeyError, RuntimeError, AttributeError):  # no such name, or the parent is not a group
                return inside
            if kind == links.TYPE_EXTERNAL:
                other = group.links.get_val(part.encode())[0].decode()
                raise DiffemError(f"{name}: {at}: is a link to another file, {other}; copy the dataset into this one")
            if kind == links.TYPE_SOFT:
                target, rest = group.links.get_val(part.encode()).decode(), inside[len(at) :]
                inside = posixpath.normpath(posixpath.join("/", posixpath.dirname(at), target) + rest).strip("/")
                break
        else:
            return inside
    raise DiffemError(f"{name}: {inside}: is a circle of links")


# --- Zarr --------------------------------------------------------------------------------------------


def _zarr(path: Path, name: str, inside: str | None) -> dict[str, Array]:
    zarr = optional("zarr", "zarr")
    sizes: dict[str, int] = {}
    for folder, folders, names in os.walk(path):
        for entry in (Path(folder) / entry for entry in (*folders, *names)):
            if entry.is_symlink():
                raise DiffemError(f"{name}: {entry.relative_to(path).as_posix()}: is a link; put the file itself there")
        sizes[Path(folder).relative_to(path).as_posix()] = sum((Path(folder) / entry).stat().st_size for entry in names)

    def opened(at: str) -> Any:
        return zarr.open_array(store=str(path / at), mode="r")

    root, chosen = zarr.open(store=str(path), mode="r"), {"y": ""}
    if isinstance(root, zarr.Group):
        chosen = _chosen(name, [at for at, thing in root.members(None) if isinstance(thing, zarr.Array)], inside)
    elif inside is not None:
        raise DiffemError(f"{name}: is an array, and has none called {inside}")
    for at in chosen.values():
        array, called = opened(at), f"{name}: {at}" if at else name
        numbers(called, np.dtype(array.dtype))
        used = list(_codecs([array.metadata.to_dict().get(key) for key in ("codecs", "filters", "compressor")]))
        if wrong := [codec for codec in used if codec not in CODECS]:
            raise DiffemError(f"{called}: is packed by {wrong[0]}; those that are read: {', '.join(sorted(CODECS))}")
        stored = sum(size for folder, size in sizes.items() if not at or f"{folder}/".startswith(f"{at}/"))
        plausible(called, array.shape, np.dtype(array.dtype), stored)
    return {
        key: _array(f"{name}: {at}" if at else name, lambda at=at: contextlib.nullcontext(opened(at)))
        for key, at in chosen.items()
    }


def _codecs(described: Any) -> Iterator[str]:
    """The names of all codecs in the metadata of Zarr, of either version."""
    if isinstance(described, dict):
        yield from (described[key] for key in ("id", "name") if isinstance(described.get(key), str))
    if isinstance(described, dict | list | tuple):
        for value in described.values() if isinstance(described, dict) else described:
            yield from _codecs(value)
