"""Observations: the measured data, the parameters of the operator, and the corruption that simulates it.

On disk they are a folder that can be written with numpy:

    y.npy            observations, (N, *y shape); NaN only where the mask is false; without a mask, NaN = unobserved
    mask.npy ...     one file per operator parameter, batch first (mask: true = observed, broadcasts against y), or of
                     length 1 for all; new observations take their parameters from its rows. No other .npy may lie here
    corruption.yaml  flat: `name: Mask`, `noise: 0.01`, and optionally
                     `range: [low, high]` of the clean data and `shape: [...]` of one clean item;
                     `clip: true`: items are clamped to that range before a black box is called;
                     `formula: true`: parameters of new observations are drawn by the corruption's formula (`rate`);
                     `axes: NHWC`: the layout of y, of mask and noise, and of clean items, see layout.py;
                     `patch: 64` or `patch: [32, 64, 64]`: large items are read as patches of that size
    held_out.npy     optional, (N,), true for observations that never train, e.g. whole patients, nights or writers; by
                     default a seeded tenth. The first half of them is for validation, the second half for testing
    clean.npy        optional, the clean items, and labels.npy, their classes; never read by training, only by
                     evaluation and report

Arrays are memory-mapped, so that only the batch in use is in memory.

Units: everything here is in the units of y as stored. Models work in model units, (x - centre) / half, in which data
span about [-1, 1]: see :class:`Dataset`. :meth:`Observations.units` derives them from `range` (uint8: 0 to 255) or from
the data.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from diffem import files, memory, safe_yaml, seeding
from diffem.corruptions import REGISTRY, BlackBox, Corruption, Observed, Params, from_config
from diffem.corruptions.base import LARGEST_ITEM
from diffem.errors import DiffemError
from diffem.files import open_array
from diffem.units import Units

from .layout import LIKE_Y, Layout, Seen
from .patches import Grid, Patches

NO_PARAMETERS = ("y", "clean", "labels", "held_out")  # files of an observation folder
NO_ARGUMENTS = (
    "range",
    "shape",
    "clip",
    "formula",
    "axes",
    "patch",
)  # keys of corruption.yaml that are not arguments of the corruption
HELD_OUT = 0.1
LEAST_HELD_OUT = 4  # two for validation and two for testing: one alone has no standard error
CHUNK = 4096
AT_ONCE = 64  # rows that are read from a file before its pages are given back
NUMBERS = 2**22  # number of values from which model units are estimated
WHOLE = 20  # with at least this many images, whole images are held out instead of patches
FAR = 20.0  # outliers more than this many interquartile ranges beyond the quartiles do not widen the range


class Observations:
    """N observations with their operator parameters.

    Arguments:
        y: Shape (N, *y shape), any real dtype.
        corruption: The corruption by which they were made.
        params: Operator parameters, batch first; a mask is true where y was observed.
        range: The (low, high) of clean values; required for integer data other than uint8, else estimated.
        shape: The shape of one clean item, (features,) or (channels, *spatial); that of y by default.
        source: The name of these observations in error messages.
        held_out: Which observations are held out, (N,) of bool; a seeded tenth by default.
        formula: Parameters of new observations are drawn by the corruption's formula, not taken from `params`.
        axes: The layout of y, of mask and noise, and of items, e.g. `NHWC`; see :class:`Layout`.
        patch: The size of patches, one number for each spatial axis or one for all; see :class:`Grid`. Each patch is
            then an observation. Only for corruptions in which an entry of y depends on the same entry of x only.

    Attributes:
        y, params: In the layout of models: real numbers (N, features) or (N, channels, *spatial).
        shape: The shape of an item in the layout of models.
        stored: y and the parameters as they were given.
        layout: The layout in which y was given.
        item_layout: The layout of items that users give and get.
        images: These observations before they were cut into patches.
        grid: The places of the patches in an image; None for whole images. Patches are ordered image by image.

    Raises:
        DiffemError: If the arrays do not fit each other, or an observed value is not finite.
    """

    def __init__(
        self,
        y: np.ndarray,
        corruption: Corruption,
        params: Mapping[str, np.ndarray] | None = None,
        range: Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
        source: str = "observations",
        held_out: np.ndarray | None = None,
        formula: bool = False,
        axes: str | None = None,
        patch: int | Sequence[int] | None = None,
    ) -> None:
        if not isinstance(corruption, Corruption):
            raise DiffemError(f"{source}: corruption: must be a corruption, e.g. Mask(0.1), got {corruption!r}")
        if not isinstance(params, Mapping | None):
            raise DiffemError(
                f'{source}: params: must be named arrays, e.g. {{"mask": mask}}, got {type(params).__name__}'
            )
        y = y if isinstance(y, np.ndarray) else np.asarray(y)
        params = {k: v if isinstance(v, np.ndarray) else np.asarray(v) for k, v in (params or {}).items()}
        self.stored = y, *params.values()
        self.corruption, self.source = corruption, source
        self.held_out, self.formula, self.axes = held_out, formula, axes
        if y.ndim < 2 or 0 in y.shape:
            raise DiffemError(
                f"{source}: y.npy: needs at least one observation of shape (features,) or (channels, *spatial), got {y.shape}"
            )
        if y.dtype.kind not in "biufc":
            kind = {"M": "dates", "m": "time spans"}.get(y.dtype.kind, "text or objects")
            raise DiffemError(f"{source}: y.npy: holds {kind} ({y.dtype}); give numbers")
        try:
            self.layout = Layout.of(y.shape, axes, y.dtype.kind == "c")
        except DiffemError as error:
            raise DiffemError(f"{source}: {error}") from None
        self.y = _seen(y, self.layout)
        self.params = {k: _parameter(self, k, v) for k, v in params.items()}
        shape = _shape(shape or (), source)
        if shape and len(shape) + 1 == len(self.layout.axes):
            shape = self.layout.shape(shape)
        self.shape = shape or tuple(self.y.shape[1:])
        if range is None and y.dtype == np.uint8:
            range = (0, 255)
        if range is None and y.dtype.kind in "iub":
            raise DiffemError(
                f"{source}: y.npy: holds {y.dtype} but no range is stated; add e.g. `range: [0, 4095]` to corruption.yaml"
            )
        if range is not None and not _is_range(range):
            got = list(range) if isinstance(range, tuple | np.ndarray) else range
            raise DiffemError(f"{source}: range: must be [low, high] with low < high, got {got!r}")
        self.range = None if range is None else (float(range[0]), float(range[1]))
        _refuse_mistakes(self)
        self.item_layout = self.layout.of_items(self.shape, self.layout.complex and corruption.complex_items)
        self.images: Observations = self
        self.grid: Grid | None = None
        if patch is not None:
            _cut(self, patch)

    @classmethod
    def load(cls, folder: str | Path, corruption: Corruption | type[Corruption] | None = None) -> Observations:
        """Memory-maps an observation folder.

        Arguments:
            folder: The folder.
            corruption: Used instead of the one that corruption.yaml names (a black box must be given here); or a class,
                whose arguments are taken from corruption.yaml.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DiffemError(f"{folder}: no such folder of observations")
        config_file = folder / "corruption.yaml"
        config = read_mapping(config_file)
        if not config_file.exists() and corruption is None:
            raise DiffemError(f"{config_file}: missing; it says how y came about, e.g. `name: Mask`, `noise: 0.01`")
        value_range, shape, clip = config.pop("range", None), config.pop("shape", None), config.pop("clip", False)
        formula, axes, patch = config.pop("formula", False), config.pop("axes", None), config.pop("patch", None)
        if not isinstance(formula, bool):
            raise DiffemError(f"{config_file}: formula: must be true or false, got {formula!r}")
        if isinstance(corruption, type):
            config, corruption = {"name": corruption.__name__, **config}, None
        if corruption is None:
            corruption = _stated(config, str(config_file))
        elif isinstance(corruption, BlackBox) and config:
            name = next(iter(config))
            raise DiffemError(f"{config_file}: {name}: is not used beside --corruption {corruption.path}; take it out")
        if clip is not False:
            corruption = _clipped(corruption, value_range, clip, str(config_file))
        y = open_array(folder / "y.npy")
        names = [file.stem for file in sorted(folder.glob("*.npy")) if file.stem not in NO_PARAMETERS]
        params = {name: open_array(folder / f"{name}.npy") for name in names}
        held_out = open_array(folder / "held_out.npy") if (folder / "held_out.npy").exists() else None
        return cls(y, corruption, params, value_range, shape, str(folder), held_out, formula, axes, patch)

    def save(self, folder: str | Path) -> None:
        """Writes the folder, without the corruption if it is not registered, since data never name code."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in {"y": self.images.y, **self.images.params}.items():
            if not isinstance(array, NotNaN):  # NaN in y says the same
                np.save(folder / f"{name}.npy", getattr(array, "array", array))
        if self.held_out is not None:
            np.save(folder / "held_out.npy", self.held_out)
        config: dict[str, Any] = dict(self.corruption.config)
        if config["name"] not in REGISTRY:
            config = {"clip": True} if "clip" in config else {}
        if self.range is not None:
            config["range"] = list(self.range)
        if self.shape != self.y.shape[1:]:
            config["shape"] = list(self.item_layout.users(self.shape))
        if self.grid is not None:
            config["patch"] = list(self.grid.patch)
        if self.axes is not None:
            config["axes"] = self.axes
        if self.formula:
            config["formula"] = True
        files.replace(folder / "corruption.yaml", safe_yaml.dump(config))

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, indices: Tensor | np.ndarray | Sequence[int]) -> Observed:
        """Observations `indices` as float32 (unobserved entries are 0) and their parameters."""
        indices = np.asarray(indices)
        y, params = read_rows(self, self.y, indices, np.float32), self.parameters(indices)
        if "mask" in params:
            y = torch.where(params["mask"], y, 0.0)
        return y, params

    def parameters(self, indices: np.ndarray) -> Params:
        """The parameters of observations `indices`: a mask as bool, all others as float32."""
        return {k: read_rows(self, v, indices, bool if k == "mask" else np.float32) for k, v in self.params.items()}

    def cut(self, items: np.ndarray) -> np.ndarray:
        """Cuts an array of items, one per image, into patches like these observations; returns other arrays
        unchanged."""
        of = self.images
        if self.grid is None or tuple(items.shape) != (len(of), *of.item_layout.users(of.shape)):
            return items
        return cast(np.ndarray, Patches(items, self.grid, self.item_layout))

    def chunks(self, indices: np.ndarray | None = None, size: int = CHUNK) -> Iterator[np.ndarray]:
        """The indices (all by default) in chunks of `size`, fewer if items are large; the last may be shorter."""
        indices = np.arange(len(self)) if indices is None else indices
        size = memory.at_once(math.prod(self.y.shape[1:]), size)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
            files.release(*self.stored)

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the training, the validation and the test observations, each ascending.

        Validation and test are halves of the held-out observations: a fraction :data:`HELD_OUT` of all, drawn by the
        seed, or those the user named, cut in the middle so that neighbours (one patient, one night) stay together. With
        :data:`WHOLE` or more images, patches are held out by image; else one by one, leaving out those that overlap.
        """
        return _split(self, seed)

    def units(self, train: np.ndarray) -> Units:
        """Model units: from the range if it is stated, else estimated from the training observations; separately for
        each channel (column) if channels are observed separately."""
        return _units(self, train)

    def rehearse(self, units: Units) -> None:
        """Tries the corruption on items in the middle of the range: see :meth:`Corruption.rehearse`."""
        x = units.restore(torch.zeros(2, *self.shape))
        self.corruption.rehearse(tuple(self.y.shape[1:]), x, self.parameters(np.arange(2)))

    def digest(self) -> str:
        """A checksum of a sample of the observations, by which a resumed run verifies that they are unchanged."""
        rows = np.unique(np.linspace(0, len(self) - 1, 256).astype(int))
        digest = hashlib.sha256()
        for array in (self.y, *(self.params[k] for k in sorted(self.params))):
            for some in self.chunks(rows, AT_ONCE):
                digest.update(np.ascontiguousarray(array[some]).tobytes())
        if self.held_out is not None:
            digest.update(np.ascontiguousarray(self.held_out).tobytes())
        return digest.hexdigest()[:16]


