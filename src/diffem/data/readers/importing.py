"""Writes an observation folder from users' files.

Shapes, dtypes and planes are compared before any value is read. y keeps the dtype of the files. source.json, next to
the arrays, records the files they were made from, so that exporting.py can give results the same names and headers.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffem import files, reading, safe_yaml
from diffem.corruptions import Corruption
from diffem.data.layout import Layout
from diffem.errors import DiffemError

from .source import Block, File, Options, Shape, corners, decoding, plausible, window

SOURCE = "source.json"
SUFFIXES = {
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"),
    "fits": (".fits", ".fit", ".fts", ".fits.gz", ".fits.fz"),
    "nifti": (".nii", ".nii.gz"),
    "arrays": (".npy", ".npz", ".h5", ".hdf5", ".zarr"),
    "tables": (".csv", ".tsv", ".parquet"),
}
FOLDERS = ("images", "fits", "nifti")  # families that are also read from a folder
OPTIONS = {  # the options of each family
    "images": ("patch",),
    "fits": ("patch", "hdu"),
    "nifti": ("patch", "slices"),
    "arrays": ("axes",),
    "tables": ("columns",),
}
ARRAY = re.compile(r"[A-Za-z]\w*\.npy", re.ASCII)
INSIDE = re.compile(r"(.+\.(?:npz|h5|hdf5|zarr)):(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Imported:
    """A summary of an import.

    Attributes:
        count: The number of observations.
        shape, dtype: The shape of an observation, and the dtype of its values.
        missing: The fraction of entries that are missing.
        limits: The smallest and the largest value of y, if it holds whole numbers.
        left_out: Files of the folder in other formats, which were not read.
    """

    count: int
    shape: Shape
    dtype: np.dtype
    missing: float
    limits: tuple[int, int] | None
    left_out: list[str]

    def __str__(self) -> str:
        what = "observation" if self.count == 1 else "observations"
        share = "none missing" if not self.missing else f"{max(100 * self.missing, 0.1):.1f} % missing"
        return f"{self.count:,} {what} of shape {self.shape}, {self.dtype}, {share}"


def import_files(
    source: str,
    out: str | Path,
    options: Options | None = None,
    corruption: Corruption | None = None,
    range: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Imported:
    """Writes the observation folder `out` from files.

    Arguments:
        source: A file; `FILE:PATH`, an array in a .npz, HDF5 or Zarr file; or a folder of images, FITS or NIfTI files,
            which is read with its subfolders in sorted order.
        options: What to read, and how; by default everything.
        corruption: The corruption of the observations; without it corruption.yaml is a template.
        range: The (low, high) of clean values; for uint8, uint16 and bool, by default the range of the type.
        overwrite: Whether an earlier import may be replaced.

    Raises:
        DiffemError: In one line, if something cannot be read or does not fit; then nothing is written.
    """
    out, options = Path(out).expanduser(), options or Options()
    if range is not None and not range[0] < range[1]:
        raise DiffemError(f"--range: must be LOW HIGH with LOW < HIGH, got {range[0]:g} {range[1]:g}")
    _refuse_to_overwrite(out, overwrite)
    family, found, left_out, inside = _find(source)
    for option in fields(options):
        if getattr(options, option.name) is not None and option.name not in OPTIONS[family]:
            raise DiffemError(f"--{option.name}: is not for {family}, which {source} holds")
    if options.patch is not None and options.patch < 1:
        raise DiffemError(f"--patch: must be at least 1, got {options.patch}")
    options = replace(options, inside=inside)
    reader = importlib.import_module(f"{__package__}.{family}")
    work = out.resolve().parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        with warnings.catch_warnings():  # warnings of decoders become errors here, or are useless to the user
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            read = [_read(reader, path, name, options) for path, name in found]
            shape = _shape(read, options.patch)
            work.mkdir(parents=True)
            imported = _write_arrays(work, read, shape, options.patch, left_out)
        if options.axes is not None:
            Layout.of((imported.count, *imported.shape), options.axes)  # refuses axes that do not fit
        arrays = sorted(file.name for file in work.iterdir())
        (work / "corruption.yaml").write_text(_corruption(imported, arrays, corruption, range, options.axes), "utf-8")
        about = {
            "source": str(Path(source).resolve()),
            "family": family,
            "shape": list(shape),
            "dtype": str(imported.dtype),
            "patch": options.patch,
            "arrays": arrays,
            "files": [{"name": file.name, "items": file.items, **file.about} for file in read],
        }
        (work / SOURCE).write_text(json.dumps(about))
        _put(work, out, [*arrays, "corruption.yaml", SOURCE])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return imported


def _read(reader: Any, path: Path, name: str, options: Options) -> File:
    """The contents of a file, according to its header."""
    with decoding(name):
        file: File = reader.read(path, name, options)
    if path.is_file():
        several = len(file.items) > 1
        shape = (sum(n * math.prod(of) for n, of in file.items),) if several else (file.items[0][0], *file.items[0][1])
        plausible(name, shape, file.dtype, path.stat().st_size)
    return file


# --- which files -------------------------------------------------------------------------------------


def _find(source: str) -> tuple[str, list[tuple[Path, str]], list[str], str | None]:
    """The family of formats, its files with their names, files left out, and the PATH of `FILE:PATH`."""
    inside = None if Path(source).exists() else INSIDE.fullmatch(source)
    path = Path(inside[1] if inside else source).expanduser()
    if not path.exists():
        raise DiffemError(f"{path}: no such file or folder")
    if path.is_dir() and _family(path) != "arrays":
        return *_of_folder(path), None
    if (family := _family(path)) is None:
        known = " ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise DiffemError(f"{path}: is of no format that is read ({known})")
    return family, [(path, path.name)], [], inside[2] if inside else None


def _family(path: Path) -> str | None:
    return next((family for family, suffixes in SUFFIXES.items() if path.name.lower().endswith(suffixes)), None)


def _of_folder(root: Path) -> tuple[str, list[tuple[Path, str]], list[str]]:
    found: dict[str | None, list[tuple[Path, str]]] = {}
    for path in _walk(root):
        family = _family(path)
        found.setdefault(family if family in FOLDERS else None, []).append((path, path.relative_to(root).as_posix()))
    left_out = [name for _, name in found.pop(None, [])]
    if not found:
        raise DiffemError(f"{root}: holds no images, FITS or NIfTI files; other files are read one at a time")
    if len(found) > 1:
        one, other = (listed[0][1] for listed in list(found.values())[:2])
        raise DiffemError(f"{root}: holds {one} and {other}; put files of different kinds into different folders")
    (family, listed), *_ = found.items()
    assert family is not None
    return family, listed, left_out


def _walk(root: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, sorted, without hidden ones. Links to folders or out are refused."""
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root.resolve())):
            raise DiffemError(f"{path}: is a link to {os.readlink(path)}; links are not followed: put a copy there")
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


