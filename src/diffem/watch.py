"""How far a run is, and how long it still takes: seen from the outside, by small files of its folder.

progress.json           while it runs: how far the step is; replaced at most every :data:`EVERY` seconds. It is no part of
                        the result: removed at the end; after an error it says which
metrics.jsonl           the finished iterations
config.yaml             how many there will be
checkpoint.safetensors  its header: the step that is next or unfinished

The time left is estimated from the finished iterations: their time per evaluation of the network (an update counts as
three), times the evaluations that are left, plus the time of scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffem import reading
from diffem.errors import DiffemError

if TYPE_CHECKING:
    from diffem.loop import DiffEM, Progress

FILE = "progress.json"
EVERY = 2.0  # seconds
# of scores, repeated here, since `diffem status` does not load what a run loads; a test compares them
PREDICTIONS, MOST_SPLITS, SPLITS, HELD_OUT = 1024, 8, 2, 0.1
END_SCORES = 4  # at the end: of about three widths, and of the final model


class Watch:
    """Tells the progress of a run: to its callback, with the time left, and to other processes.

    Arguments:
        em: The run.
    """

    def __init__(self, em: DiffEM) -> None:
        self.em, self._written = em, -EVERY

    def __call__(self, progress: Progress) -> None:
        self.em.progress(dataclasses.replace(progress, left=self.left))
        if self.em.run.writes and time.monotonic() - self._written >= EVERY:
            self._write({**dataclasses.asdict(progress), "seconds": self._spent, "time": time.time()})

    @property
    def left(self) -> float | None:
        """An estimate of the seconds that the run still takes; None before the first iteration is finished."""
        state = self.em.state
        return seconds_left(self.em.run.config, state.rows, state.step, state.iteration, state.final, self._spent)

    @property
    def _spent(self) -> float:
        return time.monotonic() - self.em._clock

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Removes the file of an earlier process, and at the end its own; an error is left in it."""
        self._remove()
        try:
            yield
        except Exception as error:
            self._write({"error": " ".join(str(error).split()) or type(error).__name__})
            raise
        except BaseException:  # a signal, or nobody asks for the next row
            self._write({"stopped": True})
            raise
        self._remove()

    def _write(self, content: dict) -> None:
        # not flushed to the disk, and a full disk is no reason to end a run
        file, self._written = self.em.run.folder / FILE, time.monotonic()
        temporary = file.with_name(f"{FILE}.tmp")
        try:
            temporary.write_text(json.dumps(content))
            os.replace(temporary, file)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _remove(self) -> None:
        for name in (FILE, f"{FILE}.tmp"):
            (self.em.run.folder / name).unlink(missing_ok=True)


def seconds_left(
    config: dict, rows: list[dict], step: str, iteration: int, final: int | None, spent: float
) -> float | None:
    """An estimate of the seconds that a run still takes; None before the first iteration is finished.

    Arguments:
        config: Its configuration, as in config.yaml.
        rows: Its metrics so far.
        step: The step that is next or unfinished.
        iteration: Its iteration.
        final: The iteration of the final model, after the last iteration.
        spent: Seconds that this iteration has taken so far.
    """
    trained = [row for row in rows if row["loss"] is not None and "final" not in row]
    if step == "done":
        return 0.0
    if not trained:
        return None
    scores = sum(row["score_seconds"] for row in trained)
    pace = (sum(row["seconds"] for row in trained) - scores) / sum(row["network_evaluations"] for row in trained)
    scores /= len(trained)
    m_step, prior = config["m_step"], config["prior"]
    update = 3 * m_step["batch"] * pace
    draws = [(row["network_evaluations"] - 3 * row["examples"]) * pace for row in trained]
    one = m_step["steps"] * update + draws[-1] + scores
    end = (
        draws[0] + _end_scores(config, trained[0]["score_name"]) * scores
    )  # draws as in the first E-step, of all items
    last = prior["steps"] * update if prior["kind"] == "unconditional" else 0.0
    if step == "prior":
        return max(last - spent, 0.0)
    if final is not None or step == "end":
        return max(end - spent, 0.0) + last
    return max(one - spent, 0.0) + max(config["em"]["iterations"] - iteration, 0) * one + end + last


