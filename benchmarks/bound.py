"""The upper bound for a preset: its network, trained in one long M-step on the clean items behind the observations.

    python benchmarks/bound.py manifold runs/manifold/observations runs/manifold-bound

`judge.py` and `digits75.py` accept this run as --bound.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compare import BOUND, Fixed

from diffem.config import load_config
from diffem.data import Observations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("observations", type=Path, help="with clean.npy beside them")
    parser.add_argument("out", type=Path, help="the run folder")
    parser.add_argument("--steps", type=int, default=4000, help="of the optimiser")
    arguments = parser.parse_args()
    settings = {**BOUND, "em.iterations": "1", "m_step.first_steps": str(arguments.steps)}
    observations = Observations.load(arguments.observations)
    for row in Fixed(load_config(arguments.preset, list(settings.items())), observations, arguments.out).iterate():
        print(f"iteration {row['iteration']}: {row['score']:.4f}, ratio {row['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
