r"""Collapse watch: whether reconstructions or prior samples have become too narrow, too few, copies, or impossible.

EM with an imperfect sampler goes wrong by losing variance: draws narrow, kinds of items die out, and the next model
learns from what is left. Every number here compares two things whose laws are equal while all is well, so that its
healthy value is known without clean data; :data:`NUMBERS` says of each what it is, what is healthy, and what is not. With
:math:`x_i` a reconstruction of held-out observation :math:`y_i`, :math:`y'_i` that observed anew, and :math:`z_i` as
many prior samples:

* **spread**: the calibration ratio of :mod:`diffem.diagnostics.scores`, as the run measured it.
* **diversity** of reconstructions: :math:`E|y'_i - y'_j| \,/\, E|y_i - y_j|`, of the rows that
  :mod:`diffem.diagnostics.divergence` compares; **prior diversity** likewise, with the :math:`z_i` observed anew. Noise
  and masks add to both sides, so that what the observations hardly show is hardly seen here.
* **neighbours**: :math:`E \min_j |z_i - z_j| \,/\, E \min_j |x_i - x_j|`. It compares the two models: if both have
  collapsed alike it is 1.
* **duplicates**: the share of the :math:`z_i` that lie nearer to another one than all but 5 % of the reconstructions do
  to theirs; **memorised**: nearer to a reconstruction of a training observation. Held-out reconstructions are drawn by
  a model that was trained on those too: what both copy, it does not see. A prior that is too narrow crowds, and shows
  here too.
* **nearest**: how far :math:`y_i` is from the nearest :math:`A_i x_j`, :math:`j \neq i`, over how far :math:`y'_i` is
  from the nearest :math:`A'_i x_j`: root mean squares over the entries that are seen. Above 1, there are observations
  unlike any reconstruction of another. It needs a forward operator: a black box has none.
* **outside**: how far the :math:`x_i` lie outside the stated range of the data, root mean square, in halves of that range;
  about 0. A blur that is taken for a wider one explains its observations as well as the true one does, but by what no clean
  item can be. Where no range is stated it is not there.

A number has a warning if it is beyond its limit, by more than three standard errors from what is healthy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffem import seeding
from diffem.data import Dataset
from diffem.diagnostics.divergence import observe_anew
from diffem.diagnostics.scores import OVER_CONFIDENT

ERRORS = 3.0
CLOSE = 0.05  # the share of reconstructions that count as close neighbours
TINY = 1e-12


@dataclass(frozen=True)
class Number:
    """What is watched: its healthy value, the limit of that, what it means, and what is said beyond the limit."""

    healthy: float
    limit: float
    meaning: str
    warning: str


NUMBERS = {
    "spread": Number(
        1.0,
        OVER_CONFIDENT,
        "how much posterior draws vary, over how much their errors say that they should",
        "the posterior draws vary {value:.2f} times as much as their errors say that they should: read their intervals as too narrow",
    ),
    "diversity": Number(
        1.0,
        0.85,
        "how far re-corrupted reconstructions are apart, over how far the observations are",
        "the reconstructions are too much alike: re-corrupted, they are {value:.2f} times as far apart as the observations; fewer em.iterations may keep more of them",
    ),
    "prior_diversity": Number(
        1.0,
        0.85,
        "how far re-corrupted prior samples are apart, over how far the observations are",
        "the prior samples are too much alike: re-corrupted, they are {value:.2f} times as far apart as the observations; do not rely on their variety",
    ),
    "neighbours": Number(
        1.0,
        0.8,
        "how far a prior sample is from the nearest other one, over how far a reconstruction is",
        "the prior samples crowd: they are {value:.2f} times as far from their nearest as the reconstructions are; do not rely on their variety",
    ),
    "duplicates": Number(
        CLOSE,
        0.15,
        "the share of prior samples that nearly repeat another one",
        "the prior repeats itself: {value:.0%} of its samples nearly repeat another one, where {healthy:.0%} would; do not rely on their variety",
    ),
    "memorised": Number(
        CLOSE,
        0.15,
        "the share of prior samples that nearly repeat a reconstruction that it was trained on",
        "the prior copies: {value:.0%} of its samples nearly repeat what it was trained on, where {healthy:.0%} would; do not count them as new",
    ),
    "nearest": Number(
        1.0,
        1.15,
        "how far an observation is from the nearest reconstruction of another, over how far a re-corrupted one is",
        "some observations are unlike all reconstructions of others: {value:.2f} times as far from the nearest as they should be; look at these, and at the declared corruption",
    ),
    "outside": Number(
        0.0,
        0.5,
        "how far reconstructions lie outside the stated range of the data, in halves of it",
        "the reconstructions lie outside the stated range of the data, by {value:.2f} of half of it; is the declared corruption the true one?",
    ),
}


def collapse_watch(
    x: Tensor,
    samples: Tensor | None,
    training: Tensor,
    data: Dataset,
    rows: np.ndarray,
    seed: int,
    ratio: tuple[float, float] | None = None,
) -> dict[str, dict]:
    """The numbers of :data:`NUMBERS` that can be had, ready for JSON.

    Arguments:
        x: A reconstruction of each of the observations `rows`, (n, *shape), in model units.
        samples: Prior samples (n, *shape), or None.
        training: Reconstructions of training observations (N, *shape).
        data: The observations.
        rows: The held-out ones that were reconstructed.
        seed: Of the operator parameters and noise with which x and samples are observed anew.
        ratio: The calibration ratio and the standard error of its logarithm.

    Returns:
        By name: `value`; `healthy`; `error`, the standard error of the value if it is healthy; `meaning`; and `warning`,
        None if all is well.
    """
    seed, found = seeding.fold(seed, *b"collapse"), {}
    flat = lambda a: a.flatten(1).double()  # noqa: E731
    if ratio is not None:
        found["spread"] = ratio
    again, observed, _ = observe_anew(x, data, rows, seed)
    found["diversity"] = _ratio(_mean_distances(again), _mean_distances(observed), 2)
    if samples is not None:
        again, observed, _ = observe_anew(samples, data, rows, seed + 1)
        found["prior_diversity"] = _ratio(_mean_distances(again), _mean_distances(observed), 2)
        theirs, ours, learned = flat(samples), flat(x), flat(training)
        found["neighbours"] = _ratio(_neighbours(theirs), _neighbours(ours))
        found["duplicates"] = _share(_neighbours(theirs), _neighbours(ours))
        found["memorised"] = _share(torch.cdist(theirs, learned).amin(1), torch.cdist(ours, learned).amin(1))
    if data.corruption.linear:
        found["nearest"] = _nearest(x, data, rows, seed + 2)
    if data.observations.range is not None:
        low, high = (data.units.scale(v) for v in data.observations.range)
        found["outside"] = _outside(x, low, high)
    return {name: _told(NUMBERS[name], *pair) for name, pair in found.items()}


def _told(number: Number, value: float, error: float) -> dict:
    beyond = (number.limit - value) * (number.healthy - number.limit) > 0
    wrong = beyond and abs(value - number.healthy) > ERRORS * error
    warning = number.warning.format(value=value, healthy=number.healthy) if wrong else None
    return {"value": value, "healthy": number.healthy, "error": error, "meaning": number.meaning, "warning": warning}


def _ratio(above: Tensor, below: Tensor, parts: int = 1) -> tuple[float, float]:
    """Ratio of the means of two independent samples, and the standard error of its logarithm.

    `parts` is 2 for what is averaged over pairs, given as the mean over the partners of each (Hoeffding's projection).
    """
    first, second = (parts**2 * a.var() / len(a) / a.mean().clamp(min=TINY) ** 2 for a in (above, below))
    return (above.mean() / below.mean().clamp(min=TINY)).item(), (first + second).sqrt().item()


def _share(theirs: Tensor, ours: Tensor) -> tuple[float, float]:
    """The share of their distances below all but CLOSE of ours, and its standard error if their laws are equal."""
    share = (theirs < ours.quantile(CLOSE)).double().mean().item()
    # The quantile is as uncertain as the share is, and neighbours come in pairs.
    return share, (2 * CLOSE * (1 - CLOSE) * (1 / len(theirs) + 1 / len(ours))) ** 0.5


def _outside(x: Tensor, low: float, high: float) -> tuple[float, float]:
    """How far the items lie outside the range, root mean square, in halves of it, and its standard error."""
    beyond = (x - x.clamp(low, high)).flatten(1).double() / ((high - low) / 2)
    squares = beyond.square().mean(1)
    value = squares.mean().sqrt().item()
    return value, squares.std().item() / len(x) ** 0.5 / max(2 * value, TINY)


def _mean_distances(rows: Tensor) -> Tensor:
    """The mean distance of each row (n, d) to the other ones, (n,)."""
    return torch.cdist(rows, rows).sum(1) / (len(rows) - 1)


def _neighbours(rows: Tensor) -> Tensor:
    """The distance of each row (n, d) to the nearest other one, (n,)."""
    return torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(1)


def _nearest(x: Tensor, data: Dataset, rows: np.ndarray, seed: int) -> tuple[float, float]:
    corruption = data.corruption
    pairs = data.batch(rows), corruption.observe(x, seeding.generator(seed, 0, "user"))
    distances = []
    for y, params in pairs:
        target, seen = corruption.compared(y), corruption.seen(y, params).expand_as(y)
        least = []
        for i in range(len(y)):
            own = {name: p[i : i + 1].expand(len(x), *p.shape[1:]) for name, p in params.items()}
            error = (corruption.compared(corruption.forward(x, own)) - target[i]).square() * seen[i]
            mean = error.flatten(1).sum(1) / seen[i].sum().clamp(min=1)
            mean[i] = torch.inf  # its own reconstruction knows it
            least.append(mean.amin().sqrt())
        distances.append(torch.stack(least).double())
    observed, again = distances
    influence = observed / observed.mean().clamp(min=TINY) - again / again.mean().clamp(min=TINY)
    return (observed.mean() / again.mean().clamp(min=TINY)).item(), (influence.std() / len(x) ** 0.5).item()
