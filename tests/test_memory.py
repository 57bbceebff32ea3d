"""Memory: an E-step takes as much of it for many observations as for few."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffem import config as configuration
from diffem.corruptions import GaussianNoise
from diffem.em import DiffEM
from diffem.observations import Observations
from diffem.posteriors import PosteriorSampler

SHAPE = (3, 32, 32)


def anonymous() -> float:
    """Memory of this process that no file stands behind, in MB."""
    line = next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


class Identity(PosteriorSampler):
    kind = "observation"

    def _sample(self, y, params, seeds, withheld):
        return y


def e_step(folder: str, n: int) -> None:
    """Run by a process of its own: prints the peak."""
    torch.set_num_threads(1)
    y = np.lib.format.open_memmap(Path(folder) / "y.npy", "w+", np.uint8, (n, *SHAPE))  # zeros that take no space
    y[n - 1] = 255
    peak = []
    em = DiffEM(
        configuration.Config(),
        Observations(np.load(Path(folder) / "y.npy", mmap_mode="r"), GaussianNoise(10.0)),
        Path(folder) / "run",
        progress=lambda what, done, total: peak.append(anonymous()),
    )
    out = em.run.array("next", (n, *SHAPE))
    sampler = Identity(em.corruption, SHAPE, em.scaling)
    assert em._reconstruct(sampler, out, iteration=0) == n
    assert (out[0] == 0).all()
    assert (out[n - 1] == 255).all()
    assert len(peak) == -(-n // 256)
    print(json.dumps(max(peak)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_e_step_memory_does_not_grow(tmp_path):
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 3 GB of disk")
    found = {}
    for n in (2_000, 200_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_memory; test_memory.e_step({str(folder)!r}, {n})"
        process = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        shutil.rmtree(folder)
        assert process.returncode == 0, process.stderr
        found[n] = json.loads(process.stdout)
    print(found)
    assert found[200_000] < found[2_000] + 200
