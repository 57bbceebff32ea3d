"""People's files become observation folders and come back with the same values, names and headers; hostile ones are one line."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas
import pytest
import tifffile
import yaml
import zarr
from astropy.io import fits
from PIL import Image

from diffem.cli import main
from diffem.corruptions import from_config
from diffem.data import Observations
from diffem.data.readers import source as limits
from diffem.data.readers.exporting import Export
from diffem.data.readers.importing import import_files
from diffem.data.readers.source import Options
from diffem.errors import DiffemError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(shape: tuple[int, ...], dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    """Values of a dtype, from all of its range."""
    generator = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return generator.integers(info.min, info.max, shape, dtype, endpoint=True)
    return generator.normal(size=shape).astype(dtype)


def y(folder: str = "obs") -> np.ndarray:
    return np.load(f"{folder}/y.npy")


def error(source: str, out: str = "refused", **options) -> str:
    """The line of a refusal, which leaves nothing behind."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(DiffemError) as refused:
        import_files(source, out, Options(**options))
    assert sorted(Path().rglob("*")) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def back(kind: str, folder: str = "obs", out: str = "out", name: str = "y") -> None:
    """Writes y as if it were a reconstruction."""
    values = np.load(f"{folder}/{name}.npy")
    Export(folder, kind, values.shape[1:]).write(values, Path(out), whole=name == "y")


def save(file: str, pixels: np.ndarray) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith((".tif", ".tiff")):
        tifffile.imwrite(file, pixels, photometric="rgb" if pixels.shape[-1] == 3 else "minisblack", metadata=None)
    else:
        Image.fromarray(pixels).save(file)


# --- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("png", np.uint8), ("bmp", np.uint8), ("png", np.uint16)]
    + [("tif", d) for d in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64)],
)
def test_images_of_every_type_come_back_exactly(suffix, dtype, shape, here):
    if suffix == "png" and dtype == np.uint16 and len(shape) == 3:
        return
    names = ["a", "b/c", "b/d/e", "f"]  # subfolders too, in sorted order
    images = [numbers(shape, dtype, seed) for seed in range(4)]
    for name, image in zip(names, images, strict=True):
        save(f"in/{name}.{suffix}", image)
    done = import_files("in", "obs")
    expected = np.stack([i[None] if i.ndim == 2 else i.transpose(2, 0, 1) for i in images])
    assert y().dtype == dtype
    np.testing.assert_array_equal(y(), expected)
    assert str(done) == f"4 observations of shape {expected.shape[1:]}, {np.dtype(dtype)}, none missing"
    back("tiff")
    for name, image in zip(names, images, strict=True):
        again = tifffile.imread(f"out/{name}.tiff")
        assert again.dtype == dtype
        np.testing.assert_array_equal(again, image)
    if suffix == "png":
        back("png")
        np.testing.assert_array_equal(np.asarray(Image.open("out/b/d/e.png")), images[2])


def test_jpeg_and_webp_are_what_the_codec_decodes(here):
    for name in ("a.jpg", "b.jpeg", "c.webp"):
        save(f"in/{name}", numbers((16, 16, 3), np.uint8))
    import_files("in", "obs")
    for row, name in zip(y(), ("a.jpg", "b.jpeg", "c.webp"), strict=True):
        np.testing.assert_array_equal(row.transpose(1, 2, 0), np.asarray(Image.open(f"in/{name}")))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_every_page_of_a_tiff_is_an_observation(compression, here):
    stack = numbers((7, 6, 5), np.uint16)
    tifffile.imwrite("stack.tif", stack, photometric="minisblack", compression=compression, metadata=None)
    import_files("stack.tif", "obs")
    np.testing.assert_array_equal(y()[:, 0], stack)
    assert yaml.safe_load(Path("obs/corruption.yaml").read_text()) == {"range": [0, 65535]}
    back("tiff")
    np.testing.assert_array_equal(tifffile.imread("out/stack.tiff"), stack)
    back("png")
    np.testing.assert_array_equal(np.asarray(Image.open("out/stack-000006.png")), stack[6])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["in/a.jpg", "in/a.png", "in/a.tif"])
def test_exif_rotation_is_applied(name, orientation, here):
    save("in/a.png", numbers((8, 16), np.uint8))
    image = Image.open("in/a.png")
    image.load()
    Path("in/a.png").unlink()
    exif = Image.Exif()
    exif[274] = orientation
    image.save(name, exif=exif)
    import_files("in", "obs")
    rows = tifffile.imread(name) if name.endswith("tif") else np.asarray(Image.open(name))  # as they are stored
    turned = {
        1: rows,
        2: rows[:, ::-1],
        3: rows[::-1, ::-1],
        4: rows[::-1],
        5: rows.T,
        6: rows.T[:, ::-1],
        7: rows.T[::-1, ::-1],
        8: rows.T[::-1],
    }
    np.testing.assert_array_equal(y()[0, 0], turned[orientation])


def test_images_of_mixed_sizes_become_patches_and_come_back(here):
    images = {"a": numbers((8, 8), np.uint8), "b": numbers((11, 9), np.uint8, 1)}
    for name, image in images.items():
        save(f"in/{name}.png", image)
    assert (
        error("in") == "b.png: has an image of 11x9 where a.png has 8x8; --patch SIZE cuts them into pieces of one size"
    )
    assert error("in", patch=9) == "a.png: has an image of 8x8, too small for --patch 9"
    assert error("in", patch=0) == "--patch: must be at least 1, got 0"
    import_files("in", "obs", Options(patch=4))
    a, b = images.values()
    assert y().shape == (4 + 9, 1, 4, 4)
    np.testing.assert_array_equal(y()[1, 0], a[:4, 4:])
    np.testing.assert_array_equal(y()[4 + 8, 0], b[7:, 5:])  # the last ones end where the image ends
    back("png")
    for name, image in images.items():
        np.testing.assert_array_equal(np.asarray(Image.open(f"out/{name}.png")), image)


