"""Images: PNG, JPEG, BMP, WebP and multi-page TIFF; 8, 16 and 32 bits, grayscale and colour. Written as TIFF and PNG.

Pillow is used for files that it reads exactly. It would silently reduce colours of more than 8 bits to 8: such PNG are
refused, and such TIFF are read by tifffile. So are TIFF of 64-bit or half-precision numbers, and TIFF that are stored
rotated, for which Pillow 13 swaps rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffem.errors import DiffemError, optional

from .source import Block, File, Options, Shape, numbers, same

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "I": 1, "F": 1, "I;16": 1, "I;16B": 1, "I;16L": 1}  # of Pillow's modes
NUMBERS = {  # (bits, sample format) of a TIFF
    (1, 1): np.dtype(np.uint8),
    (8, 1): np.dtype(np.uint8),
    (16, 1): np.dtype(np.uint16),
    (16, 2): np.dtype(np.int16),
    (32, 2): np.dtype(np.int32),
    (32, 3): np.dtype(np.float32),
}
BITS, SAMPLE_FORMAT, ORIENTATION, DESCRIPTION = 258, 339, 274, 270  # tags of a TIFF, and of EXIF


def read(path: Path, name: str, options: Options) -> File:
    """The pages of an image file."""
    pillow = _tiff_for_pillow(path, name) if path.suffix.lower() in (".tif", ".tiff") else True
    described, pixels = (_pages, _pixels) if pillow else (_tiff_pages, _tiff_pixels)
    items, dtype = same(name, list(described(path, name)))

    def blocks() -> Iterator[Block]:
        return ({"y": page[None]} for page in pixels(path, name, dtype))

    return File(name, items, dtype, blocks)


# --- Pillow ------------------------------------------------------------------------------------------


def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """The pages of an image file, by Pillow; its pixels are not decoded yet."""
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    with image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format not in ("TIFF", "MPO"):  # MPO: a photograph and its preview
            raise DiffemError(f"{name}: is an animation; give its frames as images or pages of a TIFF")
        stated = re.search(r"^images=(\d+)", str(getattr(image, "tag_v2", {}).get(DESCRIPTION)), re.MULTILINE)
        if stated and int(stated[1]) > pages:  # ImageJ describes the first image of a large stack only
            raise DiffemError(
                f"{name}: states {stated[1]} images, but describes {pages}; save it as a TIFF with a page for each"
            )
        for page in range(pages if image.format == "TIFF" else 1):
            image.seek(page)
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise _too_large(name)
            yield image


def _too_large(name: str) -> DiffemError:
    return DiffemError(f"{name}: has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that Pillow trusts; cut it first")


def _dtype(image: Image.Image, path: Path) -> np.dtype | None:
    """The exact dtype of Pillow's pixels; None if Pillow would change the values."""
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # pyrefly: ignore
        bits = tags.get(BITS, (1,))
        kinds = {*zip(bits, tags.get(SAMPLE_FORMAT) or (1,) * len(bits), strict=True)}
        exact = len(kinds) == 1 and tags.get(ORIENTATION, 1) == 1
        dtype = NUMBERS.get(kinds.pop()) if exact else None
        eight = image.mode[0] not in "IF"
        return dtype if dtype is not None and eight == (dtype.itemsize == 1) else None
    if image.format == "PNG":
        with path.open("rb") as stream:
            deep = stream.read(25)[24] == 16
        grayscale = image.mode.startswith("I")  # 16 bits in all versions of Pillow
        return np.dtype(np.uint16) if grayscale else None if deep else np.dtype(np.uint8)
    return np.dtype(np.uint8)


def _tiff_for_pillow(path: Path, name: str) -> bool:
    """Whether Pillow reads all pages of a TIFF exactly."""
    try:
        return all(_dtype(image, path) is not None for image in _opened(path, name))
    except UnidentifiedImageError:
        return False


