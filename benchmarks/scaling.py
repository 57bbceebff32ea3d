"""Memory and time of a run on many observations: what does either grow with?

    python benchmarks/scaling.py --folder /tmp/scaling           # 1,000,000 of 3 x 32 x 32: 20 GB of disk, minutes
    python benchmarks/scaling.py --folder /tmp/scaling --items 10000 --kinds mask

Observations are simulated and stored as uint8. The kinds are `noise`, `mask` (mask.npy, one number for each pixel, also
for new observations), `formula` (the same, new masks are drawn), and `float16` and `float32` (noise alone, stored so).
The steps are: opening the folder with the check that `diffem train` makes; the run before its first step; the fit of the
largest mixture of the start; slices of the E-step of the start, the M-step, and the E-step of the network; and a score.
Each kind is run in a process of its own, and each of its steps gives, in MB,

    anonymous   the peak of memory that no file stands behind (RssAnon)
    resident    the peak of all resident memory (VmHWM), pages of files among it: this is judged. The system takes these
                pages back when it needs memory, but a cluster may count them
    files       the pages of files that are still held at the end of the step (RssFile); 250 of them are libraries

One JSON per kind and number is written to `results/scaling/`; `table.py` makes the table in docs/cost.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from diffem.config import load_config
from diffem.data import Observations
from diffem.diagnostics.check import quick
from diffem.em import DiffEM
from diffem.judging import selection_score
from diffem.loop import Progress

HERE = Path(__file__).parent
SHAPE, CHUNK = (3, 32, 32), 4096
KINDS = ("noise", "mask", "formula", "float16", "float32")
NOISE, RATE, PATTERNS = 8.0, 0.75, 16
UPDATES, DRAWN, FITTED = 20, 1024, 2048
EVERY = 0.005  # seconds between two looks at the memory
SETTINGS = [("network.channels", "[16, 32]"), ("network.blocks", "[1, 1]"), ("sampler.steps", "4")]


class Enough(BaseException):
    """A slice of a step is done."""


def simulate(folder: Path, n: int, kind: str) -> None:
    """Writes a folder of observations: sums of a few patterns, in 0 to 255."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    dtype = np.dtype(kind if kind.startswith("float") else np.uint8)
    patterns = rng.normal(size=(PATTERNS, *(8 for _ in SHAPE[1:]), SHAPE[0])).astype(np.float32)
    patterns = patterns.repeat(SHAPE[1] // 8, 1).repeat(SHAPE[2] // 8, 2).transpose(0, 3, 1, 2).reshape(PATTERNS, -1)
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", dtype, (n, *SHAPE))
    noise = NOISE * rng.standard_normal((CHUNK, patterns.shape[1]), np.float32)
    masked = kind in ("mask", "formula")
    mask = np.lib.format.open_memmap(folder / "mask.npy", "w+", bool, (n, 1, *SHAPE[1:])) if masked else None
    for begin in range(0, n, CHUNK):
        size = min(CHUNK, n - begin)
        x = rng.standard_normal((size, PATTERNS), np.float32) @ patterns
        x = 128 + 12 * x + np.roll(noise, begin // CHUNK, 0)[:size]  # drawing as much noise as is needed takes minutes
        y[begin : begin + size] = x.clip(0, 255).reshape(-1, *SHAPE)
        if mask is not None:
            mask[begin : begin + size] = rng.random((size, 1, *SHAPE[1:]), np.float32) >= RATE
    law = f"name: RandomMask\nrate: {RATE}\n" if masked else "name: GaussianNoise\n"
    formula = "formula: true\n" if kind == "formula" else ""
    (folder / "corruption.yaml").write_text(f"{law}noise: {NOISE}\nrange: [0, 255]\n{formula}")


def status() -> dict[str, int]:
    """The lines of /proc/self/status about memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


@contextlib.contextmanager
def measured(rows: list[dict], step: str) -> Iterator[None]:
    """Adds the peaks and the seconds of a step to the rows."""
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            peak[0] = max(peak[0], status()["RssAnon"])

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    looking = threading.Thread(target=look)
    looking.start()
    began = time.perf_counter()
    try:
        yield
    finally:
        done.set()
        looking.join()
        found = status()
        sizes = {"anonymous": max(peak[0], found["RssAnon"]), "resident": found["VmHWM"], "files": found["RssFile"]}
        seconds = round(time.perf_counter() - began, 1)
        rows.append({"step": step, "seconds": seconds, **{k: round(v / 2**20) for k, v in sizes.items()}})
        print(json.dumps(rows[-1]), flush=True)


def slices(folder: Path) -> list[dict]:
    """All steps, in this process; a row for each."""
    torch.set_num_threads(1)
    config, rows = load_config(None, SETTINGS), []
    with measured(rows, "open and check"):
        observations = Observations.load(folder)
        quick(observations)
    limit: list[tuple[str, int]] = []

    def stop_at(progress: Progress) -> None:
        if limit and progress.step == limit[0][0] and progress.done >= limit[0][1]:
            em.stop = enough

    def enough() -> None:
        em.stop = None
        raise Enough

    def a_slice(step: str, size: int) -> None:
        limit[:] = [(step, size)]
        em._saved = em._clock = time.monotonic()
        with contextlib.suppress(Enough):
            em.steps[step](em)

    with measured(rows, "begin the run"):
        em = DiffEM(config, observations, folder.parent / f"{folder.name}-run", progress=stop_at)
    with em.run.open():
        with measured(rows, "start: largest candidate"):  # a fit of several rounds takes as much memory
            small = dataclasses.replace(config.start, ranks=(max(config.start.ranks),), items=FITTED, iterations=1)
            em.config = dataclasses.replace(config, start=small)
            em.steps["start"](em)
        with measured(rows, "E-step of the start"):
            a_slice("e_step", 4 * DRAWN)
        os.replace(em.run.folder / "next.npy", em.run.folder / "current.npy")  # zeros, where nothing was drawn
        em.state = dataclasses.replace(em.state, step="m_step", iteration=1, width=config.sampler.width)
        with measured(rows, f"M-step: {UPDATES} updates"):
            a_slice("m_step", UPDATES)
        em.state = dataclasses.replace(em.state, step="e_step", updates=0)
        with measured(rows, f"E-step: {DRAWN} draws"):
            a_slice("e_step", DRAWN)
        with measured(rows, "score"):
            selection_score(em, em.sampler)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, removed at the end")
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["noise", "mask", "formula"], choices=KINDS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a process of its own
    given = parser.parse_args()
    if given.here:
        slices(given.folder)
        return
    from compare import about  # not above: it would count in the memory of the steps

    given.folder.mkdir(parents=True)
    given.out.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/scaling.py " + " ".join(sys.argv[1:])
    try:
        for n, kind in itertools.product(given.items, given.kinds):
            folder = given.folder / f"{kind}-{n}"
            simulate(folder, n, kind)
            alone = [sys.executable, __file__, "--folder", str(folder), "--here"]
            lines = subprocess.run(alone, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(lines, flush=True)
            result = {
                "about": about(command),
                "kind": kind,
                "items": n,
                "steps": [*map(json.loads, lines.splitlines())],
            }
            (given.out / f"{kind}-{n}.json").write_text(json.dumps(result, indent=1) + "\n")
            shutil.rmtree(folder)
            shutil.rmtree(given.folder / f"{folder.name}-run")
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
