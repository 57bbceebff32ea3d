"""The upper bound of a preset: the same network and sampler, trained on the clean data that EM never sees.

    python benchmarks/bound.py digits --out runs/digits-bound --steps 5000

The folder is a run like any other, so that `diffem evaluate` and the other benchmarks read it. Its `start` is the
mixture fitted to the observations, as everywhere; only what the M-step trains on is clean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from diffem import cli
from diffem.config import load
from diffem.em import DiffEM
from diffem.observations import Observations


class CleanBound(DiffEM):
    """One long iteration on clean items."""

    def _reconstruct(self, sampler, out, iteration):
        if iteration:
            return super()._reconstruct(sampler, out, iteration)
        clean = np.load(Path(self.observations.source) / "clean.npy", mmap_mode="r")
        for rows in self.observations.chunks():
            out[rows] = clean[rows]
        return 0

    def _settled(self, window=200):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--out", required=True)
    parser.add_argument("--root")
    parser.add_argument("--steps", type=int, default=5000)
    arguments, rest = parser.parse_known_args()
    wide = load(arguments.preset, cli.overrides(rest)).e_step.dispersion_last
    fixed = {
        "em.gate": "1e9",
        "em.iterations": "1",
        "em.refresh": "1.0",
        "m_step.first_steps": str(arguments.steps),
        "e_step.dispersion_first": str(wide),
    }
    config = load(arguments.preset, [*fixed.items(), *cli.overrides(rest)])
    folder = Path(arguments.out) / "observations"
    if not folder.exists():
        cli.make_observations(config, arguments.preset, folder, arguments.root)
    bar = cli.ProgressBar()
    for row in CleanBound(config, Observations.load(folder), arguments.out, progress=bar.update).iterate():
        bar.clear()
        print({k: row[k] for k in ("iteration", "score", "score_se", "ratio", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