def _pages(path: Path, name: str) -> Iterator[tuple[Shape, np.dtype]]:
    for image in _opened(path, name):
        if image.mode not in CHANNELS or "transparency" in image.info:
            alpha = " with transparency" if "transparency" in image.info else ""
            raise DiffemError(f"{name}: is an image of mode {image.mode}{alpha}; convert it to grayscale or RGB")
        if (dtype := _dtype(image, path)) is None:
            raise DiffemError(f"{name}: has 16 bits a colour, which cannot be read from PNG; convert it to TIFF")
        yield _upright_shape((CHANNELS[image.mode], image.height, image.width), _orientation(image)), dtype


def _orientation(image: Image.Image) -> int:
    return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)


def _pixels(path: Path, name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    for image in _opened(path, name):
        orientation, plain = _orientation(image), image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode))
        yield _upright(_channels_first(np.asarray(plain).astype(dtype, copy=False)), orientation)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (channels, rows, columns) in the orientation in which they are displayed, from the orientation tag."""
    if 5 <= orientation <= 8:
        pixels = pixels.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels[:, :, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _upright_shape(shape: Shape, orientation: int) -> Shape:
    return _upright(np.broadcast_to(np.uint8(0), shape), orientation).shape


# --- tifffile ----------------------------------------------------------------------------------------

AXES = {"YX": _channels_first, "YXS": _channels_first, "SYX": lambda pixels: pixels}  # page axes to channels first


def _tiff(path: Path, name: str) -> Iterator[Any]:
    """The pages of a TIFF, by tifffile."""
    tifffile = optional("tifffile", "microscopy")
    with tifffile.TiffFile(path) as tiff:
        for page in tiff.pages:
            if page.axes not in AXES:
                raise DiffemError(f"{name}: has a page of axes {page.axes}; give images of rows, columns and channels")
            if page.extrasamples:
                raise DiffemError(f"{name}: is an image with transparency; convert it to grayscale or RGB")
            yield page


def _tiff_pages(path: Path, name: str) -> Iterator[tuple[Shape, np.dtype]]:
    for page in _tiff(path, name):
        shape = AXES[page.axes](np.broadcast_to(np.uint8(0), page.shape)).shape
        yield _upright_shape(shape, page.tags.valueof(ORIENTATION, default=1)), numbers(name, np.dtype(page.dtype))


def _tiff_pixels(path: Path, name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    for page in _tiff(path, name):
        pixels = AXES[page.axes](page.asarray().astype(dtype, copy=False))
        yield _upright(pixels, page.tags.valueof(ORIENTATION, default=1))


# --- writing -----------------------------------------------------------------------------------------


def refuse(kind: str, shape: Shape, dtype: np.dtype) -> None:
    """Raises a DiffemError if items of `shape` cannot be written as `kind`: tiff or png."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DiffemError(f"--as {kind}: is for grayscale and RGB images; the items have shape {shape}")
    if kind == "tiff":
        optional("tifffile", "microscopy")
    elif dtype != np.uint8 and (dtype != np.uint16 or shape[0] == 3):
        raise DiffemError(f"--as png: holds 8 bits, or 16 bits of grayscale, where y holds {dtype}; use --as tiff")


def write(kind: str, path: Path, items: Iterable[np.ndarray], about: dict[str, Any]) -> None:
    """Writes items (channels, height, width): one TIFF with a page per item, or one PNG per item."""
    if kind == "png":
        for page, item in enumerate(items):
            file = path if about["count"] == 1 else path.with_name(f"{path.stem}-{page:06d}.png")
            Image.fromarray(np.ascontiguousarray(_channels_last(item))).save(file)
        return
    with optional("tifffile", "microscopy").TiffWriter(path) as tiff:
        for item in items:
            tiff.write(_channels_last(item), photometric="rgb" if len(item) == 3 else "minisblack", metadata=None)


def _channels_last(item: np.ndarray) -> np.ndarray:
    return item[0] if len(item) == 1 else item.transpose(1, 2, 0)
