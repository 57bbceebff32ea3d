"""Watching a run from outside: what is said is true at that moment, and the run does not notice."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import test_em
from test_em import bare, make, settings, train

from diffem import judging, watch
from diffem.cli import main
from diffem.data import observations as data
from diffem.diagnostics import scores
from diffem.loop import Progress
from diffem.run import Run
from diffem.watch import FILE, Status, duration, seconds_left, status

fcntl = pytest.importorskip("fcntl")
HEAVY = ("torch", "numpy", "matplotlib", "scipy", "sklearn", "azula")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Progress is written whenever there is any."""
    monkeypatch.setattr(watch, "EVERY", 0.0)


# --- the time left -------------------------------------------------------------------------------------

CONFIG = {
    "em": {"iterations": 5, "score_items": 10},
    "m_step": {"steps": 20, "first_steps": 100, "batch": 8},
    "prior": {"kind": "unconditional", "steps": 50},
    "facts": {"observations": 800},
}
PACE, SCORE = 0.01, 3.0  # seconds per evaluation of the network, and for the score of an iteration


def row(iteration: int, examples: int, draws: int) -> dict:
    evaluations = 3 * examples + draws
    spent = PACE * evaluations + SCORE
    loss = None if iteration == 0 else 1.0
    return {
        "iteration": iteration,
        "loss": loss,
        "score_name": "crps",
        "seconds": spent,
        "score_seconds": SCORE,
        "examples": examples,
        "network_evaluations": evaluations,
    }


ROWS = [row(0, 0, 0), row(1, 100 * 8, 4000), row(2, 20 * 8, 1000)]
ONE = PACE * (3 * 20 * 8 + 1000) + SCORE  # a later iteration
# 40 validation observations, each split 8 times, for three widths and the final model; an iteration splits 10 twice
END = PACE * 4000 + 4 * (40 * 8) / (10 * 2) * SCORE
PRIOR = PACE * 3 * 50 * 8


@pytest.mark.parametrize(
    ("where", "truth"),
    [
        (("m_step", 3, None, 0.0), 3 * ONE + END + PRIOR),
        (("e_step", 3, None, 5.0), 3 * ONE - 5 + END + PRIOR),
        (("judge", 5, None, 1e9), END + PRIOR),  # a slow iteration does not take time from the others
        (("end", 6, None, 2.0), END - 2 + PRIOR),
        (("e_step", 6, 4, 2.0), END - 2 + PRIOR),
        (("prior", 7, None, 2.0), PRIOR - 2),
        (("done", 8, None, 0.0), 0.0),
    ],
)
def test_the_time_left_is_pace_times_what_is_left(where, truth):
    assert seconds_left(CONFIG, ROWS, *where) == pytest.approx(truth)


def test_the_time_left_is_not_guessed_before_an_iteration_is_finished():
    assert seconds_left(CONFIG, ROWS[:1], "m_step", 1, None, 5.0) is None
    assert seconds_left(CONFIG, [], "start", 0, None, 0.0) is None


def test_a_joint_prior_and_a_black_box_take_less_at_the_end():
    joint = {**CONFIG, "prior": {**CONFIG["prior"], "kind": "joint"}}
    assert seconds_left(joint, ROWS, "end", 6, None, 0.0) == pytest.approx(END)
    distances = [{**row, "score_name": "energy_distance"} for row in ROWS]
    assert seconds_left(joint, distances, "end", 6, None, 0.0) == pytest.approx(PACE * 4000 + SCORE)


def test_its_numbers_are_those_of_the_scores():
    assert (watch.PREDICTIONS, watch.MOST_SPLITS) == (scores.PREDICTIONS, scores.MOST_SPLITS)
    assert (watch.SPLITS, watch.HELD_OUT) == (judging.SPLITS, data.HELD_OUT)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.4, "3 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"), (9000, "2 hours")],
)
def test_words_of_a_time(seconds, words):
    assert duration(seconds) == words


# --- while it runs -------------------------------------------------------------------------------------


