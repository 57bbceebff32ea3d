"""Observations: what was measured, the parameters of the operator, and how it can be simulated.

On disk they are a folder that anyone can write with numpy:

    y.npy            observations, (N, *y shape); NaN is allowed where the mask says unobserved
    mask.npy ...     one file per operator parameter, batch first (mask: true = observed, broadcasts against y)
    corruption.yaml  flat: `name: RandomMask`, `rate: 0.75`, `noise: 0.01`, and optionally
                     `range: [low, high]` of the clean data and `shape: [...]` of one clean item
    held_out.npy     optional, (N,) true for the observations that never train, e.g. whole patients, nights or writers;
                     a seeded tenth by default. The first half of them validates, the second half tests
    clean.npy        optional, the clean items; read by evaluation and report only, never by training

Arrays are memory-mapped, so that only the batch in use is in memory.

Units: everything here is in the units of y as stored. Models work on (x - centre) / half, which
:meth:`Observations.scaling` derives from `range` (uint8: 0 to 255), so that data span about [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from diffem import seeding
from diffem.corruptions import BlackBox, Corruption, Params, from_config
from diffem.errors import DiffemError

PARAMETER_FILES = ("mask", "matrix", "kernel")
HELD_OUT = 0.1
LEAST_HELD_OUT = 4  # two validate and two test: one alone has no standard error
CHUNK = 4096


class Observations:
    """N observations with their operator parameters.

    Arguments:
        y: Shape (N, *y shape), any real dtype.
        corruption: How they came about.
        params: Operator parameters, batch first; a mask is true where y was observed.
        range: The (low, high) of clean values; needed for integer data other than uint8, else estimated.
        shape: The shape of one clean item, (features,) or (channels, *spatial); y's own by default.
        source: What error messages call these observations.
        held_out: Which of them are held out, (N,) of bool; a seeded tenth by default.

    Raises:
        DiffemError: If the arrays do not fit each other, or a value that counts as observed is not finite.
    """

    def __init__(
        self,
        y: np.ndarray,
        corruption: Corruption,
        params: Mapping[str, np.ndarray] | None = None,
        range: Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
        source: str = "observations",
        check: bool = True,
        held_out: np.ndarray | None = None,
    ) -> None:
        self.y, self.params, self.corruption, self.source = y, dict(params or {}), corruption, source
        self.held_out = held_out
        if y.ndim < 2 or 0 in y.shape:
            raise DiffemError(
                f"{source}: y.npy: needs at least one observation of shape (features,) or (channels, *spatial), got {y.shape}"
            )
        self.shape = tuple(int(s) for s in (shape or y.shape[1:]))
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
        if check:
            self._check()

    @classmethod
    def load(cls, folder: str | Path, corruption: Corruption | None = None) -> Observations:
        """Memory-maps an observation folder.

        Arguments:
            folder: The folder.
            corruption: Used instead of the one that corruption.yaml names (a black box must be given here).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DiffemError(f"{folder}: no such folder of observations")
        config_file = folder / "corruption.yaml"
        config: dict = {}
        if config_file.exists():
            try:
                config = yaml.safe_load(config_file.read_text()) or {}
            except yaml.YAMLError as error:
                raise DiffemError(f"{config_file}: is not YAML: {str(error).splitlines()[0]}") from None
            if not isinstance(config, dict):
                raise DiffemError(f"{config_file}: must hold `key: value` lines")
        elif corruption is None:
            raise DiffemError(
                f"{config_file}: missing; it says how y came about, e.g. `name: RandomMask`, `rate: 0.75`, `noise: 0.01`"
            )
        value_range, shape = config.pop("range", None), config.pop("shape", None)
        if corruption is None:
            corruption = from_config(config, str(config_file))
        y = open_array(folder / "y.npy")
        params = {
            name: open_array(folder / f"{name}.npy") for name in PARAMETER_FILES if (folder / f"{name}.npy").exists()
        }
        held_out = open_array(folder / "held_out.npy") if (folder / "held_out.npy").exists() else None
        return cls(y, corruption, params, value_range, shape, source=str(folder), held_out=held_out)

    def save(self, folder: str | Path) -> None:
        """Writes the folder; a black box is not written, since data never name code."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in {"y": self.y, **self.params}.items():
            np.save(folder / f"{name}.npy", array)
        if self.held_out is not None:
            np.save(folder / "held_out.npy", self.held_out)
        config: dict = {} if isinstance(self.corruption, BlackBox) else dict(self.corruption.config)
        if self.range is not None:
            config["range"] = list(self.range)
        if self.shape != self.y.shape[1:]:
            config["shape"] = list(self.shape)
        (folder / "corruption.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, indices: Tensor | np.ndarray | Sequence[int]) -> tuple[Tensor, Params]:
        """Observations `indices` as float32 (entries that were not observed are 0) and their parameters."""
        indices = np.asarray(indices)
        y = torch.from_numpy(np.ascontiguousarray(self.y[indices], dtype=np.float32))
        params = {}
        for name, array in self.params.items():
            value = np.ascontiguousarray(array[indices])
            params[name] = torch.from_numpy(value.astype(bool) if name == "mask" else value.astype(np.float32))
        if "mask" in params:
            y = torch.where(params["mask"], y, 0.0)
        return y, params

    def chunks(self, indices: np.ndarray | None = None, size: int = CHUNK) -> Iterator[np.ndarray]:
        """The indices (all by default) in runs of `size`, the last one shorter."""
        indices = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(indices), size):
            yield indices[start : start + size]

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the training, the validation and the test observations, each ascending.

        Validation and test are halves of the held-out observations: of :data:`HELD_OUT` of all, drawn by the seed, or of those
        that the user named, cut in the middle, so that neighbours (one patient, one night) stay together.
        """
        if self.held_out is not None:
            train, held_out = np.flatnonzero(~self.held_out), np.flatnonzero(self.held_out)
        else:
            order = torch.randperm(len(self), generator=seeding.generator(seed, 0, "split")).numpy()
            held = max(LEAST_HELD_OUT, round(HELD_OUT * len(self)))
            if 2 * held > len(self):
                raise DiffemError(
                    f"{self.source}: {len(self)} observation(s) are too few: a tenth, and at least {LEAST_HELD_OUT}, are held out, the rest trains"
                )
            train, held_out = np.sort(order[held:]), order[:held]
        half = len(held_out) // 2
        return train, np.sort(held_out[:half]), np.sort(held_out[half:])

    def scaling(self, train: np.ndarray) -> tuple[float, float]:
        """(centre, half) of the affine map to model units, from the range or else from training observations."""
        if self.range is not None:
            return (self.range[0] + self.range[1]) / 2, (self.range[1] - self.range[0]) / 2
        y, params = self.batch(train[:CHUNK])
        values = y[self.corruption.seen(y, params).expand_as(y)]
        if self.y.shape[1:] == self.shape and "matrix" not in params:
            low, high = np.quantile(values.numpy(), [0.001, 0.999]).tolist()
            if low < high:
                return (low + high) / 2, (high - low) / 2
        return 0.0, 2 * float(values.square().mean().sqrt()) or 1.0

    def unobserved(self) -> list[tuple[int, ...]]:
        """The entries that no observation shows (masks only)."""
        if "mask" not in self.params:
            return []
        ever = np.zeros(self.params["mask"].shape[1:], dtype=bool)
        for i in self.chunks():
            ever |= np.asarray(self.params["mask"][i], dtype=bool).any(0)
            if ever.all():
                return []
        return [tuple(int(v) for v in index) for index in np.argwhere(~ever)]

    def digest(self) -> str:
        """A checksum of a sample of the observations: a resumed run must see the ones it began with."""
        rows = np.unique(np.linspace(0, len(self) - 1, 256).astype(int))
        digest = hashlib.sha256()
        held_out = [] if self.held_out is None else [self.held_out]
        for array in (self.y, *(self.params[k] for k in sorted(self.params)), *held_out):
            digest.update(np.ascontiguousarray(array[rows]).tobytes())
        return digest.hexdigest()[:16]

    def _check(self) -> None:
        if self.held_out is not None:
            fits = self.held_out.dtype == bool and self.held_out.shape == (len(self),)
            if not fits or not LEAST_HELD_OUT <= self.held_out.sum() < len(self):
                raise DiffemError(
                    f"{self.source}: held_out.npy: must be {len(self)} of bool, at least {LEAST_HELD_OUT} of them true and one false, "
                    f"got shape {self.held_out.shape} of {self.held_out.dtype} with {np.count_nonzero(self.held_out)} true"
                )
        for name, array in self.params.items():
            if len(array) != len(self):
                raise DiffemError(f"{self.source}: {name}.npy: has {len(array)} rows where y.npy has {len(self)}")
        if isinstance(self.corruption, BlackBox) and self.params:
            name = next(iter(self.params))
            raise DiffemError(f"{self.source}: {name}.npy: a black box has no parameters of its own; remove the file")
        if "mask" in self.params:
            shape = self.params["mask"].shape
            try:
                fits = np.broadcast_shapes(shape, self.y.shape) == self.y.shape
            except ValueError:
                fits = False
            if not fits:
                raise DiffemError(
                    f"{self.source}: mask.npy: shape {shape} does not broadcast against y's {self.y.shape}"
                )
        elif self.corruption.config["name"] == "RandomMask":
            raise DiffemError(
                f"{self.source}: mask.npy: missing; RandomMask needs to know which entries were observed (true = observed)"
            )
        if self.corruption.config["name"] == "RandomProjection":
            if "matrix" not in self.params:
                raise DiffemError(
                    f"{self.source}: matrix.npy: missing; RandomProjection needs one matrix (rows, features) per observation"
                )
            matrix = self.params["matrix"]
            if matrix.ndim != 3 or self.y.ndim != 2 or matrix.shape[:2] != self.y.shape:
                raise DiffemError(
                    f"{self.source}: matrix.npy: shape {matrix.shape} does not fit y's {self.y.shape}; it must be (N, rows, features)"
                )
            self.shape = (int(matrix.shape[2]),)
        if self.y.dtype.kind == "f":
            for i in self.chunks():
                y, _params = self.batch(i)
                bad = ~torch.isfinite(y)
                if bad.any():
                    where = tuple(bad.nonzero()[0].tolist())
                    index = (int(i[where[0]]), *where[1:])
                    raise DiffemError(
                        f"{self.source}: y.npy: entry {list(index)} is not finite although it counts as observed; mask it or remove it"
                    )


def evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, from everywhere: data come sorted by writer, place, or time."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]


def _is_range(value: object) -> bool:
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 2:
        return False
    return all(isinstance(v, int | float | np.number) for v in value) and bool(value[0] < value[1])


def open_array(file: Path) -> np.ndarray:
    if not file.exists():
        raise DiffemError(f"{file}: missing")
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DiffemError(f"{file}: is not a complete .npy array: {str(error).splitlines()[0]}") from None