def read_rows(of: Observations, array: np.ndarray, rows: np.ndarray, dtype: DTypeLike) -> Tensor:
    """Rows of y or of a parameter, a few at a time: to read one, the system may map two megabytes of its file."""
    found = np.empty((len(rows), *array.shape[1:]), dtype)
    for begin in range(0, len(rows), AT_ONCE):
        some = slice(begin, begin + AT_ONCE)
        found[some] = array[rows[some]]
        files.release(*of.stored)
    return torch.from_numpy(found)


def unobserved(of: Observations) -> list[tuple[int, ...]]:
    """The entries that no observation shows (masks only)."""
    if "mask" not in of.params:
        return []
    ever = np.zeros(of.params["mask"].shape[1:], dtype=bool)
    for i in of.chunks():
        ever |= np.asarray(of.params["mask"][i], dtype=bool).any(0)
        if ever.all():
            return []
    return [tuple(int(v) for v in index) for index in np.argwhere(~ever)]


def refuse_unobserved(of: Observations) -> None:
    """Raises a DiffemError if some entry is never observed."""
    if missing := unobserved(of):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DiffemError(
            f"{of.source}: mask.npy: no observation shows entry {list(missing[0])}{more}, so it cannot be learned; "
            "--allow-unobserved goes on"
        )


