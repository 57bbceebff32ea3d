"""Digits through a 5-pixel box blur, and through a Gaussian blur and a mask: RMSE of the mean of 16 posterior draws, in grey levels.

    python benchmarks/linear.py [--noise 0.5]

A few minutes on one core. Held-out digits; beside it, the observation's own error, the start's, and half a standard deviation.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits

import diffem

DRAWS = 16
SETTINGS = [("em.iterations", "3"), ("m_step.steps", "60"), ("prior.steps", "3"), ("start.ranks", "[12]")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, default=0.5, help="standard deviation, of values from 0 to 16")
    noise = parser.parse_args().noise
    x = load_digits().images.astype(np.float32)[:, None]
    masked = diffem.Compose([diffem.GaussianBlur(1.0), diffem.RandomMask(0.5)], noise)
    mask = masked.draw(len(x), (1, 8, 8), torch.Generator().manual_seed(0))
    box = {"kernel": torch.full((len(x), 5, 5), 1 / 25)}
    for name, corruption, params in (("box", diffem.Blur(noise=noise), box), ("blur and mask", masked, mask)):
        y = corruption.apply(torch.from_numpy(x), params, torch.Generator().manual_seed(1)).numpy()
        arrays = {k: v.numpy() for k, v in params.items()}
        observations = diffem.Observations(y, corruption, arrays, range=(0, 16))
        rows = np.sort(np.concatenate(observations.split(0)[1:]))
        rmse = lambda a, rows=rows: float(np.sqrt(np.square(a - x[rows]).mean()))  # noqa: E731
        with tempfile.TemporaryDirectory() as out:
            list(diffem.DiffEM(diffem.load_config("demo", SETTINGS), observations, f"{out}/run").iterate())
            found = {"observation": rmse(y[rows]), "half a deviation": float(x.std() / 2)}
            for kind in ("start", "posterior"):
                draws = diffem.from_pretrained(f"{out}/run/{kind}").reconstruct(observations, rows, DRAWS)
                found[kind] = rmse(draws.mean(0).numpy())
        print(name, ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
