"""What the report shows of a run: a few held-out observations, their draws, and samples of the prior."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from diffem.observations import Observations, evenly
from diffem.posteriors import draw_many, from_pretrained, sample_many
from diffem.run import Run


def save(
    run: Run,
    observations: Observations,
    held_out: np.ndarray,
    seed: int,
    clean: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Writes pictures.npz into the run folder; clean items, if there are any, are only shown."""
    image = len(observations.shape) > 1
    rows = evenly(held_out, 8 if image else 200)
    load = lambda name: from_pretrained(run.folder / name, device=device, precision=precision)  # noqa: E731
    posterior, start = load("posterior"), load("start")
    draws = draw_many(posterior, observations, rows, 16, seed)
    low, high = observations.range or (float(draws.min()), float(draws.max()))
    y, params = observations.batch(rows)
    arrays = {
        "y": y.numpy(),
        "mean": draws.mean(1).numpy(),
        "std": draws.std(1).numpy(),
        "draws": draws[:, :4].numpy(),
        "start": draw_many(start, observations, rows, 1, seed)[:, 0].numpy(),
        "range": np.array([low, high]),
    }
    if "mask" in params:
        arrays["mask"] = params["mask"].numpy()
    if clean is not None and clean.exists():
        arrays["clean"] = np.asarray(np.load(clean, mmap_mode="r")[rows], dtype=np.float32)
    if (run.folder / "prior" / "config.json").exists():
        prior = load("prior")
        arrays["samples"] = sample_many(prior, 64 if image else 1000, seed).numpy()
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    run.write("pictures.npz", stream.getvalue())