def _middle(values: np.ndarray) -> tuple[float, float]:
    """The centre and the half-width of the range of values, without the outermost thousandths and outliers."""
    if not len(values):
        return 0.0, 1.0
    low, first, third, high = np.quantile(values, [0.001, 0.25, 0.75, 0.999]).tolist()
    if first < third:  # a few values a thousand times larger must not compress all others
        low, high = max(low, first - FAR * (third - first)), min(high, third + FAR * (third - first))
    return ((low + high) / 2, (high - low) / 2) if low < high else (low, 1.0)


def evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spaced, since data are often sorted by writer, place, or time."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]


def read_mapping(file: Path) -> dict:
    """The mapping in a YAML file; empty if there is no file."""
    try:
        config = safe_yaml.read(file) or {}
    except FileNotFoundError:
        return {}
    if not isinstance(config, dict):
        raise DiffemError(f"{file}: must hold `key: value` lines")
    return config


def _seen(array: np.ndarray, layout: Layout) -> np.ndarray:
    """An array that has the layout of y, converted to that of models."""
    return array if layout.trivial else cast(np.ndarray, Seen(array, layout))


def _parameter(of: Observations, name: str, array: np.ndarray) -> np.ndarray:
    """A parameter in the layout of models, one row for each observation."""
    known, named = of.corruption.parameters, of.corruption.config["name"]
    if known is not None and name not in known:
        takes = f"takes {', '.join(f'{k}.npy' for k in known)}" if known else "takes no parameters"
        other = of.corruption.instead.get(name)
        hint = f"; `name: {other}` takes it" if other else ""
        hint = "; write it as f(x, params)" if named == "BlackBox" else hint
        raise DiffemError(f"{of.source}: {name}.npy: {named} {takes}{hint}; put other files elsewhere")
    if array.ndim and len(array) == 1 < len(of):  # one for all
        array = np.broadcast_to(array, (len(of), *array.shape[1:]))
    if array.dtype.kind not in "biufc":
        raise DiffemError(f"{of.source}: {name}.npy: holds {array.dtype}, not numbers")
    rows = len(array) if array.ndim else 0
    if rows != len(of):
        raise DiffemError(
            f"{of.source}: {name}.npy: has {rows} rows where y.npy has {len(of)}; the first axis is that of the observations, of length 1 if it is one for all"
        )
    if name in LIKE_Y and array.ndim == 1:  # one number for each observation
        return array.reshape(-1, *(1,) * (of.y.ndim - 1))
    return _seen(array, of.layout) if of.layout.like_y(name, array) else array