def test_missing_pixels_of_images_are_nan(here):
    image = numbers((6, 5))
    image[2, 3] = np.nan
    save("in/a.tif", image)
    save("in/b.tif", numbers((6, 5)))
    assert str(import_files("in", "obs")).endswith("float32, 1.7 % missing")
    np.testing.assert_array_equal(y()[0, 0], image)
    back("tiff")
    np.testing.assert_array_equal(tifffile.imread("out/a.tiff"), image)


def test_what_images_cannot_be_read(here):
    rgba = Image.fromarray(numbers((4, 4, 4), np.uint8))
    Path("in").mkdir()
    rgba.save("in/a.png")
    assert error("in") == "a.png: is an image of mode RGBA; convert it to grayscale or RGB"
    rgba.save("in/a.tif")
    assert error("in/a.tif") == "a.tif: is an image of mode RGBA; convert it to grayscale or RGB"
    tifffile.imwrite("t.tif", numbers((4, 4, 4), np.uint16), photometric="rgb", extrasamples=["unassalpha"])
    assert error("t.tif") == "t.tif: is an image with transparency; convert it to grayscale or RGB"
    Path("in/a.png").write_bytes(deep_png())
    assert error("in/a.png") == "a.png: has 16 bits a colour, which cannot be read from PNG; convert it to TIFF"
    frames = [Image.fromarray(numbers((4, 4), np.uint8, seed)) for seed in range(2)]
    frames[0].save("b.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert error("b.webp") == "b.webp: is an animation; give its frames as images or pages of a TIFF"
    Path("c.png").write_text("no image")
    assert error("c.png").startswith("c.png: cannot be read (cannot identify image file ")
    save("whole.png", numbers((40, 40), np.uint8))
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:600])
    assert error("cut.png").startswith("cut.png: cannot be read (")
    save("mixed/a.png", numbers((4, 4), np.uint8))
    save("mixed/b.png", numbers((4, 4), np.uint16))
    assert error("mixed") == "b.png: holds uint16 where a.png holds uint8; give values of one type"
    tifffile.imwrite("pages.tif", numbers((4, 4), np.uint8), metadata=None)
    tifffile.imwrite("pages.tif", numbers((4, 4), np.uint16), metadata=None, append=True)
    assert error("pages.tif") == "pages.tif: holds uint8 and uint16; give values of one type"
    tifffile.imwrite("large.tif", numbers((4, 4), np.uint8), description="ImageJ=1.53\nimages=300\n", metadata=None)
    assert error("large.tif") == "large.tif: states 300 images, but describes 1; save it as a TIFF with a page for each"
    save("colours/a.png", numbers((4, 4), np.uint8))
    save("colours/b.png", numbers((4, 4, 3), np.uint8))
    assert error("colours", patch=2) == "b.png: has an image of 4x4, 3 channels where a.png has 4x4"


