"""The columns of the manifold benchmark that need the curve.

    python benchmarks/manifold.py runs/manifold --bound runs/manifold-bound --out benchmarks/results/manifold.json

Everything in the units of the data (coordinates span [-2, 2], noise 0.01). `to_curve`: mean distance of a draw to the
curve; `from_curve`: mean distance of a point of the curve to the nearest draw; `residual`: root mean square of
A x - y over the noise; `sinkhorn`: the paper's divergence (lambda 1e-3, 4,096 points). One draw for each of the
16,384 observations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffem import metrics, seeding
from diffem.corruptions import LinearCorruption
from diffem.datasets import manifold_curve
from diffem.diagnostics import score
from diffem.observations import Observations
from diffem.posteriors import PosteriorSampler, from_pretrained

POINTS = 4096


def drawn(sampler: PosteriorSampler, observations: Observations, phase: str = "user") -> Tensor:
    """One draw for every observation."""
    return torch.cat(
        [
            sampler.sample(*observations.batch(rows), seeding.item_seeds(0, 0, phase, rows))
            for rows in observations.chunks(size=512)
        ]
    )


def column(sampler: PosteriorSampler, observations: Observations, curve: Tensor, clean: Tensor, first=None):
    """The metrics of a sampler, and its score."""
    x = drawn(sampler, observations)
    held_out = observations.split(0)[1]
    current = score(sampler, observations, held_out, 0, 8)
    y, params = observations.batch(np.arange(len(observations)))
    corruption = observations.corruption
    assert isinstance(corruption, LinearCorruption)
    residual = (corruption.forward(x, params) - y).square().mean().sqrt() / corruption.noise
    result = {
        "to_curve": metrics.nearest(x, curve).mean().item(),
        "from_curve": metrics.nearest(curve[::8], x).mean().item(),
        "residual": residual.item(),
        "sinkhorn": metrics.sinkhorn_divergence(x[:POINTS], clean[-POINTS:]),
        "crps": current.mean,
        "crps_se": current.standard_error,
        "ratio": current.ratio,
    }
    if first is not None:
        result["delta"], result["delta_se"] = current.difference(first)
    return result, current


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--bound", type=Path, help="a run of benchmarks/bound.py on the same preset")
    parser.add_argument("--out", type=Path, help="a JSON file; printed otherwise")
    arguments = parser.parse_args()
    observations = Observations.load(arguments.run / "observations")
    clean = torch.from_numpy(np.load(arguments.run / "observations" / "clean.npy"))
    curve = torch.as_tensor(manifold_curve(0, 32_768), dtype=torch.float32)
    table: dict[str, dict] = {}
    arms = {"start": arguments.run / "start", "diffem": arguments.run / "posterior"}
    if arguments.bound:
        arms["clean bound"] = arguments.bound / "posterior"
    first = None
    for name, folder in arms.items():
        table[name], current = column(from_pretrained(folder), observations, curve, clean, first)
        first = first or current
    rows = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    prior = json.loads((arguments.run / "prior.json").read_text())["seconds"]
    result = {
        "command": f"diffem train {arguments.run.name}; python benchmarks/manifold.py",
        "seconds": sum(row["seconds"] for row in rows) + prior,
        "iterations": sum(row["loss"] is not None for row in rows),
        "accepted": sum(row["accepted"] and row["loss"] is not None for row in rows),
        "columns": table,
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
