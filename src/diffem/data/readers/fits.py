"""FITS: science, error and data-quality planes become y, noise and mask. Written with their header cards.

`--hdu SCIENCE[,ERROR[,QUALITY]]` names the extensions; `SCI,,DQ` has no error plane. By default they are SCI with ERR
and DQ, and each version (EXTVER) is an observation; without SCI, the only image of the file is used. A pixel is missing
where the quality is not 0, the value is not a number, or the error is not a positive number. A cube is a stack of
images: each plane is an observation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffem.errors import DiffemError, optional

from .source import Block, File, Options, Shape, numbers, plausible, same

USUAL = "SCI,ERR,DQ"
STALE = ("BSCALE", "BZERO", "BLANK", "CHECKSUM", "DATASUM")  # describe the values as originally stored


def read(path: Path, name: str, options: Options) -> File:
    """The images of a FITS file."""
    fits = optional("astropy.io.fits", "astronomy")
    with fits.open(path) as file:
        groups = _groups(file, name, options.hdu)
        for index in (i for group in groups for i in group if i is not None):
            values = np.dtype(f"V{abs(file[index].header['BITPIX']) // 8}")
            plausible(f"{name}: HDU {index}", file[index].shape, values, path.stat().st_size)
        found, headers = [], []
        for science, *others in groups:
            shape = file[science].shape
            if len(shape) not in (2, 3):
                raise DiffemError(f"{name}: HDU {science} has shape {shape}; give images, or stacks of them")
            for index in (i for i in others if i is not None and file[i].shape != shape):
                raise DiffemError(
                    f"{name}: HDU {index} has shape {file[index].shape} where HDU {science} has {shape}; they must be alike"
                )
            stack = shape if len(shape) == 3 else (1, *shape)
            found += [((1, *stack[1:]), numbers(name, file[science].data.dtype))] * stack[0]
            headers.append({"hdu": science, "count": stack[0], "cards": file[science].header.tostring(sep="\n")})
        primary = file[0].header.tostring(sep="\n")
        _, error, quality = groups[0]
        planes = {} if error is None else {"noise": numbers(name, file[error].data.dtype)}
        if error is not None or quality is not None:
            planes["mask"] = np.dtype(bool)
    items, dtype = same(name, found)
    return File(
        name, items, dtype, lambda: _blocks(path, groups), planes, about={"primary": primary, "headers": headers}
    )


def _groups(file: Any, name: str, hdu: str | None) -> list[tuple[int, int | None, int | None]]:
    """The HDU indices of science, error and quality, for each observation or stack."""
    images = [i for i, unit in enumerate(file) if unit.is_image and unit.shape]
    named = [[i for i in images if word and word.strip().upper() in (file[i].name, str(i))] for word in _words(hdu)]
    if not images:
        raise DiffemError(f"{name}: holds no image, only tables; export their columns, e.g. to .npy")
    has = ", ".join(file[i].name or str(i) for i in images) or "none"
    if hdu is None and not named[0]:
        if len(images) != 1:
            raise DiffemError(f"{name}: which images? it has {has}; --hdu SCIENCE[,ERROR[,QUALITY]] says which")
        return [(images[0], None, None)]
    for word, found in zip(_words(hdu), named, strict=True):
        if hdu is not None and word and not found:
            raise DiffemError(f"{name}: --hdu: has no image {word}; it has {has}")
        if found and len(found) != len(named[0]):
            raise DiffemError(f"{name}: has {len(found)} of {word} where it has {len(named[0])} of {_words(hdu)[0]}")
    science, error, quality = (found or [None] * len(named[0]) for found in named)
    return [*zip(science, error, quality, strict=True)]  # pyrefly: ignore - there is science


def _words(hdu: str | None) -> list[str]:
    words = (hdu or USUAL).split(",")
    if len(words) > 3 or not words[0]:
        raise DiffemError(f"--hdu: is SCIENCE[,ERROR[,QUALITY]], names or numbers of extensions, got {hdu!r}")
    return [*words, *[""] * (3 - len(words))]


def _blocks(path: Path, groups: list[tuple[int, int | None, int | None]]) -> Iterator[Block]:
    fits = optional("astropy.io.fits", "astronomy")
    with fits.open(path) as file:
        for science, *others in groups:
            y = _stack(file[science])
            planes = [None if i is None else _stack(file[i]) for i in others]
            for k in range(len(y)):
                yield _observation(y[k : k + 1], *(None if plane is None else plane[k : k + 1] for plane in planes))


def _stack(unit: Any) -> np.ndarray:
    """The image or stack of images of an HDU, as (n, 1, rows, columns)."""
    return unit.data.reshape(-1, 1, *unit.shape[-2:])


def _observation(y: np.ndarray, error: np.ndarray | None, quality: np.ndarray | None) -> Block:
    """One image; where the error is unknown, noise is the median error, since noise.npy must hold numbers."""
    block = {"y": y, "mask": ~np.isnan(y)}
    if quality is not None:
        block["mask"] &= quality == 0
    if error is not None:
        known = np.isfinite(error) & (error > 0)
        block["mask"] &= known
        block["noise"] = np.where(known, error, np.median(error[known]) if known.any() else 1)
    return block


def refuse(kind: str, shape: Shape, dtype: np.dtype) -> None:
    """Raises a DiffemError if items of `shape` cannot be written."""
    if len(shape) != 3 or shape[0] != 1:
        raise DiffemError(f"--as {kind}: is for images of one channel; the items have shape {shape}")
    optional("astropy.io.fits", "astronomy")


def write(kind: str, path: Path, items: Iterable[np.ndarray], about: dict[str, Any]) -> None:
    """Writes images to the primary HDU or to extensions, as they were read, with their original headers."""
    fits, items = optional("astropy.io.fits", "astronomy"), iter(items)
    headers = about.get("headers") or [{"hdu": 0, "count": about["count"], "cards": ""}]
    with fits.open(path, "append") as file:
        if headers[0]["hdu"] != 0:
            file.append(fits.PrimaryHDU(header=_cards(about["primary"])))
        for header in headers:
            planes = np.concatenate([next(items) for _ in range(header["count"])])
            unit = fits.ImageHDU if header["hdu"] else fits.PrimaryHDU
            file.append(unit(planes[0] if len(planes) == 1 else planes, _cards(header["cards"])))
            file.flush()


def _cards(text: str) -> Any:
    """A header made of its cards, without the :data:`STALE` ones."""
    cards = optional("astropy.io.fits", "astronomy").Header.fromstring(text, sep="\n")
    for card in STALE:
        cards.remove(card, ignore_missing=True, remove_all=True)
    return cards