def test_what_is_seen_is_true_and_the_run_does_not_notice(tmp_path):
    seen: list[tuple[Progress, Status]] = []
    em = make(tmp_path / "watched")

    def look(progress: Progress) -> None:
        em.watch._write({**dataclasses.asdict(progress), "seconds": 0.0, "time": time.time()})
        seen.append((progress, status(tmp_path / "watched")))

    em.progress = look
    rows = list(em.iterate())
    train(tmp_path / "alone")
    for name in ("posterior/model.safetensors", "prior/model.safetensors", "reconstructions.npy"):
        assert (tmp_path / "watched" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert bare(tmp_path / "watched") == bare(tmp_path / "alone")
    assert all((said.state, said.running) == ("running", True) for _, said in seen)
    for told, said in seen[1:]:
        assert (told.step, told.iteration, told.done, told.total) == (
            said.step,
            said.iteration,
            said.done,
            said.total,
        ), told
        finished = rows[1 : told.iteration]  # without the start
        assert said.finished == min(len(finished), 3)
        assert (said.seconds_left is None) == (not finished) == (told.left is None)
        assert said.ending == (told.iteration > 3)
        if told.iteration in (1, 2, 3):
            best = [row for row in rows[: told.iteration] if row["best"]][-1]
            assert said.best["iteration"] == best["iteration"]
            assert (said.best["score"], said.start["score"]) == (best["score"], rows[0]["score"])
    told, said = next(pair for pair in seen if (pair[0].step, pair[0].iteration, pair[0].done) == ("m_step", 2, 3))
    assert str(said).splitlines()[0] == "running: iteration 2 of 3, m_step, 3 of 5 updates (60%)"
    assert str(said).splitlines()[1].startswith(f"best: iteration 1, crps {rows[1]['score']:.4f} +- ")
    assert said.checkpoint_seconds < 60


def test_a_finished_run(tmp_path):
    em = train(tmp_path)
    assert not list(tmp_path.glob(f"{FILE}*"))
    said, last = status(tmp_path), em.rows[-1]
    assert (said.state, said.running, said.step, said.seconds_left) == ("finished", False, "done", 0.0)
    assert str(said).splitlines()[:2] == [
        "finished: 3 iterations",
        f"best: iteration 3, crps {last['score']:.4f} +- {last['score_se']:.4f}; "
        f"start: {last['start_score']:.4f} +- {last['start_score_se']:.4f}, on test observations",
    ]


def test_a_run_that_ends_early_says_why(tmp_path):
    said = status(_finished(tmp_path))
    early = dataclasses.replace(said, finished=2)
    assert early.where == "finished: 2 iterations of 3 (em.patience)"


def _finished(out: Path) -> Path:
    train(out)
    return out


def test_stopped_failed_and_killed(tmp_path):
    def fail(em, row):
        if row["iteration"] == 2:
            raise ValueError("the hook\nbroke")

    em = make(tmp_path / "failed")
    em.hooks = [fail]
    with pytest.raises(ValueError, match="the hook"):
        list(em.iterate())
    said = status(tmp_path / "failed")
    assert (said.state, said.error, said.step, said.iteration) == ("failed", "the hook broke", "judge", 2)
    lines = str(said).splitlines()
    assert lines[:2] == ["failed: iteration 2 of 3, judge", "error: the hook broke"]
    assert lines[-1] == "the command that started it goes on from the last checkpoint"

    em = make(tmp_path / "stopped")
    rows = em.iterate()
    for _ in range(2):
        next(rows)
    rows.close()
    said = status(tmp_path / "stopped")
    assert (said.state, said.error, said.iteration, said.finished) == ("stopped", None, 2, 1)
    assert str(said).splitlines()[0] == "stopped: iteration 2 of 3, m_step, 0 of 5 updates (0%)"
    train(tmp_path / "stopped")
    assert status(tmp_path / "stopped").state == "finished"

    test_em.start_and_die(tmp_path / "killed", "m_step")
    said = status(tmp_path / "killed")
    assert (said.state, said.step, said.iteration, said.done) == ("killed", "m_step", 2, 3)  # what is saved


def test_before_the_first_checkpoint(tmp_path):
    with Run(tmp_path, {**settings().to_dict(), "facts": {"observations": 60}}).open():
        said = status(tmp_path)
        assert str(said).splitlines() == [
            "running: the start, start",
            "time left: not known before the first iteration is finished",
            "last checkpoint: none yet",
        ]
    assert status(tmp_path).state == "killed"


def test_a_run_starts_although_somebody_looks_at_its_lock(tmp_path):
    run = Run(tmp_path, {"em": {"iterations": 1}})
    with run.open():
        pass
    with (tmp_path / "run.json").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        timer = threading.Timer(0.03, lambda: fcntl.flock(stream, fcntl.LOCK_UN))
        timer.start()
        with run.open():
            assert watch.running(tmp_path)
        timer.join()
    assert watch.running(tmp_path) is False


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    em = make(tmp_path, em={"iterations": 1})
    monkeypatch.setattr(Path, "write_text", lambda self, *rest: full() if FILE in self.name else os.abort())
    assert [row["iteration"] for row in em.iterate()] == [0, 1, 2]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    train(tmp_path, em={"iterations": 1})

    def none(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    assert (status(tmp_path).state, status(tmp_path).running) == ("finished", None)
    (tmp_path / "checkpoint.safetensors").unlink()
    assert (status(tmp_path).state, status(tmp_path).running) == ("unknown", None)


# --- what is no run ------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused_in_a_line(tmp_path, capsys):
    def refused(text: str) -> None:
        assert main(["status", str(tmp_path / "run")]) == 2
        assert capsys.readouterr() == ("", f"diffem: {text}\n")

    out = tmp_path / "run"
    refused(f"{out}: is not a run folder (no run.json of diffem)")
    out.mkdir()
    refused(f"{out}: is not a run folder (no run.json of diffem)")
    (out / "run.json").write_text("{}")
    refused(f"{out}: is not a run folder (no run.json of diffem)")
    (out / "run.json").write_text("")  # it was killed at once
    refused(f"{out / 'config.yaml'}: is missing or not the configuration of a run")
    (out / "config.yaml").write_text("- a list\n")
    refused(f"{out / 'config.yaml'}: is missing or not the configuration of a run")
    (out / "config.yaml").write_text("em: {iterations: 3}\n")
    (out / "checkpoint.safetensors").write_bytes(b"\xff" * 20)
    refused(f"{out / 'checkpoint.safetensors'}: is truncated or not a checkpoint of diffem")
    (out / "checkpoint.safetensors").unlink()
    (out / "metrics.jsonl").write_text("{")
    refused(f"{out / 'metrics.jsonl'}: line 1 is not JSON")


def test_status_is_quick_and_json(tmp_path):
    train(tmp_path, em={"iterations": 1})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code = f"""
import sys, diffem.cli
diffem.cli.main(['status', {str(tmp_path)!r}, '--json'])
print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"
    found = json.loads(done.stdout)
    assert list(found) == [field.name for field in dataclasses.fields(Status)]
    assert (found["state"], found["iterations"], found["best"]["final"]) == ("finished", 1, True)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
