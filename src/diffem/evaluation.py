"""A run against clean data: the start, the reconstructions and the prior, in the columns of one table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from diffem import metrics
from diffem.corruptions import LinearCorruption
from diffem.errors import DiffemError
from diffem.observations import Observations, evenly, open_array
from diffem.posteriors import PosteriorSampler, draw_many, from_pretrained, sample_many


def evaluate(
    run: str | Path,
    reference: str | Path,
    observations: Observations | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, dict]:
    """Distances of a run to clean items.

    Arguments:
        run: The run folder.
        reference: A .npy of clean items, row i for observation i.
        observations: What the run was trained on; for the start's reconstructions and the residuals.
        device: Where networks run; see :func:`diffem.devices.choose`.
        precision: How precisely; likewise.

    Returns:
        For `start` (only with observations), `reconstructions` and `prior`: the metrics by name, in model
        units (half the range of the data is 1), over at most 4,096 items. `residual` is the root mean
        square of (A x - y) over the noise's standard deviation; `nearest_clean` the mean distance of an item to the
        nearest clean one, `nearest_item` that of a clean one to the nearest item.
    """
    run, reference = Path(run), Path(reference)
    if not (run / "config.yaml").exists():
        raise DiffemError(f"{run}: is not a run folder (no config.yaml)")
    if not reference.exists():
        raise DiffemError(f"{reference}: no such file; --reference is a .npy of clean items")
    clean = open_array(reference)
    x = np.load(run / "reconstructions.npy", mmap_mode="r")
    if clean.shape != x.shape:
        raise DiffemError(f"{reference}: shape {clean.shape}, but the run has reconstructions of {x.shape}")
    seed = yaml.safe_load((run / "config.yaml").read_text())["em"]["seed"]
    rows = evenly(np.arange(len(x)), metrics.ITEMS)
    posterior = from_pretrained(run / "posterior", device=device, precision=precision)
    centre, half = posterior.scaling
    scaled = lambda a: (torch.as_tensor(np.asarray(a, dtype=np.float32)) - centre) / half  # noqa: E731
    truth = scaled(clean[rows])
    table: dict[str, dict] = {}
    if observations is not None:
        start = from_pretrained(run / "start", device=device, precision=precision)
        drawn = draw_many(start, observations, rows, 1, seed, "e_step")[:, 0]
        table["start"] = _paired(scaled(drawn), truth, start, observations, rows)
    table["reconstructions"] = _paired(scaled(x[rows]), truth, posterior, observations, rows)
    if (run / "prior" / "config.json").exists():
        prior = from_pretrained(run / "prior", device=device, precision=precision)
        table["prior"] = metrics.distances(scaled(sample_many(prior, len(rows), seed)), truth)
    return table


def _paired(
    x: Tensor, truth: Tensor, sampler: PosteriorSampler, observations: Observations | None, rows: np.ndarray
) -> dict[str, float]:
    result = {"psnr": metrics.psnr(x, truth, 2.0), **metrics.distances(x, truth)}
    corruption = sampler.model_corruption
    if observations is not None and isinstance(corruption, LinearCorruption) and corruption.noise > 0:
        y, params = observations.batch(rows)
        y = corruption.scale_y(y, params, *sampler.scaling)
        seen = corruption.seen(y, params).expand(y.shape)
        residual = (corruption.forward(x, params) - y)[seen]
        result["residual"] = (residual.square().mean().sqrt() / corruption.noise).item()
    return result


def as_text(table: dict[str, dict]) -> str:
    """The table as aligned text, one metric a line."""
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    lines = [f"{'':18s}" + "".join(f"{head:>17s}" for head in table)]
    for name in names:
        cells = "".join(f"{column[name]:17.4f}" if name in column else f"{'-':>17s}" for column in table.values())
        lines.append(f"{name:18s}{cells}")
    return "\n".join(lines)
