"""NIfTI: volumes, or their slices along an axis with `--slices`. Written with their original affine and header.

A file with four axes is a series of volumes. Stored values that the header scales become float32.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffem.errors import DiffemError, optional

from .source import Block, File, Options, Shape, numbers, same


def read(path: Path, name: str, options: Options) -> File:
    """The volumes of a NIfTI file, or their slices; each volume is (1, *axes as stored)."""
    nibabel, axis = optional("nibabel", "mri"), options.slices
    if axis not in (None, 0, 1, 2):
        raise DiffemError(f"--slices: must be 0, 1 or 2, an axis of the volumes, got {axis}")
    image = nibabel.load(path)
    shape, header = tuple(image.shape), image.header
    if len(shape) not in (3, 4) or 0 in shape:
        raise DiffemError(f"{name}: has shape {shape}; give volumes of three axes, or series of them")
    stored = numbers(name, header.get_data_dtype())
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    volumes = shape[3] if len(shape) == 4 else 1
    about = {"header": base64.b64encode(header.binaryblock).decode(), "slices": axis, "volumes": volumes}
    dtype = np.dtype(np.float32) if scaled else stored

    def blocks() -> Iterator[Block]:
        data = nibabel.load(path).dataobj
        values = data.get_unscaled().reshape(*shape[:3], volumes)
        for k in range(volumes):
            volume = values[..., k]
            if scaled:
                volume = (volume * data.slope + data.inter).astype(np.float32)
            parts = [volume] if axis is None else np.moveaxis(volume, axis, 0)
            yield from ({"y": part[None, None]} for part in parts)

    of_item = shape[:3] if axis is None else shape[:axis] + shape[axis + 1 : 3]
    count = volumes * (1 if axis is None else shape[axis])
    return File(name, *same(name, [((1, *of_item), dtype)] * count), blocks, about=about)


def refuse(kind: str, shape: Shape, dtype: np.dtype) -> None:
    """Raises a DiffemError if items of `shape` cannot be written."""
    if len(shape) not in (3, 4) or shape[0] != 1:
        raise DiffemError(f"--as {kind}: is for volumes and slices of one channel; the items have shape {shape}")
    optional("nibabel", "mri")


def write(kind: str, path: Path, items: Iterable[np.ndarray], about: dict[str, Any]) -> None:
    """Writes volumes, or volumes assembled from slices, as one file."""
    nibabel = optional("nibabel", "mri")
    values = np.stack([item[0] for item in items])
    if values.ndim == 3:  # slices
        axis = about.get("slices", 2)
        values = np.moveaxis(values.reshape(about.get("volumes", 1), -1, *values.shape[1:]), 1, axis + 1)
    values = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
    header = None
    if "header" in about:
        block = base64.b64decode(about["header"])
        header = (nibabel.Nifti2Header if len(block) == 540 else nibabel.Nifti1Header)(block)
        header.set_slope_inter(1, 0)
    kind_of = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    affine = np.eye(4) if header is None else None
    nibabel.save(kind_of(values, affine, header, dtype=values.dtype), path)
