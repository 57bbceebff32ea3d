"""The run folder: what a full disk or a kill leaves behind does not stand in the way."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from diffem.cli import main
from diffem.config import Config
from diffem.run import Run


def full(*arguments) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(sys.platform != "linux", reason="counts blocks")
def test_array_takes_its_space_at_once(tmp_path):
    # a write to the map of a file with holes kills the process where the disk is full
    array = Run(tmp_path, Config(), {}).array("next", (1000, 1, 32, 32))
    stat = (tmp_path / "next.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size > 4 * 1000 * 32 * 32
    array[7] = 3
    array.flush()
    assert np.load(tmp_path / "next.npy").sum() == 3 * 32 * 32


def test_full_disk_at_the_first_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            Run(tmp_path / "run", Config(), {})
    assert caught.value.filename == str(tmp_path / "run" / "config.yaml")
    run = Run(tmp_path / "run", Config(), {})
    assert [p.name for p in run.folder.iterdir()] == ["config.yaml"]


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    run = Run(tmp_path, Config(), {})
    run.save_checkpoint({"a": torch.ones(3)}, {"step": 1})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            run.save_checkpoint({"a": torch.zeros(3)}, {"step": 2})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    tensors, state = run.load_checkpoint()
    assert state == {"step": 1}
    assert torch.equal(tensors["a"], torch.ones(3))


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
