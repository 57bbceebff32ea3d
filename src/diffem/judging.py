"""Scores of an iteration, and of the final model of a run, on held-out observations."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from diffem import memory
from diffem.data import evenly
from diffem.diagnostics import PREDICTIONS, Score, final_splits, score
from diffem.diagnostics.divergence import energy_items
from diffem.samplers import WIDTHS, Sampler
from diffem.selection import GATE

if TYPE_CHECKING:
    from diffem.loop import DiffEM

COMPARED, CORRUPTED = 2048, 4  # a black box is scored on at most 2,048 reconstructions, each corrupted 4 times
DRAWS, SPLITS = 2, 2  # to score an iteration: draws per split, and splits per validation observation


def selection_score(em: DiffEM, sampler: Sampler) -> Score:
    """The score that the selection compares, on validation observations. For a black box: the distance between
    training observations and the reconstructions of this iteration, observed anew; `sampler` is not used."""
    config = em.config.em
    if em.data.corruption.predictable:
        return scored(em, sampler, evenly(em.validation, config.score_items), SPLITS)
    most = memory.at_once(math.prod(em.observations.y.shape[1:]), COMPARED)
    rows, began = evenly(em.train, most), time.monotonic()
    found = energy_items(em.items("next")[rows], em.data, rows, em.seed, CORRUPTED)
    em.state.score_seconds += elapsed(began)
    return Score("energy_distance", found)


def scored(em: DiffEM, sampler: Sampler, rows: np.ndarray, splits: int) -> Score:
    """How well a sampler predicts hidden parts of observations."""
    began = time.monotonic()
    found = score(sampler, em.data, rows, em.seed, DRAWS, splits, em.batch)
    em.state.score_seconds += elapsed(began)
    return found


def elapsed(since: float) -> float:
    """Seconds since a time of :func:`time.monotonic`; none where the clock was set back."""
    return max(0.0, time.monotonic() - since)


def precise_score(em: DiffEM, name: str, sampler: Sampler, part: np.ndarray) -> Score:
    """The score of many predictions on a part of the observations; it is saved, and a resumed run does not repeat
    it."""
    rows = evenly(part, PREDICTIONS)
    make = lambda: scored(em, sampler, rows, final_splits(len(rows))).tensors  # noqa: E731
    tensors = em.run.once(f"{em.state.iteration}-{name}", make)
    return Score("crps" if "spread" in tensors else "energy_distance", **tensors)


def chosen_width(em: DiffEM, width: float) -> float:
    """1, or a width whose criterion on validation observations is better by more than :data:`GATE` standard errors: the
    first minimum on the way up or down from 1. `width` itself where there is nothing to choose."""
    if not (em.sampler_class.widens and em.data.corruption.predictable and em.config.em.guard and width):
        return width
    found: dict[int, Score] = {}

    def at(k: int) -> Score:
        if k not in found:
            found[k] = precise_score(em, f"width-{k}", em.diffusion(width=WIDTHS[k]), em.validation)
        return found[k]

    k = one = WIDTHS.index(1.0)
    if not math.isfinite(at(one).criterion):
        return width
    for step in (1, -1):
        while 0 <= k + step < len(WIDTHS) and at(k + step).criterion < at(k).criterion:
            k += step
    delta, error = at(k).criterion_difference(at(one))
    return WIDTHS[k] if delta < -GATE * error else 1.0


def row_of(em: DiffEM, current: Score, verdict: dict) -> dict:
    """The metrics of an iteration; `verdict` comes from the selection."""
    state = em.state
    examples = state.updates * em.config.m_step.batch
    return {
        "iteration": state.iteration,
        "seconds": elapsed(em._clock),
        "score_seconds": state.score_seconds,
        "examples": examples,
        "network_evaluations": 3 * examples + state.evaluations,
        "loss": state.loss_sum / state.updates if state.updates else None,
        "score_name": current.name,
        "score": current.mean,
        "score_se": current.standard_error,
        "log_score": current.log_score,
        "criterion": current.criterion,
        "ratio": current.ratio,
        "ratio_se": current.ratio_error,
        "width": state.width,
        "failures": state.failures,
        **verdict,
    }