# --- checks ------------------------------------------------------------------------------------------


def _shape(read: list[File], patch: int | None) -> Shape:
    """The shape of an observation.

    Raises:
        DiffemError: If a file does not match the first one, or is smaller than a patch.
    """
    first = read[0]
    for file in read:
        if file.dtype != first.dtype:
            raise DiffemError(
                f"{file.name}: holds {file.dtype} where {first.name} holds {first.dtype}; give values of one type"
            )
        if file.planes.keys() != first.planes.keys():
            one, other = (" and ".join(["y", *sorted(f.planes)]) for f in (file, first))
            raise DiffemError(f"{file.name}: gives {one} where {first.name} gives {other}; they must be alike")
        for _, shape in file.items:
            wanted = first.items[0][1]
            if patch is None and shape != wanted:
                hint = "; --patch SIZE cuts them into pieces of one size" if len(shape) == len(wanted) else ""
                raise DiffemError(
                    f"{file.name}: has an image of {_size(shape)} where {first.name} has {_size(wanted)}{hint}"
                )
            if patch is not None and (len(shape) != len(wanted) or shape[0] != wanted[0]):
                raise DiffemError(f"{file.name}: has an image of {_size(shape)} where {first.name} has {_size(wanted)}")
            if patch is not None and min(shape[1:]) < patch:
                raise DiffemError(f"{file.name}: has an image of {_size(shape)}, too small for --patch {patch}")
    shape = first.items[0][1]
    return shape if patch is None else (shape[0], *(patch for _ in shape[1:]))


def _size(shape: Shape) -> str:
    channels = f", {shape[0]} channels" if shape[0] > 1 else ""
    return "x".join(str(size) for size in shape[1:]) + channels


# --- writing -----------------------------------------------------------------------------------------


