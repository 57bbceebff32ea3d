"""The numbers of every iteration for TensorBoard or trackio (extra `tracking`): a hook that reads and changes nothing of a run.

Both write into the run folder, under the names of metrics.jsonl; nothing leaves the machine:

    tensorboard --logdir RUN/tensorboard
    TRACKIO_DIR=RUN/trackio trackio show
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffem.errors import DiffemError, missing, suggest

if TYPE_CHECKING:
    from diffem.loop import DiffEM, Hook

Write = Callable[["DiffEM", int, dict[str, float]], object]


def track(tracker: str, out: str | os.PathLike[str]) -> Hook:
    """A hook that writes the numbers of every iteration for a tracker.

    Arguments:
        tracker: `tensorboard` or `trackio`.
        out: The run folder; they are written into its folder of the tracker's name.

    Raises:
        DiffemError: If the tracker is not installed, or another name.
    """
    if tracker not in TRACKERS:
        raise DiffemError(f"track: unknown tracker {tracker!r};{suggest(tracker, TRACKERS)}")
    if importlib.util.find_spec(tracker) is None:
        raise missing(tracker, "tracking")
    write = TRACKERS[tracker](Path(out) / tracker)

    def hook(em: DiffEM, row: dict) -> None:
        write(em, row["iteration"], numbers(row))

    return hook


def numbers(row: dict, prefix: str = "") -> dict[str, float]:
    """The finite numbers in a row of metrics; those of inner dictionaries are named OUTER/INNER."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[prefix + name] = float(value)
    return found


def _tensorboard(folder: Path) -> Write:
    writers: list[Any] = []

    def write(em: DiffEM, iteration: int, values: dict[str, float]) -> None:
        if not writers:  # what a killed process wrote of this iteration, or an earlier run of later ones, is hidden
            kind = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            writers.append(kind(str(folder), purge_step=iteration))
        for name, value in values.items():
            writers[0].add_scalar(name, value, iteration)
        writers[0].flush()

    return write


def _trackio(folder: Path) -> Write:
    runs: list[Any] = []

    def write(em: DiffEM, iteration: int, values: dict[str, float]) -> None:
        if not runs:
            os.environ["TRACKIO_DIR"] = str(folder.resolve())  # read once, when trackio is imported
            trackio = importlib.import_module("trackio")
            runs.append(
                trackio.init(project="diffem", name=em.run.folder.resolve().name, config=em.run.config, resume="allow")
            )
        runs[0].log(values, step=iteration)
        if "final" in values:  # the last row
            runs.pop().finish()

    return write


TRACKERS: dict[str, Callable[[Path], Write]] = {"tensorboard": _tensorboard, "trackio": _trackio}
