"""The run folder: its files, written so that a kill at any moment leaves them consistent.

run.json                marks the folder as a run; locked while it runs
config.yaml             the configuration; resuming with another one is refused
checkpoint.safetensors  weights, average, optimiser; the rest of the state is in its header
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
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from diffem import distributed, files
from diffem.errors import DiffemError

MARKER = "run.json"
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
        if not marked and self.folder.exists():
            foreign = [p.name for p in self.folder.iterdir() if "observations" not in p.name and p.suffix != ".tmp"]
            if foreign:
                raise DiffemError(
                    f"{self.folder}: holds {foreign[0]} but no {MARKER}, so it is not a run; use an empty --out"
                )
        self.longer = False  # whether the configuration extends the run that is here
        if marked and (self.folder / "checkpoint.safetensors").exists():
            present = yaml.safe_load(file.read_text())
            changed = _differences(present, config) if isinstance(present, dict) else ["config.yaml"]
            changed = [name for name in changed if not _harmless(name, config)]
            self.longer = bool(changed) and all(_raised(name, present, config) for name in changed)
            if changed and not self.longer:
                raise DiffemError(
                    f"{file}: {changed[0]} differs from this run's, and only {' and '.join(MAY_RISE)} may be raised; "
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
        with (self.folder / MARKER).open("a+") as marker:
            _lock(marker, self.folder)
            if marker.tell() == 0:
                marker.write('{"run": "diffem"}\n')
                marker.flush()
            if not (self.folder / "checkpoint.safetensors").exists():
                self.save_config(first=True)
            yield

    def save_config(self, first: bool = False) -> None:
        """Writes config.yaml, if it differs; with `first`, also discards parts begun with the other configuration."""
        file, content = self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False).encode()
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

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Replaces the checkpoint atomically; `state` is JSON."""
        if not self.writes:
            return
        self._write_tensors("checkpoint.safetensors", tensors, {"diffem": json.dumps(state)})

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None:
        """The tensors and the state, or None if there is no checkpoint yet."""
        file = self.folder / "checkpoint.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stream:
                state = json.loads((stream.metadata() or {})["diffem"])
                return {k: stream.get_tensor(k) for k in stream.keys()}, state  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError):
            raise DiffemError(f"{file}: is truncated or not a checkpoint of diffem; remove it to start again") from None

    def keep_checkpoint(self) -> None:
        """Keeps the present checkpoint for rollbacks."""
        if self.writes:
            files.link(self.folder / "checkpoint.safetensors", self.folder / "good.safetensors")

    def kept_checkpoint(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint for rollbacks."""
        return load_file(self.folder / "good.safetensors")

    def save_metrics(self, rows: list[dict]) -> None:
        """Replaces metrics.jsonl; values that are not finite become null. A resumed run writes the same rows as one
        without interruption."""
        lines = (json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        self.write("metrics.jsonl", "".join(lines).encode())

    def array(self, name: str, shape: tuple[int, ...] | None = None, dtype: DTypeLike = np.float32) -> np.memmap:
        """A memory-mapped array: created if a shape is given, else opened read-only."""
        file = self.folder / f"{name}.npy"
        if shape is None:
            return np.lib.format.open_memmap(file, mode="r")
        return files.make_array(file, shape, dtype)

    # --- parts of a step -----------------------------------------------------------------------------

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The result of `make`, which is saved; after a kill within this step, the saved copy."""
        file = self.folder / "partial" / f"{name}.safetensors"
        if file.exists():
            return load_file(file)
        file.parent.mkdir(exist_ok=True)
        self._write_tensors(f"partial/{file.name}", make(), None)
        return load_file(file)  # same memory layout as after a kill: strides change the rounding of products

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
        if not (file.exists() and done.exists()):
            return self.array(name, shape, dtype), 0
        return np.lib.format.open_memmap(file, mode="r+"), int(json.loads(done.read_text()))

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

    def _write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
        # clones: tensors that share memory cannot be written
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        self.write(name, serialise(tensors, metadata=metadata))


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
    old, new = before[section][field], after[section][field]
    if name == "em.patience":  # 0 never ends a run
        return old != 0 and (new == 0 or new > old)
    return new > old
