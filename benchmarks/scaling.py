"""Memory and time of a run on many observations: what does either grow with?

    python benchmarks/scaling.py --folder /tmp/scaling           # 1,000,000 of 3 x 32 x 32: 20 GB of disk, minutes
    python benchmarks/scaling.py --folder /tmp/scaling --items 10000 --kinds mask

Observations are simulated and stored as uint8. The kinds are `noise`, `mask` (mask.npy, one number for each pixel, also
for new observations), `formula` (the same, new masks are drawn), and `float16` and `float32` (noise alone, stored so).
The steps are: opening the folder with the check that `diffem train` makes; the run before its first step; the start;
and slices of the E-step of the start, the M-step, the E-step of the network, and the score. Each kind is run in a
process of its own, and for each step it prints

    anonymous   the peak of memory that no file stands behind (RssAnon): this is judged, nothing else is taken
    resident    the peak of all resident memory (VmHWM): also pages of files, which the system takes back when it
                needs memory
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

from diffem import em as em_module
from diffem import starts
from diffem.cli import _refuse_problems
from diffem.config import load_config
from diffem.data import Observations
from diffem.em import DiffEM, Progress
from diffem.judging import selection_score

SHAPE, CHUNK = (3, 32, 32), 4096
KINDS = ("noise", "mask", "formula", "float16", "float32")
NOISE, RATE, PATTERNS = 8.0, 0.75, 16
UPDATES, DRAWN, FITTED = 20, 1024, 4096
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
def measured(kind: str, n: int, step: str) -> Iterator[None]:
    """Prints the peaks and the seconds of a step."""
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
        sizes = {
            "anonymous": max(peak[0], found["RssAnon"]),
            "resident": found["VmHWM"],
            "files at the end": found["RssFile"] + found["RssShmem"],
        }
        row = {"kind": kind, "items": n, "step": step, "seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps({**row, **{k: round(v / 2**20) for k, v in sizes.items()}}), flush=True)


def slices(folder: Path, kind: str) -> None:
    """All steps, in this process."""
    torch.set_num_threads(1)
    config = load_config(None, SETTINGS)
    n = len(np.load(folder / "y.npy", mmap_mode="r"))
    with measured(kind, n, "open and check"):
        observations = Observations.load(folder)
        _refuse_problems(observations)
    limit: list[tuple[str, int]] = []

    def stop_at(progress: Progress) -> None:
        if limit and (progress.step, progress.done) >= limit[0] and progress.step == limit[0][0]:
            em.stop = enough

    def enough() -> None:
        em.stop = None
        raise Enough

    def a_slice(step: str, size: int) -> None:
        limit[:] = [(step, size)]
        em._saved = em._clock = time.monotonic()
        with contextlib.suppress(Enough):
            em.steps[step](em)

    with measured(kind, n, "begin the run"):
        em = DiffEM(config, observations, folder.parent / f"{folder.name}-run", progress=stop_at)
    with em.run.open():
        with measured(kind, n, "start: largest candidate"):  # a fit of several rounds takes as much memory
            small = dataclasses.replace(config.start, ranks=(max(config.start.ranks),), items=FITTED, iterations=1)
            em.config = dataclasses.replace(config, start=small)
            em.steps["start"](em)
        with measured(kind, n, "E-step of the start"):
            a_slice("e_step", 4 * DRAWN)
        os.replace(em.run.folder / "next.npy", em.run.folder / "current.npy")  # zeros, where nothing was drawn
        em.state = dataclasses.replace(em.state, step="m_step", iteration=1, width=config.sampler.width)
        with measured(kind, n, f"M-step: {UPDATES} updates"):
            a_slice("m_step", UPDATES)
        em.state = dataclasses.replace(em.state, step="e_step", updates=0)
        with measured(kind, n, f"E-step: {DRAWN} draws"):
            a_slice("e_step", DRAWN)
        with measured(kind, n, "score"):
            selection_score(em, em.sampler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, removed at the end")
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["noise", "mask", "formula"], choices=KINDS)
    parser.add_argument("--here", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        return slices(arguments.folder, arguments.here)
    arguments.folder.mkdir(parents=True)
    try:
        for n in arguments.items:
            for kind in arguments.kinds:
                folder = arguments.folder / f"{kind}-{n}"
                simulate(folder, n, kind)
                command = [sys.executable, __file__, "--folder", str(folder), "--here", kind]
                subprocess.run(command, check=True)
                shutil.rmtree(folder)
                shutil.rmtree(arguments.folder / f"{folder.name}-run")
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
