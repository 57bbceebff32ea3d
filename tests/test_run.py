"""The run folder: what a full disk or a kill leaves behind does not stand in the way."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
import yaml

from diffem import __version__
from diffem.cli import main
from diffem.errors import DiffemError
from diffem.run import Run

CONFIG = {"em": {"seed": 3, "iterations": 2}, "facts": {"observations": 7}}


def full(*arguments) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(sys.platform != "linux", reason="counts blocks")
def test_array_takes_its_space_at_once(tmp_path):
    # a write to the map of a file with holes kills the process where the disk is full
    array = Run(tmp_path, {}).array("next", (1000, 1, 32, 32))
    stat = (tmp_path / "next.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size > 4 * 1000 * 32 * 32
    array[7] = 3
    array.flush()
    assert np.load(tmp_path / "next.npy").sum() == 3 * 32 * 32


def test_full_disk_at_the_first_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught, Run(tmp_path / "run", CONFIG).open():
            pass
    assert caught.value.filename == str(tmp_path / "run" / "config.yaml")
    run = Run(tmp_path / "run", CONFIG)
    with run.open():
        assert sorted(p.name for p in run.folder.iterdir()) == ["config.yaml", "run.json"]
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == CONFIG


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    run = Run(tmp_path, CONFIG)
    run.save_checkpoint({"a": torch.ones(3)}, {"step": 1})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            run.save_checkpoint({"a": torch.zeros(3)}, {"step": 2})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    tensors, state = run.load_checkpoint()
    assert state == {"version": __version__, "step": 1}
    assert torch.equal(tensors["a"], torch.ones(3))


def test_nothing_is_written_before_it_is_opened(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()
    with run.open():
        pass
    before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    again = Run(
        tmp_path / "run", {**CONFIG, "em": {"seed": 4}}
    )  # it failed before its first checkpoint: it starts again
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == before
    with again.open():
        assert yaml.safe_load((run.folder / "config.yaml").read_text())["em"] == {"seed": 4}


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("of another program")
    with pytest.raises(DiffemError) as caught:
        Run(tmp_path, CONFIG)
    assert str(caught.value) == (
        f"{tmp_path}: holds config.yaml but no run.json, so it is not a run; use an empty --out"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_another_configuration_is_refused(tmp_path):
    run = Run(tmp_path, CONFIG)
    with run.open():
        run.save_checkpoint({"a": torch.ones(3)}, {"step": 1})
    with pytest.raises(DiffemError) as caught:
        Run(tmp_path, {**CONFIG, "em": {**CONFIG["em"], "seed": 77}})
    assert str(caught.value) == (
        f"{tmp_path / 'config.yaml'}: em.seed differs from this run's, and only em.iterations and em.patience may be raised; "
        f"another run can go on from this one: --out OTHER --start.kind run --start.run {tmp_path}"
    )
    with Run(tmp_path, CONFIG).open():
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_one_run_at_a_time(tmp_path):
    with Run(tmp_path, CONFIG).open():
        second = Run(tmp_path, CONFIG)
        with pytest.raises(DiffemError) as caught, second.open():
            pass
        assert str(caught.value) == f"{tmp_path}: another process runs here; wait for it, or use another --out"
    with second.open():  # it is over
        pass


def test_parts_of_a_step_are_made_once(tmp_path):
    run = Run(tmp_path, CONFIG)
    calls = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"a": torch.full((3,), float(len(calls)))}

    with run.open():
        assert [run.once("2-score", make)["a"].tolist() for _ in range(2)] == [[1.0] * 3] * 2
        run.forget_parts()
        assert run.once("2-score", make)["a"].tolist() == [2.0] * 3
        run.forget_parts()
        run.forget_parts()


def test_a_growing_array_goes_on_where_it_was_in_its_iteration(tmp_path):
    run = Run(tmp_path, CONFIG)
    with run.open():
        array, done = run.growing("next", (5, 2), 3)
        assert done == 0
        array[:2] = 7
        run.grown("next", array, 2, 3)
        array[3] = 9  # written, but nothing says so
        again, done = run.growing("next", (5, 2), 3)
        assert done == 2
        assert (again[:2] == 7).all()
        assert run.growing("next", (5, 2), 4)[1] == 0  # of another iteration


def test_killed_while_it_made_observations(tmp_path):
    leftover = tmp_path / "run" / ".observations.0123abcd"  # as datasets.corrupt names its work
    (leftover / "parts").mkdir(parents=True)
    np.save(leftover / "parts" / "y.npy", np.zeros(3))
    settings = ["--data.limit", "40", "--em.iterations", "0", "--network.kind", "mlp", "--network.width", "8"]
    argv = [
        "train",
        "digits",
        "--out",
        str(tmp_path / "run"),
        "--allow-unobserved",
        "--start.iterations",
        "2",
        *settings,
    ]
    assert main(argv) == 0
