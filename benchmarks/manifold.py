"""The columns of the manifold benchmark that need the curve.

    python benchmarks/manifold.py runs/manifold --bound runs/manifold-bound --out benchmarks/results/manifold.json

Everything in the units of the data (coordinates span [-2, 2], noise 0.01). `to_curve`: mean distance of a draw to the
curve; `from_curve`: mean distance of a point of the curve to the nearest draw; `residual`: root mean square of
A x - y over the noise; `sinkhorn`: the paper's divergence (lambda 1e-3, 4,096 points). One draw for each of the
16,384 observations.
"""

from __future__ import annotations

import numpy as np
import torch
from common import parse, publish, scored
from torch import Tensor

from diffem import metrics
from diffem.corruptions import LinearCorruption
from diffem.datasets import manifold_curve
from diffem.diagnostics import score
from diffem.observations import Observations
from diffem.posteriors import PosteriorSampler, draw_many, from_pretrained

POINTS = 4096


def column(sampler: PosteriorSampler, observations: Observations, curve: Tensor, clean: Tensor, first=None):
    """The metrics of a sampler, and its score."""
    rows = np.arange(len(observations))
    x = draw_many(sampler, observations, rows, 1, 0)[:, 0]
    current = score(sampler, observations, observations.split(0)[1], 0, 8)
    y, params = observations.batch(rows)
    corruption = observations.corruption
    assert isinstance(corruption, LinearCorruption)
    residual = (corruption.forward(x, params) - y).square().mean().sqrt() / corruption.noise
    result = {
        "to_curve": metrics.nearest(x, curve).mean().item(),
        "from_curve": metrics.nearest(curve[::8], x).mean().item(),
        "residual": residual.item(),
        "sinkhorn": metrics.sinkhorn_divergence(x[:POINTS], clean[-POINTS:]),
        **scored(current, first),
    }
    return result, current


def main() -> None:
    arguments = parse(__doc__)
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
    publish(arguments, "manifold.py", table)


if __name__ == "__main__":
    main()
