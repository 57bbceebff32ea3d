"""The run folder: its files, written so that a kill at any moment leaves them consistent.

run.json                marks the folder as a run; locked while it runs
config.yaml             the configuration; resuming with another one is refused
checkpoint.safetensors  weights, average, optimiser, scores of the selection; the rest of the state is in its header
previous.safetensors    while it runs: the checkpoint before, from which a run goes on if that one is damaged
metrics.jsonl           one object per iteration, the start first
reconstructions.npy     of the best iteration; row i belongs to observation i
prior.json              steps, time and loss of the training of the prior
pictures.npz *.png report.html   the report and its contents
observations/           observations that a benchmark preset made
posterior/ prior/       the best models
start/ start.json       the start, for comparison
diagnostics.json        diagnostics of the best models on held-out observations: see diffem.diagnostics.diagnose
progress.json           while it runs: how far the step is, see diffem.watch
current.npy             while it runs: the last accepted reconstructions, on which the M-step trains
good.safetensors        while it runs: the weights for a rollback, if a value is not finite
next.npy partial/       while it runs: the finished part of an unfinished step
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from torch import Tensor

from diffem import __version__, distributed, files, reading, safe_yaml, tensors
from diffem.errors import DiffemError
from diffem.watch import marker_of

LOG = logging.getLogger("diffem")
MARKER = "run.json"
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "previous.safetensors"
PARTS = ("partial", "posterior", "prior", "start")  # folders that a run writes
MAY_RISE = ("em.iterations", "em.patience")


class Run:
    """A run folder.

    Arguments:
        folder: The folder. Nothing is written before :meth:`open`.
        config: The configuration, as config.yaml holds it.

    Raises:
        DiffemError: If the folder holds a run of another configuration, or something else.
    """

    def __init__(self, folder: str | os.PathLike[str], config: dict) -> None:
        self.folder, self.config = Path(folder), config
        marked, file = (self.folder / MARKER).exists(), self.folder / "config.yaml"
        version = self._made_by() if marked else None
        if not marked and self.folder.exists():
            foreign = [p.name for p in self.folder.iterdir() if "observations" not in p.name and p.suffix != ".tmp"]
            if foreign:
                raise DiffemError(
                    f"{self.folder}: holds {foreign[0]} but no {MARKER}, so it is not a run; use an empty --out"
                )
        self.longer = False  # whether the configuration extends the run that is here
        if marked and (self.folder / CHECKPOINT).exists():
            present = safe_yaml.read(file)
            if not isinstance(present, dict):
                raise DiffemError(f"{file}: is damaged; it should hold the settings of this run")
            changed = _differences(present, config)
            changed = [name for name in changed if not _harmless(name, config)]
            self.longer = bool(changed) and all(_raised(name, present, config) for name in changed)
            if changed and not self.longer:
                raise DiffemError(
                    f"{file}: {changed[0]} differs from this run's{_of_version(version)}, and only {' and '.join(MAY_RISE)} may be raised; "
                    f"another run can go on from this one: --out OTHER --start.kind run --start.run {self.folder}"
                )

    @property
    def writes(self) -> bool:
        """Whether this process writes to the folder; the others only read."""
        return distributed.first()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Claims the folder for this run, and keeps other processes out.

        Raises:
            DiffemError: If another process runs here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / MARKER, *(self.folder / name for name in PARTS)):
            if path.is_symlink():
                raise DiffemError(f"{path}: is a link to {os.readlink(path)}; a run writes into its own folder only")
        with (self.folder / MARKER).open("a+") as marker:
            _lock(marker, self.folder)
            if marker.tell() == 0:
                marker.write(json.dumps({"run": "diffem", "version": __version__}) + "\n")
                marker.flush()
            for folder in (self.folder, *(self.folder / name for name in PARTS)):
                files.remove_temporaries(folder)
            if not (self.folder / CHECKPOINT).exists():
                self.save_config(first=True)
            yield

    def save_config(self, first: bool = False) -> None:
        """Writes config.yaml, if it differs; with `first`, also discards parts begun with the other configuration."""
        file, content = self.folder / "config.yaml", safe_yaml.dump(self.config)
        if not file.exists() or file.read_bytes() != content:
            if first:
                self.forget_parts()
            self.write("config.yaml", content)

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file atomically."""
        if self.writes:
            files.replace(self.folder / name, content)

    def remove(self, *names: str) -> None:
        """Removes files that are there."""
        for name in names if self.writes else ():
            (self.folder / name).unlink(missing_ok=True)

    def save_checkpoint(self, weights: dict[str, Tensor], state: dict) -> None:
        """Replaces the checkpoint atomically, and keeps the one before it; `state` is JSON."""
        if not self.writes:
            return
        text = json.dumps({"version": __version__, **state})
        tensors.save(self.folder / CHECKPOINT, weights, text, keep=self.folder / PREVIOUS)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None:
        """The tensors and the state, or None if there is no checkpoint yet. If it is damaged, the one before it takes
        its place."""
        file, previous = self.folder / CHECKPOINT, self.folder / PREVIOUS
        if not file.exists():
            return None
        try:
            return _checkpoint(file)
        except tensors.Damaged as error:
            try:
                found = _checkpoint(previous)
            except (FileNotFoundError, tensors.Damaged):
                raise DiffemError(f"{error}; no earlier one is left: remove it to start again") from None
            os.replace(previous, file)
            LOG.warning("%s; the run goes on from the checkpoint before it", error)
            return found

    def forget_previous(self) -> None:
        """Removes the checkpoint before the present one, when files are changed that going back would need."""
        (self.folder / PREVIOUS).unlink(missing_ok=True)

    def keep_checkpoint(self) -> None:
        """Keeps the present checkpoint for rollbacks."""
        if self.writes:
            files.link(self.folder / CHECKPOINT, self.folder / "good.safetensors")

    def kept_checkpoint(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint for rollbacks."""
        return tensors.load(self.folder / "good.safetensors")[0]

    def save_metrics(self, rows: list[dict]) -> None:
        """Replaces metrics.jsonl; values that are not finite become null. A resumed run writes the same rows as one
        without interruption."""
        lines = (json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        self.write("metrics.jsonl", "".join(lines).encode())

    def array(self, name: str, shape: tuple[int, ...] | None = None, dtype: DTypeLike = np.float32) -> np.memmap:
        """A memory-mapped array: created if a shape is given, else opened read-only."""
        file = self.folder / f"{name}.npy"
        if shape is None:
            return files.open_array(file)
        return files.make_array(file, shape, dtype)

    def present(self, name: str, shape: tuple[int, ...]) -> np.memmap:
        """An array that must have this shape, opened read-only."""
        array = self.array(name)
        if array.shape != shape:
            raise DiffemError(f"{array.filename}: is damaged: its shape is {array.shape} instead of {shape}")
        return array

    # --- parts of a step -----------------------------------------------------------------------------

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The result of `make`, which is saved; after a kill within this step, the saved copy."""
        file = self.folder / "partial" / f"{name}.safetensors"
        with contextlib.suppress(FileNotFoundError, tensors.Damaged):
            return tensors.load(file)[0]
        file.parent.mkdir(exist_ok=True)
        tensors.save(file, make())
        return tensors.load(file)[0]  # same memory layout as after a kill: strides change the rounding of products

    def growing(
        self, name: str, shape: tuple[int, ...], iteration: int, dtype: DTypeLike = np.float32
    ) -> tuple[np.memmap | None, int]:
        """An array that an iteration fills row by row, and how many rows are filled already; None for processes that
        do not write."""
        if not self.writes:
            return None, distributed.shared(int)
        array, done = self._growing(name, shape, iteration, dtype)
        return array, distributed.shared(lambda: done)

    def _growing(self, name: str, shape: tuple[int, ...], iteration: int, dtype: DTypeLike) -> tuple[np.memmap, int]:
        file, done = self.folder / f"{name}.npy", self.folder / "partial" / f"{iteration}-{name}.json"
        with contextlib.suppress(FileNotFoundError, DiffemError, ValueError):  # or damaged: it begins again
            rows = json.loads(reading.read(done))
            if isinstance(rows, int) and rows <= shape[0] and not file.is_symlink():
                array = files.open_array(file, "r+")
                if array.shape == shape and array.dtype == dtype:
                    return array, rows
        return self.array(name, shape, dtype), 0

    def grown(self, name: str, array: np.memmap | None, rows: int, iteration: int) -> None:
        """Records that the first `rows` rows of a growing array are filled."""
        if array is None:
            return
        array.flush()  # before the record is written
        (self.folder / "partial").mkdir(exist_ok=True)
        self.write(f"partial/{iteration}-{name}.json", json.dumps(rows).encode())

    def forget_parts(self) -> None:
        """Removes partial results, when a step is finished."""
        if self.writes:
            shutil.rmtree(self.folder / "partial", ignore_errors=True)

    def _made_by(self) -> str | None:
        """The version of diffem that began this run; None if it was not noted.

        Raises:
            DiffemError: If the marker is that of another program.
        """
        if (marker := marker_of(self.folder)) is not None:
            return marker.get("version")
        raise DiffemError(
            f'{self.folder / MARKER}: is not of diffem; use an empty --out, or write {{"run": "diffem"}} into it'
        )


def read_config(folder: Path) -> dict[str, dict]:
    """The configuration in a run folder; its `facts` are what the run noted about its observations."""
    file = folder / "config.yaml"
    if (folder / "config.json").exists():
        raise DiffemError(f"{folder}: is a saved model; name the run, {folder.parent}")
    if not file.exists():
        raise DiffemError(f"{folder}: is not a run folder (no config.yaml)")
    config = safe_yaml.read(file)
    sections = [config.get("em"), config.get("facts")] if isinstance(config, dict) else []
    if not sections or not all(isinstance(section, dict) for section in sections):
        raise DiffemError(f"{file}: is damaged; it should hold the sections `em` and `facts`")
    if not isinstance(config["em"].get("seed"), int):
        raise DiffemError(f"{file}: em.seed: must be a whole number, got {str(config['em'].get('seed'))[:20]}")
    return config


def _checkpoint(file: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the state in a checkpoint."""
    found, text = tensors.load(file)
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise tensors.Damaged(f"{file}: is damaged: it holds no state of a run")
    return found, state


def _of_version(version: object) -> str:
    """Words for a run that another version of diffem began."""
    return "" if version in (None, __version__) else f" (diffem {version} made it, this is {__version__})"


def _lock(stream, folder: Path) -> None:
    """Locks the file until it is closed, or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    for last in (False, True):
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if last:
                raise DiffemError(f"{folder}: another process runs here; wait for it, or use another --out") from None
            time.sleep(0.1)  # `diffem status` looks at the lock for a moment
        except OSError:  # a file system without locks
            return None


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(a: dict, b: dict, path: str = "") -> list[str]:
    """The settings in which two configurations differ, as section.field."""
    found = []
    for key in [*a, *(k for k in b if k not in a)]:
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            found += _differences(a[key], b[key], f"{path}{key}.")
        elif a.get(key) != b.get(key):
            found.append(f"{path}{key}")
    return found


def _harmless(name: str, config: dict) -> bool:
    """Whether a setting changes nothing but rounding: micro-batches, if the network draws no random numbers; or the
    path of the observations, since a checksum ensures that they are the same."""
    own, dropout = config.get("facts", {}).get("own_network"), config.get("network", {}).get("dropout")
    return name == "facts.source" or (name == "m_step.micro_batch" and not own and not dropout)


def _raised(name: str, before: dict, after: dict) -> bool:
    """Whether a setting only makes a run longer."""
    if name not in MAY_RISE:
        return False
    section, field = name.split(".")
    old, new = before[section].get(field), after[section][field]
    if not isinstance(old, int):
        return False
    if name == "em.patience":  # 0 never ends a run
        return old != 0 and (new == 0 or new > old)
    return new > old