def _end_scores(config: dict, score_name: str) -> float:
    """How often the time of an iteration's score is the time of the scores at the end."""
    if score_name != "crps":
        return 1.0
    part = max(int(config["facts"]["observations"] * HELD_OUT / 2), 1)
    precise = min(part, PREDICTIONS) * min(max(PREDICTIONS // part, 1), MOST_SPLITS)
    return END_SCORES * precise / (min(part, config["em"]["score_items"]) * SPLITS)


@dataclass(frozen=True)
class Status:
    """What is known about a run from its folder.

    Attributes:
        state: `running`, `finished`, `stopped` (by a signal), `failed` (by an error), `killed`; or `unknown`, if the
            file system has no locks.
        running: Whether a process runs here at this moment; None if that is unknown.
        error: Why it failed.
        step: The step that is next or unfinished; `done` after the last.
        iteration: Its iteration; 0 is the start.
        ending: Whether it follows the last iteration: final draws, their score, and the prior.
        iterations: How many iterations there are at most.
        finished: How many of them are finished.
        done: How far the step is, of `total`: updates or observations; of 0 if that is unknown.
        score_name: What a score is.
        start: The score of the start, and its standard error; on test observations after the end, as `best`.
        best: `iteration`, `score` and `score_se` of the best iteration, or, after the end, of the `final` model.
        seconds_left: An estimate from the finished iterations; None before the first.
        checkpoint_seconds: How long ago the last checkpoint was saved.
    """

    state: str
    running: bool | None
    error: str | None
    step: str
    iteration: int
    ending: bool
    iterations: int
    finished: int
    done: int
    total: int
    score_name: str | None
    start: dict | None
    best: dict | None
    seconds_left: float | None
    checkpoint_seconds: float | None

    def __str__(self) -> str:
        return "\n".join([self.where, *self._lines()])

    def to_dict(self) -> dict:
        """The attributes, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def where(self) -> str:
        """The state and the step, in words."""
        if self.state == "finished":
            early = "" if self.finished >= self.iterations else f" of {self.iterations} (em.patience)"
            return f"finished: {self.finished} iterations{early}"
        place = "the end" if self.ending else f"iteration {self.iteration} of {self.iterations}"
        place = place if self.iteration else "the start"
        unit = {"m_step": "updates", "prior": "updates", "e_step": "observations"}.get(self.step)
        far = ""
        if unit and self.total:
            far = f", {self.done:,} of {self.total:,} {unit} ({self.done / self.total:.0%})"
        return f"{self.state}: {place}, {self.step}{far}"

    def _lines(self) -> Iterator[str]:
        if self.error:
            yield f"error: {self.error}"
        if self.best and self.start:
            which = f"iteration {self.best['iteration']}" if self.best["iteration"] else "the start"
            tested = ", on test observations" if self.best["final"] else ""
            yield f"best: {which}, {self.score_name} {_score(self.best)}; start: {_score(self.start)}{tested}"
        if self.state != "finished":
            left = "time left: not known before the first iteration is finished"
            if self.seconds_left is not None:
                left = f"{time_left(self.seconds_left)}, estimated from the finished iterations"
            yield left
        saved = "none yet" if self.checkpoint_seconds is None else f"{duration(self.checkpoint_seconds)} ago"
        yield f"last checkpoint: {saved}"
        if self.state in ("stopped", "failed", "killed"):
            yield "the command that started it goes on from the last checkpoint"


def _score(of: dict) -> str:
    if of["score"] is None:
        return "not finite"
    return f"{of['score']:.4f}" + ("" if of["score_se"] is None else f" +- {of['score_se']:.4f}")


def status(folder: str | Path) -> Status:
    """How far the run in a folder is. Reads small files only, and does not disturb it.

    Raises:
        DiffemError: If the folder does not hold a run.
    """
    from diffem import safe_yaml

    folder = Path(folder)
    file = folder / "config.yaml"
    if not (folder / "run.json").exists() or marker_of(folder) is None:
        raise DiffemError(f"{folder}: is not a run folder (no run.json of diffem)")
    try:
        config = safe_yaml.read(file)
        iterations = config["em"]["iterations"]
    except (OSError, DiffemError, TypeError, KeyError):
        raise DiffemError(f"{file}: is missing or not the configuration of a run") from None
    try:
        return _status(folder, config, iterations)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DiffemError(f"{folder}: metrics.jsonl, {FILE} or checkpoint.safetensors is damaged ({what})") from None


def _status(folder: Path, config: dict, iterations: int) -> Status:
    active, now, checkpoint = running(folder), time.time(), folder / "checkpoint.safetensors"
    state, told = _header(checkpoint), _json(folder / FILE)
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    iteration, step, spent = state["iteration"], state["step"], state["seconds"]
    total = _updates(config, step, iteration)
    done = state["updates"] if total else 0
    # the start names its own parts; what is told of another step is older than the checkpoint
    if active and told.get("iteration") == iteration and (told["step"] == step or step == "start"):
        step, done, total, spent = told["step"], told["done"], told["total"], told["seconds"] + now - told["time"]
    ended = "failed" if "error" in told else "stopped" if "stopped" in told else "killed"
    best = best_row(rows) if rows else {}
    start = {name: best.get(f"start_{name}", rows[0][name]) for name in ("score", "score_se")} if rows else None
    return Status(
        state="running" if active else "finished" if step == "done" else "unknown" if active is None else ended,
        running=active,
        error=told.get("error"),
        step=step,
        iteration=iteration,
        ending=state["final"] is not None or step in ("end", "prior", "done"),
        iterations=iterations,
        finished=max((row["iteration"] for row in rows if "final" not in row), default=0),
        done=done,
        total=total,
        score_name=best.get("score_name"),
        start=start,
        best=_figures(best) if best else None,
        seconds_left=seconds_left(config, rows, state["step"], iteration, state["final"], spent),
        checkpoint_seconds=max(now - checkpoint.stat().st_mtime, 0.0) if checkpoint.exists() else None,
    )


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row that :attr:`Status.best` holds."""
    return {"iteration": model_of(row), "score": row["score"], "score_se": row["score_se"], "final": "final" in row}


def marker_of(folder: Path) -> dict[str, Any] | None:
    """What run.json says of the run in a folder; None if it is not of diffem."""
    text = reading.read(folder / "run.json")
    try:
        marker = json.loads(text or '{"run": "diffem"}')  # empty: it was killed, or the disk full, at once
    except (ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) and marker.get("run") == "diffem" else None


def best_row(rows: list[dict]) -> dict:
    """The row of the model that a run holds: the last one that was the best. It is that of the final model if the run
    has ended, and at first that of the start."""
    return next((row for row in reversed(rows) if row.get("best")), rows[0])


def model_of(row: dict) -> int:
    """The iteration whose model a row describes. (The row of the final model has a number of its own.)"""
    return row.get("final", row["iteration"])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in a run folder; numbers that are not finite are None."""
    file = folder / "metrics.jsonl"
    try:
        lines = reading.read(file).decode().splitlines(keepends=True)
    except FileNotFoundError:
        raise DiffemError(f"{file}: missing; is {folder} the folder of a run?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DiffemError(f"{file}: cannot be read: {error}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda _: None)  # they would break curves and tables
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith("\n") and rows:
                break  # the run is writing this line now, or was killed while writing it
            raise DiffemError(f"{file}: line {number} is not JSON") from None
        if not isinstance(row, dict) or "score" not in row or not isinstance(row.get("iteration"), int):
            raise DiffemError(f"{file}: line {number} needs at least an `iteration` and a `score`")
        if not isinstance(row.get("final", 0), int):
            raise DiffemError(f"{file}: line {number}: `final` must be the number of an iteration")
        rows.append(row)
    if not rows:
        raise DiffemError(f"{file}: holds no rows; the run has not scored its start yet")
    return rows


def running(folder: Path) -> bool | None:
    """Whether a process has locked the run in a folder; None if the system or the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with reading.regular(folder / "run.json").open() as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment; a run that starts now tries again
        except BlockingIOError:
            return True
        except OSError:
            return None
    return False


def _updates(config: dict, step: str, iteration: int) -> int:
    """The updates of the network that a step takes."""
    if step == "prior":
        return config["prior"]["steps"]
    return config["m_step"]["first_steps" if iteration == 1 else "steps"] if step == "m_step" else 0


NEW = {"step": "start", "iteration": 0, "updates": 0, "final": None, "seconds": 0.0}  # the state of a new run


def _header(file: Path) -> dict[str, Any]:
    """The state of a run, from the header of its checkpoint; before the first one, that of a new run."""
    try:
        with reading.regular(file).open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            state = json.loads(json.loads(stream.read(min(size, reading.LARGEST)))["__metadata__"]["diffem"])
            return {**NEW, **state}
    except FileNotFoundError:
        return NEW
    except (struct.error, ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError):
        raise DiffemError(f"{file}: is truncated or not a checkpoint of diffem") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(reading.read(file))
    except (OSError, ValueError, RecursionError, DiffemError):
        return {}
    return found if isinstance(found, dict) else {}


def time_left(seconds: float) -> str:
    """An estimate of the time that a run still takes, in words."""
    return f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time in words, rounded to two digits or so."""
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