def _write_arrays(work: Path, read: list[File], shape: Shape, patch: int | None, left_out: list[str]) -> Imported:
    rows = sum(count * (1 if patch is None else len(corners(of, patch))) for file in read for count, of in file.items)
    if not rows or 0 in shape:
        raise DiffemError(f"{read[0].name}: holds no observations: shape {(rows, *shape)}")
    kinds = {"y": read[0].dtype, **read[0].planes}
    arrays = {name: files.make_array(work / f"{name}.npy", (rows, *shape), kind) for name, kind in kinds.items()}
    at, missing, limits = 0, 0, None
    for file in read:
        for block in _decoded(file.name, file.read()):
            part = block if patch is None else _cut(block, patch)
            y, count = part["y"], len(part["y"])
            if y.shape[1:] != shape or at + count > rows:
                raise DiffemError(f"{file.name}: is not what its header said; replace it or remove it")
            for name, array in arrays.items():
                array[at : at + count] = part[name]
            at += count
            if "mask" in part:
                missing += np.count_nonzero(~part["mask"])
            elif y.dtype.kind in "fc":
                missing += np.count_nonzero(np.isnan(y))
            elif y.dtype.kind in "iu":
                low, high = limits or (y.min(), y.max())
                limits = int(min(low, y.min())), int(max(high, y.max()))
    if at != rows:
        raise DiffemError(f"{read[-1].name}: is not what its header said; replace it or remove it")
    share = float(missing / (rows * math.prod(shape)))
    for name, array in read[0].beside.items():
        made, at, zeros = files.make_array(work / f"{name}.npy", array.shape, array.dtype), 0, 0
        for block in _decoded(read[0].name, array.blocks()):
            made[at : at + len(block)] = block
            at, zeros = at + len(block), zeros + np.count_nonzero(block == 0)
        if name == "mask":
            share = float(zeros / math.prod(array.shape))
    return Imported(rows, shape, read[0].dtype, share, limits, left_out)


def _decoded(name: str, blocks: Iterator[Any]) -> Iterator[Any]:
    with decoding(name):
        yield from blocks


def _cut(block: Block, patch: int) -> Block:
    """The patches of items, item by item."""
    places = [window(corner, patch) for corner in corners(block["y"].shape[1:], patch)]
    return {name: np.stack([item[place] for item in part for place in places]) for name, part in block.items()}


def _corruption(
    imported: Imported,
    arrays: list[str],
    corruption: Corruption | None,
    range: Sequence[float] | None,
    axes: str | None,
) -> str:
    """The text of corruption.yaml; unknown settings are written as comments."""
    lines, known = [], {}
    if corruption is None:
        name = "Mask" if imported.missing else "GaussianNoise"
        lines += ["# How the observations came about: docs/your-data.md says what to write here.", f"# name: {name}"]
        noise = "noise.npy holds the standard deviation of the noise"
        lines.append(
            f"# {noise}"
            if "noise.npy" in arrays
            else "# noise: LEVEL  # its standard deviation, in the units of y; 0 if values are exact; of images `diffem check --estimate` tells it"
        )
    else:
        known = dict(corruption.config)
    if range is None and imported.dtype in (np.uint8, np.uint16, bool):
        range = (0, 1 if imported.dtype == bool else np.iinfo(imported.dtype).max)
    if range is not None:
        known["range"] = list(range)
    elif imported.limits is not None:
        lines.append(f"# range: {list(imported.limits)}  # of clean values; these are the least and the largest of y")
    if axes is not None:
        known["axes"] = axes
    return "".join(f"{line}\n" for line in lines) + (safe_yaml.dump(known).decode() if known else "")


# --- the output folder -------------------------------------------------------------------------------


def _refuse_to_overwrite(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / SOURCE).exists():
        raise DiffemError(f"{out}: is there already, and not from an import; give another folder")
    if not overwrite:
        raise DiffemError(f"{out}: holds an import already; --overwrite replaces it")


def _put(work: Path, out: Path, names: list[str]) -> None:
    """Moves files into the folder, and removes those of an earlier import that were not written again."""
    out.mkdir(exist_ok=True)
    before = described(out).get("arrays") if (out / SOURCE).exists() else []
    for name in names:
        os.replace(work / name, out / name)
    for name in before if isinstance(before, list) else []:
        if name not in names and isinstance(name, str) and ARRAY.fullmatch(name):
            (out / name).unlink(missing_ok=True)


def described(folder: Path) -> dict[str, Any]:
    """The contents of source.json of an imported folder."""
    try:
        content = json.loads(reading.read(folder / SOURCE))
    except FileNotFoundError:
        raise DiffemError(f"{folder}: has no {SOURCE}: it was not written by diffem import") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DiffemError(f"{folder / SOURCE}: is not JSON of a dictionary; import the data again")
    return content
