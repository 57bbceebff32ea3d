"""Accuracy of noise estimation: the noise that `diffem check --estimate` finds, over the noise that was added.

    python benchmarks/noise.py        # half a minute; a table, and results/noise/estimate.json

Photographs are the two of scikit-learn in patches of 64 x 64, with each colour as a separate image; `half` is every
other patch, `large` the two whole photographs. Cells are bright blobs on a dark ground, with values from 0 to 128, as
in fluorescence microscopy. Photographs are darkened by half if the gain is above 10, which would clip most bright
values. `8 bit` means that values are rounded and clipped to 0 to 255. A dash means that no line was found, or no number
was given.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from compare import about
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

from diffem.diagnostics.noise import estimate
from diffem.errors import DiffemError

LEVELS = [(0, s) for s in (2, 5, 10, 20, 30)]
LEVELS += [(1, 2), (1, 5), (1, 20), (2, 10), (5, 5), (5, 20), (10, 2), (15, 10), (20, 2), (20, 20)]


def photographs() -> dict[str, np.ndarray]:
    planes = np.concatenate([np.moveaxis(image, -1, 0) for image in load_sample_images().images]).astype(float)
    patches = planes[:, :384, :640].reshape(-1, 6, 64, 10, 64).swapaxes(2, 3).reshape(-1, 1, 64, 64)
    return {"patches": patches, "half": patches[::2], "large": planes[:, None]}


def cells(n: int = 60) -> np.ndarray:
    spots = [gaussian_filter((np.random.default_rng(i).random((128, 128)) < 0.002).astype(float), 5) for i in range(n)]
    return 128 * np.minimum(np.stack(spots) / np.max(spots) / 0.6, 1)[:, None]


def observed(x: np.ndarray, gain: float, noise: float, eight: bool) -> np.ndarray:
    random = np.random.default_rng(0)
    y = (gain * random.poisson(x / gain) if gain else x) + noise * random.standard_normal(x.shape)
    return (np.rint(y).clip(0, 255) if eight else y).astype(np.float32)


def ratios(x: np.ndarray, gain: float, noise: float, eight: bool) -> list[float] | None:
    """The ratios of estimate to truth: for the gain, if there is one, and for the noise; None if there is no
    estimate."""
    try:
        found = estimate(observed(x, gain, noise, eight))
    except DiffemError:
        return None
    if bool(gain) != bool(found.gain):
        return None
    return [*([found.gain / gain] if gain else []), found.std() / noise]


def main() -> None:
    sets = {**photographs(), "cells": cells()}
    print(f"| gain | noise | 8 bit | {' | '.join(sets)} |\n|{'---|' * (3 + len(sets))}")
    rows = []
    for gain, noise in LEVELS:
        for eight in (False, True):
            dark = {name: x / 2 if gain > 10 and name != "cells" else x for name, x in sets.items()}
            found = {name: ratios(x, gain, noise, eight) for name, x in dark.items()}
            rows.append({"gain": gain, "noise": noise, "eight": eight, "ratios": found})
            words = [", ".join(f"{r:.2f}" for r in value) if value else "–" for value in found.values()]
            print(f"| {gain} | {noise} | {'yes' if eight else ''} | {' | '.join(words)} |", flush=True)
    result = {"about": about("python benchmarks/noise.py"), "rows": rows}
    folder = Path(__file__).parent / "results" / "noise"
    folder.mkdir(exist_ok=True)
    (folder / "estimate.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
