"""What may happen to a run: signals, full disks, shares that vanish, clocks that jump, damaged files, other versions.

benchmarks/chaos.py ends a run at hundreds of random moments.
"""

from __future__ import annotations

import builtins
import errno
import itertools
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_em
import torch
from safetensors.torch import save_file

from diffem import __version__, cli, files, judging, safe_yaml, starts, tensors
from diffem.cli.train import until_stopped
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.errors import DiffemError, Stopped
from diffem.loop import Progress, rest
from diffem.run import Run
from diffem.samplers import DiffusionSampler

SMALL = {"em": {"iterations": 1, "guard": True}, "m_step": {"first_steps": 4}, "prior": {"steps": 3}}


def make(out: Path) -> DiffEM:
    return test_em.make(out, **SMALL)


def finish(out: Path) -> DiffEM:
    em = make(out)
    for _row in em.iterate():
        pass
    return em


def assert_same(out: Path, whole: Path) -> None:
    test_em.assert_same(out, whole)
    assert test_em.bare(out) == test_em.bare(whole)
    names = lambda folder: sorted(p.relative_to(folder) for p in folder.rglob("*"))  # noqa: E731
    assert names(out) == names(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("safety") / "whole"
    finish(out)
    return out


def flip(file: Path, share: float) -> None:
    """Flips a bit of a file, which is no longer a second name of another one."""
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    file.unlink()
    file.write_bytes(content)


def truncate(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: int(share * len(content))])


# --- damaged files -----------------------------------------------------------------------------------


def stopped_at(out: Path, step: str, updates: int = 0, iteration: int | None = None) -> None:
    """A run that died right after the checkpoint from which this step begins, or that follows some updates."""
    em = make(out)
    save = em.run.save_checkpoint

    def save_and_die(weights: dict, state: dict) -> None:
        save(weights, state)
        if (state["step"], state["updates"]) == (step, updates) and iteration in (None, state["iteration"]):
            raise KeyboardInterrupt

    em.run.save_checkpoint = save_and_die
    with pytest.raises(KeyboardInterrupt):
        list(em.iterate())


MOMENTS = [("m_step", 0), ("m_step", 3), ("e_step", 4), ("judge", 4), ("end", 0), ("prior", 0), ("prior", 2)]


@pytest.mark.parametrize(("step", "updates"), MOMENTS)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(step, updates, whole, tmp_path, caplog):
    stopped_at(tmp_path, step, updates)
    file = tmp_path / "checkpoint.safetensors"
    (truncate if updates == 3 else flip)(file, 0.8)
    with caplog.at_level(logging.WARNING, "diffem"):
        finish(tmp_path)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{file}: is damaged: ")
    assert caplog.messages[0].endswith("; the run goes on from the checkpoint before it")
    assert_same(tmp_path, whole)


