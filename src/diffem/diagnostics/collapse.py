r"""Collapse watch: whether reconstructions or prior samples have become too narrow, too few, copies, or impossible.

EM with an imperfect sampler fails by losing variance: draws become narrow, kinds of items die out, and the next model
learns from the rest. Every number here compares two quantities whose distributions are equal in a healthy run, so that
its healthy value is known without clean data; :data:`NUMBERS` gives the meaning, healthy value and limit of each. Let
:math:`x_i` be a reconstruction of the held-out observation :math:`y_i`, :math:`y'_i` a new observation of it, and
:math:`z_i` prior samples, equally many:

* **spread**: the calibration ratio of :mod:`diffem.diagnostics.scores`, as measured by the run.
* **diversity** of reconstructions: :math:`E|y'_i - y'_j| \,/\, E|y_i - y_j|`, with the rows that
  :mod:`diffem.diagnostics.divergence` compares; **prior diversity**: the same with new observations of the :math:`z_i`.
  Noise and masks add to both sides, so this hardly detects differences that the observations hardly show.
* **neighbours**: :math:`E \min_j |z_i - z_j| \,/\, E \min_j |x_i - x_j|`. It compares the two models: if both have
  collapsed in the same way, it is 1.
* **duplicates**: the share of the :math:`z_i` that are nearer to another prior sample than 95 % of the reconstructions
  are to another reconstruction; **memorised**: the same with distances to reconstructions of training observations.
  The model of the held-out reconstructions was trained on those, too, so copying by both models goes unnoticed. A prior
  that is too narrow also raises these shares.
* **nearest**: the distance of :math:`y_i` from the nearest :math:`A_i x_j`, :math:`j \neq i`, divided by that of
  :math:`y'_i` from the nearest :math:`A'_i x_j`: root mean squares over the observed entries. Above 1, some
  observations are unlike the reconstructions of all others. It needs a forward operator: a black box has none.
* **outside**: how far the :math:`x_i` lie outside the stated range of the data (root mean square, in units of half that
  range); about 0. If a blur is assumed too wide, reconstructions explain the observations as well as the true items do,
  but leave the range. Computed only if a range is stated.

A number causes a warning if it is beyond its limit, on one side only, and more than three standard errors from its
healthy value. Draws that vary too much are told by the coverage of intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffem import seeding
from diffem.data import Dataset
from diffem.diagnostics.divergence import observe_anew
from diffem.diagnostics.scores import OVER_CONFIDENT

ERRORS = 3.0
CLOSE = 0.05  # the share of reconstructions that count as having a close neighbour
TINY = 1e-12


@dataclass(frozen=True)
class Number:
    """A number that is watched: its healthy value, its limit, its meaning, and the warning beyond the limit."""

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
    """Those :data:`NUMBERS` that can be computed, ready for JSON.

    Arguments:
        x: A reconstruction of each of the observations `rows`, (n, *shape), in model units.
        samples: Prior samples (n, *shape), or None.
        training: Reconstructions of training observations (N, *shape).
        data: The observations.
        rows: The held-out observations that were reconstructed.
        seed: Seed of the operator parameters and noise with which x and samples are observed anew.
        ratio: The calibration ratio and the standard error of its logarithm.

    Returns:
        By name: `value`; `healthy`; `error`, the standard error of a healthy value; `meaning`; and `warning`, or None.
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


def narrow(ratio: tuple[float, float] | None) -> list[str]:
    """The warning about draws that vary far too little, if there is one, for few observations: the ratio is more than
    three standard errors beyond the limit.

    Arguments:
        ratio: The calibration ratio and the standard error of its logarithm.
    """
    if ratio is None or not -math.log(max(ratio[0], TINY)) > ERRORS * ratio[1] - math.log(OVER_CONFIDENT):
        return []
    return [NUMBERS["spread"].warning.format(value=ratio[0])]


def _told(number: Number, value: float, error: float) -> dict:
    beyond = (number.limit - value) * (number.healthy - number.limit) > 0
    wrong = beyond and abs(value - number.healthy) > ERRORS * error
    warning = number.warning.format(value=value, healthy=number.healthy) if wrong else None
    return {"value": value, "healthy": number.healthy, "error": error, "meaning": number.meaning, "warning": warning}


def _ratio(above: Tensor, below: Tensor, parts: int = 1) -> tuple[float, float]:
    """Ratio of the means of two independent samples, and the standard error of its logarithm.

    `parts` is 2 for averages over pairs, given as the mean over the partners of each item (Hoeffding's projection).
    """
    first, second = (parts**2 * a.var() / len(a) / a.mean().clamp(min=TINY) ** 2 for a in (above, below))
    return (above.mean() / below.mean().clamp(min=TINY)).item(), (first + second).sqrt().item()


def _share(theirs: Tensor, ours: Tensor) -> tuple[float, float]:
    """The share of `theirs` below the quantile CLOSE of `ours`, and its standard error if their distributions are
    equal."""
    share = (theirs < ours.quantile(CLOSE)).double().mean().item()
    # The quantile is as uncertain as the share is, and neighbours come in pairs.
    return share, (2 * CLOSE * (1 - CLOSE) * (1 / len(theirs) + 1 / len(ours))) ** 0.5


def _outside(x: Tensor, low: float, high: float) -> tuple[float, float]:
    """How far the items lie outside the range (root mean square, in units of half the range), and its standard
    error."""
    beyond = (x - x.clamp(low, high)).flatten(1).double() / ((high - low) / 2)
    squares = beyond.square().mean(1)
    value = squares.mean().sqrt().item()
    return value, squares.std().item() / len(x) ** 0.5 / max(2 * value, TINY)


def _mean_distances(rows: Tensor) -> Tensor:
    """The mean distance of each row (n, d) to the other rows, (n,)."""
    return torch.cdist(rows, rows).sum(1) / (len(rows) - 1)


def _neighbours(rows: Tensor) -> Tensor:
    """The distance of each row (n, d) to the nearest other row, (n,)."""
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
            mean[i] = torch.inf  # its own reconstruction depends on it
            least.append(mean.amin().sqrt())
        distances.append(torch.stack(least).double())
    observed, again = distances
    influence = observed / observed.mean().clamp(min=TINY) - again / again.mean().clamp(min=TINY)
    return (observed.mean() / again.mean().clamp(min=TINY)).item(), (influence.std() / len(x) ** 0.5).item()