def deep_png() -> bytes:
    """A PNG of 16 bits a colour, which Pillow would cut to 8."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(range(12)) for _ in range(2)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bombs_of_images(here, monkeypatch):
    save("a.png", np.zeros((100, 100), np.uint8))
    for limit in (9999, 4000):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert error("a.png") == f"a.png: has more than the {limit:,} pixels that Pillow trusts; cut it first"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    for dtype, size in ((np.float64, 60000), (np.uint8, 9000)):  # for tifffile, and for Pillow
        tifffile.imwrite("b.tif", np.zeros((64, 64), dtype), metadata=None)
        content = bytearray(Path("b.tif").read_bytes())
        with tifffile.TiffFile("b.tif") as tiff:
            tags = [tiff.pages[0].tags[name] for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
        for tag in tags:
            length = {3: 2, 4: 4}[tag.dtype]
            content[tag.valueoffset : tag.valueoffset + length] = size.to_bytes(length, "little")
        Path("b.tif").write_bytes(content)
        declared, stored = size**2 * np.dtype(dtype).itemsize, len(content)
        what = f"(1, 1, {size}, {size}) of {np.dtype(dtype)}, {declared:,} bytes"
        assert error("b.tif") == f"b.tif: declares {what}, but stores {stored:,}; not read"


def test_folders(here):
    save("in/a.png", numbers((4, 4), np.uint8))
    Path("in/notes.txt").write_text("x")
    Path("in/.hidden.png").write_text("x")
    assert import_files("in", "obs").left_out == ["notes.txt"]
    os.symlink("a.png", "in/b.png")  # inside
    assert import_files("in", "obs2").count == 2
    save("secret.png", numbers((4, 4), np.uint8))
    os.symlink("../secret.png", "in/c.png")
    assert error("in") == "in/c.png: is a link to ../secret.png; links are not followed: put a copy there"
    Path("in/c.png").unlink()
    os.symlink("..", "in/c")
    assert error("in") == "in/c: is a link to ..; links are not followed: put a copy there"
    Path("in/c").unlink()
    fits.writeto("in/z.fits", numbers((4, 4)))
    assert error("in") == "in: holds a.png and z.fits; put files of different kinds into different folders"
    Path("empty").mkdir()
    assert error("empty") == "empty: holds no images, FITS or NIfTI files; other files are read one at a time"
    assert error("nowhere") == "nowhere: no such file or folder"
    assert error("in/notes.txt").startswith("in/notes.txt: is of no format that is read (.png .jpg ")
    assert error("in/a.png", hdu="SCI") == "--hdu: is not for images, which in/a.png holds"


# --- arrays ------------------------------------------------------------------------------------------


def write_arrays(file: str, arrays: dict[str, np.ndarray]) -> None:
    if file.endswith(".npz"):
        np.savez_compressed(file, **arrays)
    elif file.endswith(".h5"):
        with h5py.File(file, "w") as group:
            for name, array in arrays.items():
                group.create_dataset(name, data=array, compression="gzip")
    else:
        group = zarr.open_group(file, mode="w", zarr_format=2 if "2" in file else 3)
        for name, array in arrays.items():
            group.create_array(name, data=array, chunks=(3, *array.shape[1:]))


@pytest.mark.parametrize("file", ["a.npz", "a.h5", "a2.zarr", "a3.zarr"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.complex64, ">f4"])
def test_arrays_come_back_exactly_with_what_lies_beside_them(file, dtype, here, monkeypatch):
    monkeypatch.setattr(limits, "BLOCK", 100)  # several blocks
    values = (numbers((11, 2, 6), np.float64) * 50).astype(dtype)
    mask = numbers((11, 1, 6)) > 0
    write_arrays(file, {"y": values, "mask": mask})
    done = import_files(file, "obs")
    assert done.missing == 1 - mask.mean()
    assert y().dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(y(), values)
    np.testing.assert_array_equal(np.load("obs/mask.npy"), mask)
    import_files(f"{file}:mask", "one")
    np.testing.assert_array_equal(y("one"), mask)


def test_npy_and_its_axes(here):
    values = numbers((5, 4, 4, 3))
    values[0, 0, 0, 0] = np.nan
    np.save("a.npy", np.asfortranarray(values))
    import_files("a.npy", "obs", Options(axes="NHWC"), from_config({"name": "Mask", "noise": 0.1}))
    np.testing.assert_array_equal(y(), values)
    loaded = Observations.load("obs")
    np.testing.assert_array_equal(loaded.y[:], values.transpose(0, 3, 1, 2))
    assert loaded.corruption.config == {"name": "Mask", "noise": 0.1}
    Export("obs", "tiff", loaded.shape).write(loaded.y[:], Path("out"))
    np.testing.assert_array_equal(tifffile.imread("out/a.tiff"), values)
    assert error("a.npy", axes="NHC") == "axes: NHC has 3 letters where y.npy has 4 axes, (5, 4, 4, 3)"
    assert error("a.npy", axes="NTT").startswith("axes: must be N and then, once each, ")


def test_which_array(here):
    write_arrays("a.h5", {"g/b": np.ones((3, 2)), "g/c": np.zeros((3, 2)), "g/y": np.full((3, 2), 2.0)})
    import_files("a.h5", "obs")
    assert sorted(file.name for file in Path("obs").glob("*.npy")) == ["b.npy", "c.npy", "y.npy"]
    import_files("a.h5:/g/c", "c")
    assert (y("c") == 0).all()
    assert error("a.h5:/g/d") == "a.h5: has no array g/d; it has g/b, g/c, g/y"
    write_arrays("b.npz", {"a": np.ones((3, 2)), "b": np.ones((3, 2))})
    assert error("b.npz") == "b.npz: which array? it has a, b; write FILE:PATH, or call one y"
    np.save("one.npy", np.ones(3))
    assert error("one.npy") == "one.npy: has shape (3,); y needs (N, features) or (N, channels, *spatial)"
    np.save("text.npy", np.array([["a"], ["b"]]))
    assert error("text.npy") == "text.npy: holds <U1; give numbers"
    zarr.save_array("root.zarr", numbers((4, 3)))
    assert error("root.zarr:x") == "root.zarr: is an array, and has none called x"
    import_files("root.zarr", "root")
    np.testing.assert_array_equal(y("root"), numbers((4, 3)))


def test_hostile_numpy(here):
    np.save("a.npy", np.array([[{}]]), allow_pickle=True)
    assert error("a.npy") == "a.npy: holds text or objects; give numbers"
    np.savez("a.npz", y=np.array([[{}]]))
    assert error("a.npz") == "a.npz: y: holds object; give numbers"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 125000)})
    Path("big.npy").write_bytes(header.getvalue() + b"0" * 100)
    assert error("big.npy").startswith("big.npy: is not a complete .npy array: ")
    with zipfile.ZipFile("big.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y.npy", header.getvalue() + b"0" * 100)
        stored = archive.getinfo("y.npy").compress_size
    assert error("big.npz") == (
        f"big.npz: y: declares (1000000, 125000) of float64, 1,000,000,000,000 bytes, but stores {stored}; not read"
    )
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (20, 2)})
    with zipfile.ZipFile("short.npz", "w") as archive:
        archive.writestr("y.npy", header.getvalue() + b"0" * 100)
    assert error("short.npz") == "short.npz: y: declares (20, 2) of float64, but holds 100 bytes; save it again"
    np.savez("fortran.npz", np.asfortranarray(np.ones((3, 2))))
    assert error("fortran.npz") == "fortran.npz: arr_0: is in Fortran order; save np.ascontiguousarray of it"
    np.savez("out.npz", **{"y": np.ones((3, 2)), "../mask": np.ones((3, 2))})
    import_files("out.npz", "obs")  # ../mask lies elsewhere than y
    assert not Path("mask.npy").exists()
    np.savez("names.npz", **{"y": np.ones((3, 2)), "-x y": np.ones((3, 2))})
    Path("text.npz").write_text("x")
    assert error("text.npz") == "text.npz: cannot be read (File is not a zip file); replace it or remove it"
    assert error("names.npz") == "names.npz: holds an array '-x y'; a parameter needs a plain name such as mask"


def test_hostile_hdf5(here):
    with h5py.File("other.h5", "w") as file:
        file["x"] = np.ones((3, 2))
    with h5py.File("a.h5", "w") as file:
        file["g/x"] = np.full((3, 2), 5.0)
        file["link"] = h5py.SoftLink("/g/x")
        file["g/near"] = h5py.SoftLink("x")
        file["out"] = h5py.ExternalLink("other.h5", "/x")
        file["soft"] = h5py.SoftLink("/out")
        file["round"] = h5py.SoftLink("/round")
        file.create_dataset("big", shape=(10**6, 125000), dtype="f8", chunks=(10, 125000))
        layout = h5py.VirtualLayout((3, 2), "f8")
        layout[:] = h5py.VirtualSource("other.h5", "x", (3, 2))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (3, 2), "f8", external=[("other.bin", 0, 48)])
        file["text"] = ["a", "b"]
        file["table"] = np.zeros((3, 2), [("a", "f4"), ("b", "i4")])
    for name in ("link", "g/near"):
        import_files(f"a.h5:/{name}", name)
        assert (y(name) == 5).all()
    away = "is a link to another file, other.h5; copy the dataset into this one"
    assert error("a.h5:/out") == f"a.h5: out: {away}"
    assert error("a.h5:/soft") == f"a.h5: out: {away}"
    assert error("a.h5:/out/deeper") == f"a.h5: out: {away}"
    assert error("a.h5:/round") == "a.h5: round: is a circle of links"
    assert error("a.h5:/nothing/x").startswith("a.h5: has no array nothing/x; it has big, g/x, ")
    assert error("a.h5:/g/x/x").startswith("a.h5: has no array g/x/x; it has ")
    for name in ("virtual", "raw"):
        assert error(f"a.h5:/{name}") == f"a.h5: {name}: lies in other files; save it as one dataset of its own"
    assert error("a.h5:/big") == (
        "a.h5: big: declares (1000000, 125000) of float64, 1,000,000,000,000 bytes, but stores 0; not read"
    )
    assert error("a.h5:/text") == "a.h5: text: holds object; give numbers"
    assert error("a.h5:/table") == "a.h5: table: holds [('a', '<f4'), ('b', '<i4')]; give numbers"
    Path("text.h5").write_text("x")
    assert error("text.h5").startswith("text.h5: cannot be read (")


def test_hostile_zarr(here):
    zarr.open_array("big.zarr", mode="w", shape=(10**6, 125000), chunks=(1, 125000), dtype="f8")
    assert error("big.zarr").startswith(
        "big.zarr: declares (1000000, 125000) of float64, 1,000,000,000,000 bytes, but stores "
    )
    zarr.open_array("code.zarr", mode="w", shape=(3, 2), chunks=(3, 2), dtype="f8", zarr_format=2)
    described = json.loads(Path("code.zarr/.zarray").read_text())
    for codec, line in [
        ("base64", "is packed by base64; those that are read: blosc, bytes, "),
        ("pickle", "cannot be read ("),
    ]:
        Path("code.zarr/.zarray").write_text(json.dumps({**described, "filters": [{"id": codec}]}))
        assert error("code.zarr").startswith(f"code.zarr: {line}")  # zarr itself refuses to unpickle numbers
    zarr.save_array("link.zarr", numbers((4, 3)))
    os.symlink("/etc/hostname", "link.zarr/c/9")
    assert error("link.zarr") == "link.zarr: c/9: is a link; put the file itself there"


# --- FITS --------------------------------------------------------------------------------------------


def exposure(file: str, seed: int, chips: int = 2) -> list[tuple[np.ndarray, ...]]:
    """A file as a telescope makes it: science, error and quality of each chip."""
    units, planes = [fits.PrimaryHDU(header=fits.Header([("TELESCOP", "HST")]))], []
    for chip in range(chips):
        science = numbers((6, 5), seed=seed + chip)
        error, quality = np.abs(numbers((6, 5), seed=seed + 9)) + 0.1, np.zeros((6, 5), np.int16)
        science[0, 0], error[0, 1], error[0, 2], quality[1, 1] = np.nan, 0, np.nan, 64
        for name, plane in (("SCI", science), ("ERR", error), ("DQ", quality)):
            unit = fits.ImageHDU(plane, name=name, ver=chip + 1)
            unit.header["EXPTIME"] = (120.5, "seconds")
            unit.header["CRVAL1"] = 10.25 + chip
            units.append(unit)
        planes.append((science, error, quality))
    Path(file).parent.mkdir(exist_ok=True)
    fits.HDUList(units).writeto(file)
    return planes


def test_fits_planes_become_y_noise_and_mask(here):
    chips = exposure("in/a.fits", 0) + exposure("in/b.fits", 5)
    done = import_files("in", "obs")
    assert str(done) == "4 observations of shape (1, 6, 5), float32, 13.3 % missing"
    mask, noise = np.load("obs/mask.npy"), np.load("obs/noise.npy")
    for row, (science, error, quality) in enumerate(chips):
        np.testing.assert_array_equal(y()[row, 0], science)
        expected = np.isfinite(science) & (quality == 0) & (error > 0)
        np.testing.assert_array_equal(mask[row, 0], expected)
        known = error > 0
        np.testing.assert_array_equal(noise[row, 0][known], error[known])
        assert (noise[row, 0][~known] == np.median(error[known])).all()
    assert (
        Path("obs/corruption.yaml")
        .read_text()
        .endswith("# name: Mask\n# noise.npy holds the standard deviation of the noise\n")
    )
    back("fits")
    with fits.open("out/b.fits") as again:
        for chip in range(2):
            np.testing.assert_array_equal(again["SCI", chip + 1].data, chips[2 + chip][0])
            assert again["SCI", chip + 1].header["CRVAL1"] == 10.25 + chip
            assert again["SCI", chip + 1].header.comments["EXPTIME"] == "seconds"
        assert again[0].header["TELESCOP"] == "HST"
    import_files("in", "plain", Options(hdu="sci"))
    assert sorted(f.name for f in Path("plain").iterdir()) == ["corruption.yaml", "source.json", "y.npy"]
    import_files("in/a.fits", "quality", Options(hdu="1,,3"))
    np.testing.assert_array_equal(np.load("quality/mask.npy")[0, 0], np.isfinite(chips[0][0]) & (chips[0][2] == 0))
    assert not Path("quality/noise.npy").exists()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_fits_images_and_stacks_of_every_type(dtype, here):
    stack = numbers((4, 6, 5), dtype)
    fits.writeto("stack.fits", stack)
    fits.CompImageHDU(stack, compression_type="GZIP_1").writeto("packed.fits.fz")
    import_files("stack.fits", "obs")
    assert y().dtype == dtype
    np.testing.assert_array_equal(y()[:, 0], stack)
    back("fits")
    np.testing.assert_array_equal(fits.getdata("out/stack.fits", 0), stack)
    import_files("packed.fits.fz", "packed")
    np.testing.assert_array_equal(y("packed")[:, 0], stack)


def test_what_fits_cannot_be_read(here):
    exposure("in/a.fits", 0)
    fits.writeto("in/b.fits", numbers((6, 5)))
    assert error("in") == "b.fits: gives y where a.fits gives y and mask and noise; they must be alike"
    assert error("in/a.fits", hdu="FLUX") == "a.fits: --hdu: has no image FLUX; it has SCI, ERR, DQ, SCI, ERR, DQ"
    assert error("in/a.fits", hdu="a,b,c,d") == (
        "--hdu: is SCIENCE[,ERROR[,QUALITY]], names or numbers of extensions, got 'a,b,c,d'"
    )
    assert error("in/a.fits", hdu="SCI,2") == "a.fits: has 1 of 2 where it has 2 of SCI"
    units = [fits.PrimaryHDU(numbers((6, 5))), fits.ImageHDU(numbers((6, 4)), name="UNCERT")]
    fits.HDUList(units).writeto("c.fits")
    assert error("c.fits") == "c.fits: which images? it has PRIMARY, UNCERT; --hdu SCIENCE[,ERROR[,QUALITY]] says which"
    assert (
        error("c.fits", hdu="0,UNCERT") == "c.fits: HDU 1 has shape (6, 4) where HDU 0 has (6, 5); they must be alike"
    )
    fits.writeto("d.fits", numbers((2, 2, 6, 5)))
    assert error("d.fits") == "d.fits: HDU 0 has shape (2, 2, 6, 5); give images, or stacks of them"
    header = fits.Header([("SIMPLE", True), ("BITPIX", -64), ("NAXIS", 2), ("NAXIS1", 10**6), ("NAXIS2", 125000)])
    Path("big.fits").write_text(header.tostring())
    assert error("big.fits") == (
        "big.fits: HDU 0: declares (125000, 1000000) of |V8, 1,000,000,000,000 bytes, but stores 2,880; not read"
    )
    Path("text.fits").write_text("x")
    assert error("text.fits").startswith("text.fits: cannot be read (")


# --- NIfTI -------------------------------------------------------------------------------------------

AFFINE = np.array([[0, 2, 0, 5], [-1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("slices", [None, 0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3)])
def test_nifti_volumes_and_slices_come_back_exactly(suffix, dtype, slices, shape, here):
    volume = numbers(shape, dtype)
    image = nibabel.Nifti1Image(volume, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a scan"
    Path("in").mkdir()
    nibabel.save(image, f"in/a{suffix}")
    import_files("in", "obs", Options(slices=slices))
    assert y().dtype == dtype
    volumes = np.moveaxis(volume.reshape(*shape[:3], -1), -1, 0)
    expected = (
        volumes[:, None] if slices is None else np.concatenate([np.moveaxis(v, slices, 0) for v in volumes])[:, None]
    )
    np.testing.assert_array_equal(y(), expected)
    back("nifti")
    again = nibabel.load("out/a.nii.gz")
    assert again.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(again.dataobj), volume)
    np.testing.assert_array_equal(again.affine, AFFINE)
    assert again.header.get_xyzt_units() == ("mm", "sec")
    assert bytes(again.header["descrip"]).startswith(b"a scan")


def test_scaled_integers_of_nifti_become_what_they_mean(here):
    stored = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
    image = nibabel.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, 10)
    image.to_filename("a.nii")
    assert nibabel.load("a.nii").dataobj.slope == 0.5
    import_files("a.nii", "obs")
    assert y().dtype == np.float32
    np.testing.assert_array_equal(y()[0, 0], 0.5 * stored + 10)
    back("nifti")
    np.testing.assert_array_equal(np.asarray(nibabel.load("out/a.nii.gz").dataobj), y()[0, 0])


def test_what_nifti_cannot_be_read(here):
    nibabel.save(nibabel.Nifti1Image(numbers((4, 5, 6)), AFFINE), "a.nii")
    assert error("a.nii", slices=3) == "--slices: must be 0, 1 or 2, an axis of the volumes, got 3"
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape((30000, 30000, 30000))
    Path("big.nii").write_bytes(header.binaryblock + b"\0" * 100)
    assert error("big.nii").startswith(
        "big.nii: declares (1, 1, 30000, 30000, 30000) of float64, 216,000,000,000,000 bytes, but"
    )
    nibabel.save(nibabel.Nifti1Image(numbers((4, 5)), AFFINE), "flat.nii")
    assert error("flat.nii") == "flat.nii: has shape (4, 5); give volumes of three axes, or series of them"
    colours = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, AFFINE), "rgb.nii")
    assert error("rgb.nii").startswith("rgb.nii: holds [('R', 'u1'), ('G', 'u1'), ('B', 'u1')]")
    Path("text.nii").write_text("x")
    assert error("text.nii").startswith("text.nii: cannot be read (")
    Path("cut.nii").write_bytes(Path("a.nii").read_bytes()[:400])
    assert error("cut.nii").startswith("cut.nii: cannot be read (")


# --- tables ------------------------------------------------------------------------------------------


def frame() -> pandas.DataFrame:
    count = pandas.array([1, None, 3, 2**40, -5], "Int64")
    ratio = pandas.array([0.1, None, 1e-300, -7.25, 1 / 3], "Float64")
    truth = pandas.array([True, False, None, True, True], "boolean")
    return pandas.DataFrame({"count": count, "ratio, %": ratio, "truth": truth})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables_come_back_exactly(suffix, here, monkeypatch):
    from diffem.data.readers import tables

    monkeypatch.setattr(tables, "ROWS", 2)  # several blocks
    table = frame()
    if suffix == "parquet":
        table.to_parquet("a.parquet")
    else:
        table.to_csv(f"a.{suffix}", sep="\t" if suffix == "tsv" else ",", index=False)
    done = import_files(f"a.{suffix}", "obs")
    assert str(done) == "5 observations of shape (3,), float64, 20.0 % missing"
    np.testing.assert_array_equal(y(), np.stack([table[c].to_numpy(float, na_value=np.nan) for c in table], 1))
    back("csv")
    again = pandas.read_csv("out/a.csv", dtype_backend="numpy_nullable")
    pandas.testing.assert_frame_equal(again, table, check_exact=True)
    import_files(f"a.{suffix}", "two", Options(columns="truth, count"))
    np.testing.assert_array_equal(y("two"), y()[:, [2, 0]])


def test_single_precision_is_written_with_its_own_digits(here):
    frame().to_csv("a.csv", index=False)
    import_files("a.csv", "obs")
    values = np.float32([[1, 0.1, 1], [2, 1 / 3, 0], [3, 0.7, 1], [4, 5, 0], [5, 2.5, 1]])
    Export("obs", "csv", (3,)).write(values, Path("out"))
    assert Path("out/a.csv").read_text().splitlines()[:3] == [
        'count,"ratio, %",truth',
        "1,0.1,True",
        "2,0.33333334,False",
    ]


def test_text_in_tables_is_refused_by_name(here):
    table = pandas.DataFrame({"city": ["Paris", "Rome"], "age": [1, 2], "late": ["3", "x"]})
    table.to_csv("a.csv", index=False)
    table.to_parquet("a.parquet")
    assert error("a.csv") == "a.csv: column 'city' holds 'Paris', not numbers; leave it out: --columns age"
    assert error("a.parquet") == "a.parquet: column 'city' holds 'Paris', not numbers; leave it out: --columns age"
    assert (
        error("a.csv", columns="late,age") == "a.csv: column 'late' holds 'x', not numbers; leave it out: --columns age"
    )
    assert (
        error("a.csv", columns="agee")
        == "a.csv: --columns: has no column 'agee'; did you mean 'age'? (known: age, city, late)"
    )
    import_files("a.csv", "obs", Options(columns="age"))
    Path("ids.csv").write_text(f"id\n{2**60}\n")
    assert error("ids.csv") == "ids.csv: column 'id' holds whole numbers beyond 2^53, not told apart; leave it out"
    Path("b.csv").write_text("a,b\n")
    assert error("b.csv") == "b.csv: holds no rows"
    Path("c.csv").write_text("")
    assert error("c.csv") == "c.csv: cannot be read (No columns to parse from file); replace it or remove it"
    Path("d.parquet").write_text("x")
    assert error("d.parquet").startswith("d.parquet: cannot be read (")


# --- the folder --------------------------------------------------------------------------------------


def test_the_template_of_corruption_yaml_and_what_check_says(here, capsys):
    save("in/a.tif", numbers((4, 4), np.int16))
    assert main(["import", "in", "--out", "obs"]) == 0
    assert capsys.readouterr().out == "1 observation of shape (1, 4, 4), int16, none missing, in obs\n"
    low, high = y().min(), y().max()
    assert Path("obs/corruption.yaml").read_text() == (
        "# How the observations came about: docs/your-data.md says what to write here.\n"
        "# name: GaussianNoise\n"
        "# noise: LEVEL  # its standard deviation, in the units of y; 0 if values are exact; of images `diffem check --estimate` tells it\n"
        f"# range: [{low}, {high}]  # of clean values; these are the least and the largest of y\n"
    )
    assert main(["check", "obs"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "diffem: obs/corruption.yaml: name: missing; say how y came about, e.g. `name: Mask` (known: "
    )
    assert said.count("\n") == 1
    assert main(["import", "in", "--out", "obs", "--overwrite", "--range", "-1024", "3071"]) == 0
    assert yaml.safe_load(Path("obs/corruption.yaml").read_text()) == {"range": [-1024.0, 3071.0]}
    options = ["--name", "GaussianBlur", "--std", "1.5", "--noise", "3"]
    assert main(["import", "in", "--out", "obs", "--overwrite", "--range", "-1024", "3071", *options]) == 0
    loaded = Observations.load("obs")
    assert loaded.corruption.config == {"name": "GaussianBlur", "std": 1.5, "noise": 3}
    assert loaded.range == (-1024, 3071)


def test_nothing_is_overwritten_that_was_not_imported(here, capsys):
    exposure("in/a.fits", 0)
    import_files("in", "obs")
    Path("obs/held_out.npy").write_bytes(b"mine")
    assert error("in", "obs") == "obs: holds an import already; --overwrite replaces it"
    import_files("in", "obs", Options(hdu="SCI"), overwrite=True)
    names = sorted(file.name for file in Path("obs").iterdir())
    assert names == ["corruption.yaml", "held_out.npy", "source.json", "y.npy"]  # no noise or mask of another import
    Path("obs/source.json").unlink()
    with pytest.raises(DiffemError, match=r"^obs: is there already, and not from an import; give another folder$"):
        import_files("in", "obs", overwrite=True)
    assert [file.name for file in here.iterdir()] == ["in", "obs"] or sorted(f.name for f in here.iterdir()) == [
        "in",
        "obs",
    ]


@pytest.mark.parametrize(
    ("module", "file", "extra"),
    [
        ("tifffile", "a.tif", "microscopy"),
        ("astropy.io.fits", "a.fits", "astronomy"),
        ("nibabel", "a.nii", "mri"),
        ("h5py", "a.h5", "mri"),
        ("zarr", "a.zarr", "zarr"),
        ("pandas", "a.csv", "tables"),
        ("pyarrow.parquet", "a.parquet", "tables"),
    ],
)
def test_a_missing_extra_is_one_line(module, file, extra, here, monkeypatch):
    if file == "a.tif":
        save(file, numbers((4, 4), np.float64))
    elif file == "a.zarr":
        Path(file).mkdir()
    else:
        Path(file).write_text("x")
    monkeypatch.setitem(sys.modules, module, None)
    assert error(file) == f"{module.split('.')[0]} is not installed: pip install 'diffem-torch[{extra}]'"


def test_plain_images_need_no_extra(here, monkeypatch):
    save("in/a.png", numbers((4, 4), np.uint16))
    save("tif/a.tif", numbers((4, 4), np.float32))
    for module in ("tifffile", "astropy.io.fits", "nibabel", "h5py", "zarr", "pandas"):
        monkeypatch.setitem(sys.modules, module, None)
    assert import_files("in", "obs").count == import_files("tif", "obs2").count == 1


# --- and back ----------------------------------------------------------------------------------------


def test_whole_numbers_are_rounded_and_clipped_to_the_range(here):
    save("in/a.png", np.array([[0, 100, 200, 255]], np.uint8))
    import_files("in", "obs")
    values = np.array([[[[-3.2, 100.4, 100.6, 300]]]], np.float32)
    Export("obs", "png", (1, 1, 4)).write(values, Path("out"))
    assert np.asarray(Image.open("out/a.png")).tolist() == [[0, 100, 101, 255]]
    Export("obs", "tiff", (1, 1, 4), (10, 101)).write(values, Path("out"))
    assert tifffile.imread("out/a.tiff").tolist() == [[10, 100, 101, 101]]
    Export("obs", "tiff", (1, 1, 4)).write(values, Path("std"), whole=False)
    np.testing.assert_array_equal(tifffile.imread("std/a.tiff"), values[0, 0])


def test_what_cannot_be_written(here):
    save("in/a.png", numbers((4, 4), np.uint8))
    import_files("in", "obs")
    save("float/a.tif", numbers((4, 4)))
    import_files("float", "float_obs")
    frame().to_csv("t.csv", index=False)
    import_files("t.csv", "table")
    np.save("k.npy", np.ones((3, 1, 4, 4), np.complex64))
    import_files("k.npy", "complex")
    save("twice/a.png", numbers((4, 4), np.uint8))
    save("twice/a.bmp", numbers((4, 4), np.uint8))
    import_files("twice", "twice_obs")
    import_files("in", "patches", Options(patch=2))
    Path("plain").mkdir()
    for folder, kind, shape, line in [
        ("obs", "gif", (1, 4, 4), "--as: must be one of tiff, png, fits, nifti, csv, got gif"),
        ("obs", "csv", (1, 4, 4), "--as csv: is for rows of a table; the items have shape (1, 4, 4)"),
        ("table", "png", (3,), "--as png: is for grayscale and RGB images; the items have shape (3,)"),
        ("table", "fits", (3,), "--as fits: is for images of one channel; the items have shape (3,)"),
        ("table", "nifti", (3,), "--as nifti: is for volumes and slices of one channel; the items have shape (3,)"),
        (
            "float_obs",
            "png",
            (1, 4, 4),
            "--as png: holds 8 bits, or 16 bits of grayscale, where y holds float32; use --as tiff",
        ),
        ("complex", "tiff", (2, 4, 4), "--as tiff: complex numbers are in mean.npy only"),
        (
            "twice_obs",
            "png",
            (1, 4, 4),
            "--as png: two files would be written as a.png; give them different names and import again",
        ),
        ("patches", "png", (1, 8, 8), "--as png: items of shape (1, 8, 8) do not fit patches of (1, 2, 2)"),
        ("plain", "png", (1, 4, 4), "plain: has no source.json: it was not written by diffem import"),
    ]:
        with pytest.raises(DiffemError) as refused:
            Export(folder, kind, shape)
        assert str(refused.value) == line
    for name in ("../a.png", "/a.png", "b/../../a.png"):
        described = json.loads(Path("obs/source.json").read_text())
        described["files"][0]["name"] = name
        Path("obs/source.json").write_text(json.dumps(described))
        with pytest.raises(DiffemError, match="outside of the folder; import the data again"):
            Export("obs", "png", (1, 4, 4))


# --- as the documentation says -----------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "your-data.md"
TINY = {
    **{"em.guard": "false", "em.iterations": "1", "m_step.steps": "3", "m_step.first_steps": "3", "m_step.batch": "16"},
    **{"sampler.steps": "3", "start.components": "[1]", "start.ranks": "[2]", "start.iterations": "10"},
    **{"network.kind": "mlp", "network.width": "16", "network.depth": "1", "network.embedding": "16"},
    **{"prior.steps": "3", "prior.sampler_steps": "3"},
}


def files_of_the_page() -> None:
    """The files that docs/your-data.md speaks of."""
    scenes = 125 + 20 * numbers((60, 8, 8, 3), seed=1)
    for i, scene in enumerate(scenes + 10 * numbers((60, 8, 8, 3), seed=2)):
        save(f"images/night {i // 30}/{i:02d}.png", scene.round().clip(0, 255).astype(np.uint8))
    for name, shape in (("a", (40, 32)), ("b", (16, 50))):
        save(f"photos/{name}.jpg", numbers(shape, np.uint8))
    tifffile.imwrite("stack.tif", numbers((5, 8, 8), np.uint16), photometric="minisblack", metadata=None)
    exposure("exposures/a.fits", 0)
    names = ("FLUX", "SIGMA", "FLAGS")
    planes = [fits.ImageHDU(np.full((6, 5), name != "FLAGS", np.float32), name=name) for name in names]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto("image.fits")
    Path("volumes").mkdir()
    nibabel.save(nibabel.Nifti1Image(numbers((4, 5, 6), np.int16), AFFINE), "volumes/a.nii.gz")
    np.save("y.npy", numbers((5, 2, 6, 6)))
    np.save("last.npy", numbers((5, 6, 6, 3)))
    arrays = {"y": numbers((5, 2, 9)), "mask": np.ones((5, 1, 9), bool)}
    write_arrays("arrays.h5", {**arrays, "scans/kspace": numbers((5, 2, 6, 6)).astype(np.complex64)})
    write_arrays("store.zarr", arrays)
    frame().assign(age=1, income=2.5, name="x").to_csv("table.csv", index=False)


def test_every_line_of_the_table_of_the_page(here, capsys):
    files_of_the_page()
    rows = [
        row.split("|") for row in PAGE.read_text().splitlines() if row.startswith("| ") and "`diffem import " in row
    ]
    assert len(rows) == 15
    for _, _, command, result, _ in rows:
        argv = command.strip().strip("`").split()[1:]
        assert main([*argv, "--overwrite"]) == 0, capsys.readouterr().err
        shape = result.split("`")[1].strip("()").split(", ")
        assert y().ndim == len(shape)
        assert all(str(size) == letter for size, letter in zip(y().shape, shape, strict=True) if letter.isdigit())
        many = "observation" if len(y()) == 1 else "observations"
        said = capsys.readouterr().out
        assert said.startswith(f"{len(y()):,} {many} of shape {y().shape[1:]}, {y().dtype}, ")
        assert "100.0 % missing" not in said


def test_the_commands_of_the_page(here, capsys):
    files_of_the_page()
    commands = [line.split() for line in PAGE.read_text().splitlines() if line.startswith("    diffem ")]
    assert [command[1] for command in commands] == ["import", "check", "train", "reconstruct"]
    for _, *argv in commands:
        settings = [f"--{key}={value}" for key, value in TINY.items()] if argv[0] == "train" else []
        assert main([*argv, *settings]) == 0, capsys.readouterr()
    names = sorted(path.relative_to("images") for path in Path("images").rglob("*.png"))
    results = {name: np.load(f"cleaned/{name}.npy") for name in ("mean", "std", "draws")}
    results = {
        "mean": results["mean"],
        "std": results["std"],
        **{f"draw-{m + 1}": results["draws"][:, m] for m in (0, 1)},
    }
    for folder, values in results.items():
        assert (
            sorted(path.relative_to(f"cleaned/{folder}") for path in Path(f"cleaned/{folder}").rglob("*.png")) == names
        )
        written = np.stack([np.asarray(Image.open(f"cleaned/{folder}/{name}")) for name in names])
        np.testing.assert_array_equal(written, values.round().clip(0, 255).transpose(0, 2, 3, 1))
    again = [*commands[-1][1:], "--as", "tiff"]
    assert main(again) == 2
    assert (
        capsys.readouterr().err
        == "diffem: diffem reconstruct: --out: cleaned/draws.npy is there already; --overwrite replaces it\n"
    )
    assert main([*again, "--overwrite", "--as", "gif"]) == 2
    assert capsys.readouterr().err == "diffem: --as: must be one of tiff, png, fits, nifti, csv, got gif\n"


def test_what_the_command_line_refuses(here, capsys):
    save("in/a.png", numbers((4, 4), np.uint8))
    for words, line in [
        ("--rate 0.5", "diffem import: --rate: unknown option; arguments of a corruption need --name"),
        ("--range 5 5", "--range: must be LOW HIGH with LOW < HIGH, got 5 5"),
        (
            "--name Mask --nois 1",
            "diffem import: nois: Mask has no such argument; did you mean 'noise'? (known: noise)",
        ),
    ]:
        assert main(["import", "in", "--out", "obs", *words.split()]) == 2
        assert capsys.readouterr().err == f"diffem: {line}\n"
    assert not Path("obs").exists()
    words = ["--axes", "NHWC", "--name", "GaussianNoise"]
    np.save("a.npy", numbers((40, 4, 4, 3), np.float32))
    assert main(["import", "a.npy", "--out", "obs", *words, "--noise", "[0.1, 0.2, 3]"]) == 0
    assert yaml.safe_load(Path("obs/corruption.yaml").read_text())["noise"] == [0.1, 0.2, 3]


def test_memory_does_not_grow_with_the_data(here, monkeypatch):
    """A few blocks are in memory, of a data set of 32."""
    import tracemalloc

    block = 2**19
    monkeypatch.setattr(limits, "BLOCK", block)
    values = np.zeros((32 * block // 4096, 64, 64), np.uint8)
    values[::100] = 7
    np.save("a.npy", values)
    np.savez_compressed("a.npz", values)
    with h5py.File("a.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=(64, 64, 64), compression=1)
    for name in ("a.npy", "a.h5", "a.npz"):
        tracemalloc.start()
        import_files(name, f"obs {name}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * block
        np.testing.assert_array_equal(y(f"obs {name}"), values)