def test_no_checkpoint_is_left(tmp_path):
    stopped_at(tmp_path, "m_step", 3)
    file = tmp_path / "checkpoint.safetensors"
    flip(file, 0.5)
    flip(tmp_path / "previous.safetensors", 0.5)
    with pytest.raises(DiffemError) as caught:
        finish(tmp_path)
    assert str(caught.value) == (
        f"{file}: is damaged: its checksum is another one; no earlier one is left: remove it to start again"
    )
    file.unlink()  # as it says
    assert finish(tmp_path).rows[-1]["final"] is not None


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    run = Run(tmp_path, {})
    run.save_checkpoint({"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bool)}, {"step": "m_step"})
    file = tmp_path / "checkpoint.safetensors"
    content = file.read_bytes()
    wanted = tensors.load(file)
    for place, bit in itertools.product(range(len(content)), (1, 32)):
        changed = bytearray(content)
        changed[place] ^= bit
        file.write_bytes(changed)
        try:
            found, text = tensors.load(file)
        except tensors.Damaged:
            continue
        assert text == wanted[1]
        assert found.keys() == wanted[0].keys()
        assert all(torch.equal(found[k], wanted[0][k]) for k in found)


def test_a_checksum_takes_a_second_a_gigabyte():
    weights = {str(k): torch.ones(2**22) for k in range(4)}  # 64 MB
    began = time.process_time()
    tensors.checksum(weights)
    assert time.process_time() - began < 0.5


def test_a_checkpoint_of_before_there_were_checksums_is_read(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "checkpoint.safetensors", {"diffem": '{"step": "m_step"}'})
    found = Run(tmp_path / "other", {})
    found.folder = tmp_path
    assert found.load_checkpoint()[1] == {"step": "m_step"}


def test_damaged_parts_are_made_again(whole, tmp_path):
    """Half of an E-step, as a kill leaves it; then the file is truncated."""
    stopped_at(tmp_path, "e_step", 4)
    em = make(tmp_path)
    em.progress = lambda at: test_em.die_softly() if at == Progress("e_step", 1, 48, 60) else None
    with pytest.raises(KeyboardInterrupt):
        list(em.iterate())
    assert (tmp_path / "partial" / "1-next.json").read_text() == "32"
    truncate(tmp_path / "next.npy", 0.5)
    finish(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("content", [b"", b"60 observations", b"[1]", b'"60"', b"1e999", b"\xff"])
def test_a_damaged_note_of_rows_begins_again(content, tmp_path):
    run = Run(tmp_path, {})
    with run.open():
        run.grown("next", run.array("next", (5, 2)), 2, 3)
        (tmp_path / "partial" / "3-next.json").write_bytes(content)
        assert run.growing("next", (5, 2), 3)[1] == 0


@pytest.mark.parametrize("damage", [lambda file: flip(file, 0.9), lambda file: truncate(file, 0.3)])
def test_a_damaged_part_of_a_score_is_made_again(damage, tmp_path):
    run = Run(tmp_path, {})
    with run.open():
        run.once("score", lambda: {"a": torch.ones(3)})
        damage(tmp_path / "partial" / "score.safetensors")
        assert run.once("score", lambda: {"a": torch.zeros(3)})["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_damaged_reconstructions_are_named(share, tmp_path):
    stopped_at(tmp_path, "m_step", 3)
    truncate(tmp_path / "current.npy", share)
    with pytest.raises(DiffemError, match=r"current\.npy: is not a complete \.npy array: "):
        finish(tmp_path)


def test_reconstructions_of_another_shape_are_named(tmp_path):
    stopped_at(tmp_path, "m_step", 3)
    (tmp_path / "current.npy").unlink()
    np.save(tmp_path / "current.npy", np.zeros((60, 4, 4, 1), "f"))
    with pytest.raises(
        DiffemError, match=r"current\.npy: is damaged: its shape is \(60, 4, 4, 1\) instead of \(60, 1,"
    ):
        finish(tmp_path)


@pytest.mark.parametrize("folder", ["start", "posterior"])
def test_a_damaged_model_is_named(folder, tmp_path):
    stopped_at(tmp_path, "end" if folder == "posterior" else "m_step")
    file = tmp_path / folder / "model.safetensors"
    flip(file, 0.9)
    with pytest.raises(DiffemError) as caught:
        finish(tmp_path)
    assert str(caught.value) == f"{file}: is damaged: its checksum is another one"


def test_metrics_are_written_again_from_the_checkpoint(whole, tmp_path):
    stopped_at(tmp_path, "end")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\x00")
    finish(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("config.yaml", b"em: [", "is not YAML: "),
        ("config.yaml", b"\xff", "is not YAML: it is not text in UTF-8"),
        ("config.yaml", b"", "is damaged; it should hold the settings of this run"),
        ("config.yaml", b"em: {iterations: many}", "em.iterations differs from this run's"),
        ("run.json", b"{", "is not of diffem; use an empty --out"),
        ("run.json", b'{"run": "another"}', "is not of diffem; use an empty --out"),
        ("run.json", b"[" * 10**5, "is not of diffem; use an empty --out"),
    ],
)
def test_damaged_settings_are_named(name, content, text, tmp_path):
    stopped_at(tmp_path, "m_step")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DiffemError) as caught:
        make(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert text in str(caught.value)
    assert (tmp_path / name).read_bytes() == content


# --- other versions ----------------------------------------------------------------------------------


def test_files_say_which_version_wrote_them(whole):
    assert json.loads((whole / "run.json").read_text()) == {"run": "diffem", "version": __version__}
    assert json.loads((whole / "posterior" / "config.json").read_text())["version"] == __version__
    assert json.loads(tensors.load(whole / "checkpoint.safetensors")[1])["version"] == __version__


def old(change: Callable[[dict, dict], object]) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        weights, text = tensors.load(out / "checkpoint.safetensors")
        state = {**json.loads(text), "version": "0.0.3"}
        change(weights, state)
        tensors.save(out / "checkpoint.safetensors", weights, json.dumps(state))

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda weights, state: state.update(epoch=3),
        lambda weights, state: weights.pop("updates"),
        lambda weights, state: weights.pop(next(k for k in weights if k.startswith("network."))),
        lambda weights, state: weights.update({"average.other": torch.ones(3)}),
        lambda weights, state: state["selection"].pop("stale"),
    ],
)
def test_a_checkpoint_of_a_version_that_cannot_be_read(change, tmp_path):
    stopped_at(tmp_path, "m_step")
    old(change)(tmp_path)
    with pytest.raises(DiffemError) as caught:
        finish(tmp_path)
    text = str(caught.value)
    assert text.startswith(
        f"{tmp_path / 'checkpoint.safetensors'}: was saved by diffem 0.0.3, which {__version__} cannot read; another run "
        f"can go on from this one: --out OTHER --start.kind run --start.run {tmp_path}"
    )
    assert "\n" not in text


def test_a_checkpoint_of_another_version_that_can_be_read_goes_on(whole, tmp_path):
    stopped_at(tmp_path, "m_step", 3)
    old(lambda weights, state: None)(tmp_path)
    finish(tmp_path)
    assert_same(tmp_path, whole)


def test_settings_of_another_version(tmp_path):
    stopped_at(tmp_path, "m_step")
    (tmp_path / "run.json").write_text('{"run": "diffem", "version": "0.0.3"}')
    config = safe_yaml.read(tmp_path / "config.yaml")
    config["em"]["seeds"] = config["em"].pop("seed")
    (tmp_path / "config.yaml").write_bytes(safe_yaml.dump(config))
    with pytest.raises(DiffemError) as caught:
        make(tmp_path)
    assert f" differs from this run's (diffem 0.0.3 made it, this is {__version__}), and only" in str(caught.value)


# --- signals -----------------------------------------------------------------------------------------


class Ended(Exception):
    """What a test raises in place of work that would take hours."""


def terminated(em: DiffEM) -> dict:
    """Runs until a signal ends the run; returns the state of its checkpoint, {} if there is none."""
    with pytest.raises(Stopped) as caught:
        list(until_stopped(em))
    assert caught.value.signal == signal.SIGTERM
    file = em.run.folder / "checkpoint.safetensors"
    return json.loads(tensors.load(file)[1]) if file.exists() else {}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def then_fail(monkeypatch, thing: object, name: str, when: Callable[..., bool]) -> None:
    """The first call for which `when` holds is the moment of the signal, and nothing comes after it."""
    right = getattr(thing, name)

    def call(*given, **named):
        if when(*given):
            terminate()
            raise Ended
        return right(*given, **named)

    monkeypatch.setattr(thing, name, call)


@pytest.mark.parametrize("step", ["m_step", "prior"])
def test_a_signal_in_the_middle_of_an_update_saves_this_update(step, whole, tmp_path):
    em = test_em.make(tmp_path, **SMALL)
    em.checkpoint_minutes = 1e9
    simulate = em.examples.simulate

    def signalled(x, generator):
        if (em.state.step, em.state.updates) == (step, 1):
            terminate()
        return simulate(x, generator)

    em.examples.simulate = signalled
    state = terminated(em)
    assert (state["step"], state["updates"]) == (step, 2)
    finish(tmp_path)
    assert_same(tmp_path, whole)


def test_a_signal_in_the_middle_of_a_batch_of_draws_saves_the_batches_before(whole, tmp_path, monkeypatch):
    em = make(tmp_path)
    em.checkpoint_minutes = 1e9
    batches = []
    with monkeypatch.context() as patch:
        now = lambda *_given: em.state.step == "e_step" and (batches.append(1), len(batches) == 3)[1]  # noqa: E731
        then_fail(patch, DiffusionSampler, "draw", now)
        assert terminated(em)["step"] == "e_step"
    assert (tmp_path / "partial" / "1-next.json").read_text() == "32"
    seen: list[Progress] = []
    em = make(tmp_path)
    em.progress = seen.append
    list(em.iterate())
    assert [p.done for p in seen if (p.step, p.iteration) == ("e_step", 1)] == [48, 60]
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("where", ["start", "score", "end", "commit"])
def test_a_signal_ends_the_other_steps_at_once(where, whole, tmp_path, monkeypatch):
    em = make(tmp_path)
    with monkeypatch.context() as patch:
        if where == "start":
            then_fail(patch, starts, "converge", lambda *_given: True)
        elif where == "commit":
            then_fail(patch, files, "link", lambda source, target: target.name == "reconstructions.npy")
        else:
            kind = {"score": "judge", "end": "end"}[where]
            then_fail(patch, judging, "score", lambda *_given: em.state.step == kind)
        state = terminated(em)
    assert state.get("step") == {"start": None, "score": "judge", "end": "end", "commit": "commit"}[where]
    finish(tmp_path)
    assert_same(tmp_path, whole)


def test_a_signal_while_a_checkpoint_is_written_lets_it_be_written(whole, tmp_path, monkeypatch):
    em, fsync, seen = make(tmp_path), os.fsync, []

    def signalled(number: int) -> None:
        if em.state.step == "judge" and not seen:
            seen.append(1)
            terminate()
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", signalled)
        assert terminated(em)["step"] == "judge"  # not the E-step's
    finish(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_run_at_once(second, status, tmp_path):
    em = make(tmp_path)

    def signalled(x, generator):  # in an update, which one signal would let finish
        terminate()
        os.kill(os.getpid(), second)
        os._exit(77)

    em.examples.simulate = signalled
    process = os.fork()
    if not process:
        try:
            list(until_stopped(em))
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(78)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == status


def test_the_exit_status_is_documented(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "143 or 130 stopped by a signal" in capsys.readouterr().out


# --- full disks, and shares that vanish ----------------------------------------------------------------


class Faults:
    """Makes the n-th operation on a file fail; counts the operations."""

    def __init__(self, monkeypatch, number: int, last: int = 0) -> None:
        self.count, self.last, self.number = 0, last, number
        for module, name in (
            (builtins, "open"),
            (os, "fsync"),
            (os, "replace"),
            (os, "link"),
            (os, "posix_fallocate"),
            (np.memmap, "flush"),
            (shutil, "copyfile"),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, self.watched(getattr(module, name), module is builtins))

    def watched(self, function: Callable, opens: bool) -> Callable:
        def call(*given, **named):
            if opens and ("safety" not in str(given[0]) or str(given[0]).endswith(".py")):
                return function(*given, **named)  # of Python itself
            self.count += 1
            if self.count >= self.last > 0:  # and from then on: a disk stays full
                raise OSError(self.number, os.strerror(self.number), None)
            return function(*given, **named)

        return call


@pytest.fixture(scope="module")
def operations(tmp_path_factory) -> int:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, errno.ENOSPC)
        finish(tmp_path_factory.mktemp("safety") / "counted")
    assert faults.count > 100
    return faults.count


@pytest.mark.parametrize(
    ("number", "share"),
    [(errno.ENOSPC, share) for share in (0.0, 0.3, 0.7)]
    + [(errno.EIO, 0.5), (errno.ESTALE, 0.2), (errno.ESTALE, 0.6), (errno.ENOENT, 0.9)],
)
def test_a_disk_that_fails(number, share, operations, whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("safety") / "run"
    last = 1 + int((operations - 1) * share)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, number, last)
        with pytest.raises(OSError, match=os.strerror(number)):
            finish(out)
    assert not list(out.rglob("*.tmp"))
    finish(out)
    assert_same(out, whole)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_an_error_of_the_file_system_is_one_line(number, tmp_path, capsys, monkeypatch):
    def fail(*_given, **_named):
        raise OSError(number, os.strerror(number), "run/current.npy")

    monkeypatch.setattr(Observations, "load", fail)
    assert cli.main(["train", "--observations", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"diffem: run/current.npy: {os.strerror(number)}\n"


# --- clocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [-3, 3])
def test_a_clock_that_jumps_changes_no_result_and_gives_no_negative_seconds(days, whole, tmp_path, monkeypatch):
    offset, true, wall = [0.0], time.monotonic, time.time
    monkeypatch.setattr(time, "monotonic", lambda: true() + offset[0])
    monkeypatch.setattr(time, "time", lambda: wall() + offset[0])
    em = make(tmp_path)

    def jump(progress: Progress) -> None:
        offset[0] += 86400.0 * days

    em.progress = jump
    list(em.iterate())
    assert_same(tmp_path, whole)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["seconds"] >= 0 and row["score_seconds"] >= 0 for row in rows)
    assert json.loads((tmp_path / "prior.json").read_text())["seconds"] >= 0


def test_a_clock_that_was_set_back_does_not_put_off_checkpoints(tmp_path, monkeypatch):
    em = make(tmp_path)
    em.checkpoint_minutes, em._saved = 5.0, time.monotonic()
    saved = []
    rest(em, lambda: saved.append(1))
    assert not saved
    em._saved += 86400
    rest(em, lambda: saved.append(1))
    assert saved == [1]


# --- several processes in one folder ---------------------------------------------------------------------


def test_two_that_write_the_same_file_do_not_mix(tmp_path, monkeypatch):
    """While one writes a file, another one begins and ends; then the first goes on."""
    fsync, file = os.fsync, tmp_path / "diagnostics.json"

    def another(number: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        files.replace(file, b"two")
        assert file.read_bytes() == b"two"
        fsync(number)

    monkeypatch.setattr(os, "fsync", another)
    files.replace(file, b"one, which is longer")
    assert file.read_bytes() == b"one, which is longer"
    assert [p.name for p in tmp_path.iterdir()] == ["diagnostics.json"]


@pytest.mark.parametrize("command", ["report", "diagnose"])
def test_nothing_is_written_into_a_folder_that_is_no_run(command, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "other")
    (tmp_path / "other" / "run.json").unlink()
    (tmp_path / "other" / "report.html").write_text("mine")
    assert cli.main([command, str(tmp_path / "other")]) == 2
    said = f"diffem: {tmp_path / 'other'}: is not a run folder (no run.json); nothing is written there\n"
    assert capsys.readouterr().err == said
    assert (tmp_path / "other" / "report.html").read_text() == "mine"


@pytest.mark.parametrize("command", ["report", "diagnose"])
def test_a_run_can_be_looked_at_while_it_trains(command, whole, tmp_path, capsys):
    em = make(tmp_path)
    rows = em.iterate()
    next(rows), next(rows)  # it holds the lock
    data = test_em.observations()
    data.save(tmp_path / "observations")
    assert cli.main([command, str(tmp_path)]) == 0
    assert [row["iteration"] for row in rows] == [2]
    test_em.assert_same(tmp_path, whole)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    run = Run(tmp_path, {})
    left = [".checkpoint.safetensors.0123abcd.tmp", "posterior/.config.json.0123abcd.tmp"]
    mine = ["notes.tmp", ".notes.tmp", "observations/.y.npy.0123abcd.tmp"]
    for name in (*left, *mine):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "run.json").write_text("")
    with run.open():
        found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.tmp")}
    assert found == set(mine)
