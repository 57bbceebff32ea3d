"""The run folder: what is on disk, written so that a kill at any moment leaves it whole.

config.yaml             the configuration; resuming with another one is refused
checkpoint.safetensors  weights, EMA, optimiser; the rest of the state in its header
metrics.jsonl           one object per iteration, the start first
reconstructions.npy     row i belongs to observation i; the best iteration
posterior/ prior/       the best models
current.npy             while it runs: the last accepted reconstructions, which train
start/ start.json       the start, for comparison
diagnostics.json        what held-out observations say of the best models: see diffem.diagnostics.diagnose
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from diffem import files
from diffem.config import Config
from diffem.errors import DiffemError


class Run:
    """A run folder.

    Arguments:
        folder: The folder; made if it is not there.
        config: The configuration.
        facts: What else must not change on resume (observations, corruption, scaling).

    Raises:
        DiffemError: If the folder holds a run of another configuration, or something else.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Config, facts: dict) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.yaml"
        wanted = {**config.to_dict(), "facts": facts}
        if file.exists() and (self.folder / "checkpoint.safetensors").exists():
            present = yaml.safe_load(file.read_text())
            changed = _difference(present, wanted) if isinstance(present, dict) else "config.yaml"
            if changed:
                raise DiffemError(
                    f"{file}: {changed} differs from this run's; resume with the same configuration or use another --out"
                )
        else:
            foreign = [p.name for p in self.folder.iterdir() if "observations" not in p.name and p.suffix != ".tmp"]
            if foreign and not file.exists():  # a run that failed before its first checkpoint starts again
                raise DiffemError(
                    f"{self.folder}: holds {foreign[0]} but no config.yaml, so it is not a run; use an empty --out"
                )
            self.write("config.yaml", yaml.safe_dump(wanted, sort_keys=False).encode())

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file atomically."""
        files.replace(self.folder / name, content)

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Replaces the checkpoint atomically; `state` is JSON."""
        # clones: tensors that share memory cannot be written
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        self.write("checkpoint.safetensors", serialise(tensors, metadata={"diffem": json.dumps(state)}))

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

    def save_metrics(self, rows: list[dict]) -> None:
        """Replaces metrics.jsonl; rows after a resume are those of an uninterrupted run."""
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def array(self, name: str, shape: tuple[int, ...] | None = None) -> np.memmap:
        """A memory-mapped float32 array: made if a shape is given, else opened read-only."""
        file = self.folder / f"{name}.npy"
        if shape is None:
            return np.lib.format.open_memmap(file, mode="r")
        return files.make_array(file, shape)


def _difference(a: dict, b: dict, path: str = "") -> str:
    for key in [*a, *(k for k in b if k not in a)]:
        where = f"{path}{key}"
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            if inner := _difference(a[key], b[key], where + "."):
                return inner
        elif a.get(key) != b.get(key):
            return where
    return ""
