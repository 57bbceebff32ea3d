"""The arrays that the report of a run shows: a few held-out observations, their draws, and samples of the prior."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from diffem import files, memory
from diffem.data import Observations, evenly, open_array
from diffem.posterior import from_pretrained

NUMBERS = 2**21  # numbers in all samples of the prior; if items are large, fewer are drawn


def save(
    run: Path,
    observations: Observations,
    held_out: np.ndarray,
    seed: int,
    clean: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch: int | None = None,
) -> None:
    """Writes pictures.npz into the run folder; clean items, if there are any, are only for display."""
    image = len(observations.shape) > 1
    rows = evenly(held_out, 8 if image else 200)
    samples = memory.at_once(math.prod(observations.shape), 64, NUMBERS) if image else 1000
    load = lambda name: from_pretrained(run / name, observations.corruption, device=device, precision=precision)  # noqa: E731
    seen = observations.item_layout.to_model
    draws = seen(load("posterior").reconstruct(observations, rows, 16, seed, batch))
    low, high = observations.range or (float(draws.min()), float(draws.max()))
    y, params = observations.batch(rows)
    arrays = {
        "y": y.numpy(),
        "mean": draws.mean(0).numpy(),
        "std": draws.std(0, correction=0).numpy(),
        "draws": draws[:8:2].transpose(0, 1).numpy(),  # one of each antithetic pair
        "start": seen(load("start").reconstruct(observations, rows, 1, seed, batch)[0]).numpy(),
        "range": np.array([low, high]),
    }
    if "mask" in params:
        arrays["mask"] = params["mask"].numpy()
    if clean is not None and clean.exists():
        arrays["clean"] = np.asarray(seen(observations.cut(open_array(clean))[rows]), dtype=np.float32)
    if (run / "prior" / "config.json").exists():
        arrays["samples"] = seen(load("prior").generate(samples, seed, batch)).numpy()
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    files.replace(run / "pictures.npz", stream.getvalue())
