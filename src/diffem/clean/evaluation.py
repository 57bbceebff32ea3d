"""Compares a run with clean data: the start, the reconstructions and the prior, in the columns of one table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from diffem.clean import metrics
from diffem.corruptions import LinearCorruption
from diffem.data import Dataset, Items, Observations, evenly, open_array
from diffem.errors import DiffemError
from diffem.loop import DiffEM, Hook
from diffem.posterior import from_pretrained
from diffem.run import read_config
from diffem.samplers import draw_many, prior_samples


def against(reference: np.ndarray, features: metrics.Features | None = None) -> Hook:
    """A hook that records the distances of every iteration's reconstructions to clean items.

    Arguments:
        reference: The clean items, row i for observation i, in the units of y.
        features: A map from items in model units to features (N, f), whose Frechet distance is recorded too.
    """

    def hook(em: DiffEM, row: dict) -> dict:
        check_reference(reference, em.observations)
        truth = em.observations.cut(reference)
        rows = evenly(np.arange(len(truth)), metrics.most(truth.shape))
        x, clean = em.data.items(em.reconstructions)[rows], em.data.items(truth)[rows]
        return {"clean": metrics.compare(x, clean, features)}

    return hook


def check_reference(reference: np.ndarray, observations: Observations) -> None:
    """Raises a DiffemError unless there is one clean item for each observation."""
    shape = (len(observations), *observations.item_layout.users(observations.shape))
    if tuple(observations.cut(reference).shape) != shape:
        raise DiffemError(f"reference: shape {tuple(reference.shape)}, but the reconstructions have {shape}")


def evaluate(
    run: str | Path,
    reference: str | Path,
    observations: Observations | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch: int | None = None,
) -> dict[str, dict]:
    """Distances of a run to clean items.

    Arguments:
        run: The run folder.
        reference: A .npy of clean items, row i for observation i (or for image i, where observations are patches of
            images).
        observations: The observations of the run; needed for the start's reconstructions and the residuals.
        device: Where networks run; see :func:`diffem.devices.choose`.
        precision: The precision of networks; see :func:`diffem.devices.choose`.
        batch: Observations at a time; by default as many as fit.

    Returns:
        For `start` (only with observations), `reconstructions` and `prior`: the metrics by name, in model units (half
        the range of the data is 1), over at most 4,096 items. `residual` is the root mean square of A x - y, divided by
        the standard deviation of the noise. `nearest_clean` is the mean distance of an item to the nearest clean item,
        `nearest_item` the mean distance of a clean item to the nearest item.
    """
    run, reference = Path(run), Path(reference)
    seed = read_config(run)["em"]["seed"]
    if not reference.exists():
        raise DiffemError(f"{reference}: no such file; --reference is a .npy of clean items")
    clean = open_array(reference)
    if observations is not None:
        clean = observations.cut(clean)
    x = open_array(run / "reconstructions.npy")
    if clean.shape != x.shape:
        raise DiffemError(f"{reference}: shape {clean.shape}, but the run has reconstructions of {x.shape}")
    rows = evenly(np.arange(len(x)), metrics.most(x.shape))
    load = lambda name: from_pretrained(run / name, given, device=device, precision=precision)  # noqa: E731
    given = None if observations is None else observations.corruption
    posterior = load("posterior")
    batch = batch or posterior.batch
    truth, x = (Items(array, posterior.units, posterior.item_layout)[rows] for array in (clean, x))
    table: dict[str, dict] = {}
    data = None if observations is None else Dataset(observations, posterior.units)
    if data is not None:
        drawn = draw_many(load("start").sampler, data, rows, 1, seed, "e_step", batch)[0]
        table["start"] = _paired(drawn, truth, data, rows)
    table["reconstructions"] = _paired(x, truth, data, rows)
    if (run / "prior" / "config.json").exists():
        samples = prior_samples(load("prior").sampler, len(rows), seed, batch)
        table["prior"] = metrics.distances(samples, truth)
    return table


def _paired(x: Tensor, truth: Tensor, data: Dataset | None, rows: np.ndarray) -> dict[str, float]:
    result = {"psnr": metrics.psnr(x, truth, 2.0), **metrics.distances(x, truth)}
    if data is not None and isinstance(data.corruption, LinearCorruption):
        y, params = data.batch(rows)
        noise = data.corruption.noise_std(y, params).expand(y.shape)
        told = data.corruption.seen(y, params).expand(y.shape) & (noise > 0)
        if told.any():
            residual = (data.corruption.forward(x, params) - y)[told] / noise[told]
            result["residual"] = residual.square().mean().sqrt().item()
    return result


def as_text(table: dict[str, dict]) -> str:
    """The table as aligned text, one metric per line."""
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    lines = [f"{'':18s}" + "".join(f"{head:>17s}" for head in table)]
    for name in names:
        cells = "".join(f"{column[name]:17.4f}" if name in column else f"{'-':>17s}" for column in table.values())
        lines.append(f"{name:18s}{cells}")
    return "\n".join(lines)