def _cut(of: Observations, patch: int | Sequence[int]) -> None:
    """Cuts observations into patches, in place."""
    if not of.corruption.by_entry:
        raise DiffemError(
            f"{of.source}: patch: {of.corruption.config['name']} makes an entry of y of several of x, so that it cannot be cut; leave patch out"
        )
    try:
        of.images, of.grid = copy.copy(of), Grid(of.shape[1:], patch)
    except DiffemError as error:
        raise DiffemError(f"{of.source}: {error}") from None
    of.images.images = of.images
    of.y = cast(np.ndarray, Patches(of.y, of.grid))
    of.params = {k: cast(np.ndarray, Patches(v, of.grid)) for k, v in of.params.items()}
    of.shape = (of.shape[0], *of.grid.patch)


def _split(of: Observations, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grid, images = of.grid, len(of.images)
    if grid is not None and (of.held_out is not None or images >= WHOLE):
        train, validation, test = (grid.rows(part) for part in of.images.split(seed))
        return train, validation, test
    if of.held_out is not None:
        train, held_out = np.flatnonzero(~of.held_out), np.flatnonzero(of.held_out)
    else:
        order = torch.randperm(len(of), generator=seeding.generator(seed, 0, "split")).numpy()
        held = max(LEAST_HELD_OUT, round(HELD_OUT * len(of)))
        if 2 * held > len(of):
            raise DiffemError(
                f"{of.source}: {len(of)} observation(s) are too few: a tenth, and at least {LEAST_HELD_OUT}, are held out, the rest trains"
            )
        train, held_out = np.sort(order[held:]), order[:held]
    half = len(held_out) // 2
    validation, test = np.sort(held_out[:half]), np.sort(held_out[half:])
    if grid is not None:
        test = test[~grid.touched(validation, images)[test]]
        train = train[~grid.touched(held_out, images)[train]]
        if min(len(train), len(test)) < 2:
            raise DiffemError(f"{of.source}: patch: {list(grid.patch)}: too few that do not overlap; use a smaller one")
    return train, validation, test


def _units(of: Observations, train: np.ndarray) -> Units:
    if of.range is not None:
        return Units((of.range[0] + of.range[1]) / 2, (of.range[1] - of.range[0]) / 2)
    numbers = math.prod(of.y.shape[1:])
    y, params = of.batch(evenly(train, memory.at_once(numbers, max(CHUNK, NUMBERS // numbers))))
    seen = of.corruption.seen(y, params).expand_as(y)
    known = of.corruption.linear or of.y.shape[1:] == of.shape
    if not known or not of.corruption.same_units or of.layout.complex:
        return Units(0.0, 2 * float(y[seen].square().mean().sqrt()) or 1.0)
    gain = _gain(of)
    if of.shape[0] == 1 or not of.corruption.apart(of.shape):
        centre, half = _middle(y[seen].numpy())
        return Units(centre / gain, half / abs(gain))
    found = np.array([_middle(y[:, c][seen[:, c]].numpy()) for c in range(of.shape[0])])
    centre, half = found.T.reshape(2, -1, *(1,) * (len(of.shape) - 1))
    return Units(centre / gain, half / abs(gain))


def _gain(of: Observations) -> float:
    """The value that A makes of items of value 1: not 1 for kernels or weights of another sum."""
    if not of.corruption.linear:
        return 1.0
    params = of.parameters(np.arange(1))
    y = of.corruption.forward(torch.ones(1, *of.shape), params)
    gain = float(y[of.corruption.seen(y, params).expand_as(y)].median()) if y.any() else 0.0
    return gain if abs(gain - 1) > 1e-3 and gain else 1.0


def _refuse_mistakes(observations: Observations) -> None:
    """Refuses arrays that do not fit each other, and observed values that are not finite."""
    if observations.held_out is not None:
        fits = observations.held_out.dtype == bool and observations.held_out.shape == (len(observations),)
        if not fits or not LEAST_HELD_OUT <= observations.held_out.sum() < len(observations):
            raise DiffemError(
                f"{observations.source}: held_out.npy: must be {len(observations)} of bool, at least {LEAST_HELD_OUT} of them true and one false, "
                f"got shape {observations.held_out.shape} of {observations.held_out.dtype} with {np.count_nonzero(observations.held_out)} true"
            )
    known, whole = observations.corruption.parameters, _is_finite(observations)
    if not whole and "mask" not in observations.params and known is not None and "mask" in known:
        _mask_of_nan(observations)
    try:
        observations.shape = observations.corruption.check(observations.y, observations.params, observations.shape)
    except DiffemError as error:
        raise DiffemError(f"{observations.source}: {error}") from None
    if "mask" in observations.params and observations.params["mask"].dtype != bool:
        for i in observations.chunks():
            part = np.asarray(observations.params["mask"][i])
            if not (right := (part == 0) | (part == 1)).all():
                value = part[~right][0]
                raise DiffemError(
                    f"{observations.source}: mask.npy: holds {value:g}; a mask is true or 1 where y was observed, else false or 0"
                )
    if "noise" in observations.params and observations.corruption.linear:
        for i in observations.chunks():
            part = np.asarray(observations.params["noise"][i])
            if not (np.isfinite(part) & (part >= 0)).all():
                value = part[~(np.isfinite(part) & (part >= 0))][0]
                raise DiffemError(f"{observations.source}: noise.npy: holds {value:g}; a standard deviation is >= 0")
    if not whole:
        for i in observations.chunks():
            y, _params = observations.batch(i)
            bad = ~torch.isfinite(y)
            if bad.any():
                where = tuple(bad.nonzero()[0].tolist())
                index = (int(i[where[0]]), *where[1:])
                raise DiffemError(
                    f"{observations.source}: y.npy: entry {list(index)} is not finite although it counts as observed; mask it or remove it"
                )


def _is_finite(observations: Observations) -> bool:
    """Whether all values of y are finite, observed or not."""
    if observations.y.dtype.kind != "f":
        return True
    return all(np.isfinite(observations.y[i]).all() for i in observations.chunks())


class NotNaN:
    """A mask that is computed when it is indexed: true where y is not NaN.

    Arguments:
        y: Observations (N, *y shape).
    """

    dtype = np.dtype(bool)

    def __init__(self, y: np.ndarray) -> None:
        self.y, self.shape, self.ndim = y, y.shape, y.ndim

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return ~np.isnan(self.y[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or bool)


def _mask_of_nan(observations: Observations) -> None:
    """Adds a mask derived from NaN, if y holds any."""
    if any(np.isnan(observations.y[i]).any() for i in observations.chunks()):
        observations.params["mask"] = NotNaN(observations.y)  # type: ignore[assignment]


def _clipped(corruption: Corruption, value_range: Any, clip: object, source: str) -> BlackBox:
    if clip is not True or not _is_range(value_range) or not isinstance(corruption, BlackBox):
        raise DiffemError(f"{source}: clip: must be true, beside a `range: [low, high]`, and is for black boxes")
    low, high = value_range
    return BlackBox(corruption.function, corruption.path, (float(low), float(high)))


def _stated(config: dict, source: str) -> Corruption:
    """The corruption of corruption.yaml, which errors name."""
    try:
        return from_config(config, source)
    except DiffemError as error:
        raise DiffemError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from None


def _shape(value: object, source: str) -> tuple[int, ...]:
    """The shape of an item, of at most :data:`LARGEST_ITEM` numbers."""
    if isinstance(value, Sequence) and all(isinstance(v, int | np.integer) and v >= 1 for v in value):
        shape = tuple(map(int, value))
        if math.prod(shape) <= LARGEST_ITEM:
            return shape
    raise DiffemError(f"{source}: shape: must be that of one clean item, e.g. [1, 28, 28], got {value!r}")


def _is_range(value: object) -> bool:
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 2:
        return False
    largest = float(np.finfo(np.float32).max)  # of Python, since numpy compares no larger whole numbers
    numbers = all(isinstance(v, int | float | np.number) and abs(v) <= largest for v in value)
    return numbers and bool(value[0] < value[1])
