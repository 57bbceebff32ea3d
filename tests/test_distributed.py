"""One run in several processes: the same numbers, and the same run folder whatever their number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_em

from diffem import distributed
from diffem.posterior import from_pretrained

TESTS = Path(__file__).parent
SECTIONS = {"em": {"iterations": 2, "guard": False, "refresh": 0.6}, "m_step": {"micro_batch": 3}}
SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from diffem import distributed
distributed.begin()
import test_em
out, last = Path(sys.argv[1]), int(sys.argv[2])
em = test_em.make(out, **{SECTIONS!r})
count = 0
def progress(done):
    global count
    count += 1
    if count == last and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
em.progress = progress
sys.stdout.write(f"{{distributed.rank()}} {{[row['iteration'] for row in em.iterate()]}}\\n")
"""


def launch(n: int, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("distributed") / "run.py"
    file.write_text(SCRIPT)
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    test_em.train(folder, **SECTIONS)
    return folder


def assert_same(one: Path, two: Path) -> None:
    np.testing.assert_allclose(np.load(one / "reconstructions.npy"), np.load(two / "reconstructions.npy"), atol=2e-3)
    weights = [from_pretrained(folder / "posterior").sampler.state_dict() for folder in (one, two)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=2e-4, err_msg=name)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have names in /proc")
def test_processes_leave_their_group_before_python_exits(tmp_path):
    """Otherwise up to one launch in two ended with `terminate called without an active exception`."""
    file = tmp_path / "leave.py"
    file.write_text(
        "import atexit, sys, torch\n"
        "from pathlib import Path\n"
        "def threads():\n"
        "    names = {p.read_text().strip() for p in Path('/proc/self/task').glob('*/comm')}\n"
        "    sys.stdout.write(f'{sorted(n for n in names if \"gloo\" in n)}\\n')\n"
        "atexit.register(threads)\n"  # runs last
        "from diffem import distributed\n"
        "distributed.begin()\n"
        "distributed.add([torch.zeros(2)])\n"
        "torch.optim.Adam([torch.zeros(1, requires_grad=True)])\n"
    )
    done = launch(2, str(file))
    assert (done.returncode, done.stdout) == (0, "[]\n[]\n"), done.stderr


@pytest.mark.parametrize("n", [2, 3])
def test_invariant_7_any_number_of_processes_makes_the_same_reconstructions(n, script, alone, tmp_path):
    done = launch(n, str(script), str(tmp_path / "run"), "0")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} [0, 1, 2, 3]" for rank in range(n)]
    assert_same(alone, tmp_path / "run")


def test_a_run_whose_process_died_goes_on_with_another_number(script, alone, tmp_path):
    done = launch(2, str(script), str(tmp_path / "run"), "9")
    assert done.returncode != 0
    assert launch(3, str(script), str(tmp_path / "run"), "4").returncode != 0
    assert (tmp_path / "run" / "current.npy").exists()  # it has not ended
    test_em.train(tmp_path / "run", **SECTIONS)
    assert_same(alone, tmp_path / "run")


def test_an_error_is_told_once(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    test_em.observations().save(tmp_path / "data")
    words = ["--observations", str(tmp_path / "data"), "--out", str(tmp_path / "foreign"), "--force"]
    done = launch(2, "-m", "diffem", "train", *words)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("diffem: ")]
    assert set(said) == {
        f"diffem: {tmp_path}/foreign: holds thesis.tex but no run.json, so it is not a run; use an empty --out"
    }
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.size(), distributed.first()) == (0, 1, True)
    assert distributed.shared(lambda: 7) == 7
    assert distributed.gathered(3) == [3]
    assert distributed.anyone(True)
    assert not distributed.anyone(False)
    assert distributed.share(10) == slice(0, 10)
