"""Trackers: they get every number of every row, and the run does not notice. Stand-ins take the place of the packages."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from test_em import bare, make, observations, settings, train

import diffem
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.tracking import numbers


def stand_in(monkeypatch, name: str, **contents) -> ModuleType:
    """A module of that name, instead of a package that may or may not be installed."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Writer:
    """In the place of SummaryWriter: written values, as a log that hides what `purge_step` purges."""

    written: list[tuple[str, str, float, int]] = []  # noqa: RUF012
    flushed = 0

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder = folder
        Writer.written = [value for value in Writer.written if value[3] < purge_step]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        Writer.written.append((self.folder, name, value, step))

    def flush(self) -> None:
        Writer.flushed = len(Writer.written)


@pytest.fixture
def tensorboard(monkeypatch):
    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    monkeypatch.setattr(Writer, "written", [])


def test_numbers_are_the_finite_ones_by_name():
    row = {"iteration": 3, "best": True, "loss": None, "score": 0.5, "ratio": float("nan"), "score_name": "crps"}
    assert numbers({**row, "clean": {"psnr": 20, "deep": {"a": 1}}}) == {
        "iteration": 3.0,
        "best": 1.0,
        "score": 0.5,
        "clean/psnr": 20.0,
        "clean/deep/a": 1.0,
    }


def test_tensorboard_gets_the_rows_and_a_resumed_run_repeats_none(tmp_path, tensorboard):
    out = tmp_path / "run"

    def run(until: int) -> None:
        hooks = [lambda em, row: {"clean": {"psnr": row["iteration"] + 0.5}}, diffem.track("tensorboard", out)]
        em = make(out)
        em.hooks = hooks
        for row in em.iterate():
            if row["iteration"] == until:
                return

    run(2)
    assert Writer.flushed == len(Writer.written)
    run(9)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = {(name, value, row["iteration"]) for row in rows for name, value in numbers(row).items()}
    assert {value[1:] for value in Writer.written} == expected
    assert len(Writer.written) == len(expected)  # once each
    assert {value[0] for value in Writer.written} == {str(out / "tensorboard")}
    assert ("clean/psnr", 2.5, 2) in expected
    train(tmp_path / "alone")
    for row in (more := bare(out)):
        del row["clean"]
    assert more == bare(tmp_path / "alone")


def test_trackio_gets_the_rows_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    log: list = []

    class Run:
        def log(self, values: dict, step: int) -> None:
            log.append((step, values))

        def finish(self) -> None:
            log.append("finished")

    def init(**arguments) -> Run:
        log.append((arguments, os.environ["TRACKIO_DIR"]))
        return Run()

    stand_in(monkeypatch, "trackio", init=init)
    out = tmp_path / "run"
    em = DiffEM(settings(em={"iterations": 1}), observations(), out, hooks=[diffem.track("trackio", out)])
    rows = list(em.iterate())
    (arguments, folder), *values, last = log
    assert folder == str(out / "trackio")
    assert arguments == {"project": "diffem", "name": "run", "config": em.run.config, "resume": "allow"}
    assert values == [(row["iteration"], numbers(row)) for row in rows]
    assert last == "finished"


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_missing_package_is_named_before_the_run(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DiffemError) as caught:
        diffem.track(name, tmp_path / "run")
    assert str(caught.value) == f"{name} is not installed: pip install 'diffem-torch[tracking]'"
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(DiffemError) as caught:
        diffem.track("tensorbord", tmp_path)
    assert str(caught.value) == (
        "track: unknown tracker 'tensorbord'; did you mean 'tensorboard'? (known: tensorboard, trackio)"
    )


def test_the_real_tensorboard_if_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    em = make(tmp_path, em={"iterations": 1})
    em.hooks = [diffem.track("tensorboard", tmp_path)]
    rows = list(em.iterate())
    log = EventAccumulator(str(Path(tmp_path) / "tensorboard"))
    log.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in log.Scalars("score")] == [
        (row["iteration"], row["score"]) for row in rows
    ]
