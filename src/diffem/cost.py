"""The cost of a run on this machine: the start, an update and a draw are timed at their real sizes, and multiplied.

The start is timed with one and with two rounds of EM on a subset of the items, for the candidates of the largest rank.
A fit usually takes about :data:`FIT` rounds on all items, for each rank. Other work on the machine slows down the
timing as it slows down a run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from diffem import memory, starts
from diffem.config import Config
from diffem.data import Items, Observations
from diffem.diagnostics.scores import PREDICTIONS, final_splits
from diffem.em import DiffEM
from diffem.judging import DRAWS, SPLITS
from diffem.samplers import draw_many
from diffem.watch import duration

FIT = 8
FIT_ITEMS = 1024


def forecast(observations: Observations, config: Config) -> str:
    """The time and memory that a run on these observations will take, in words.

    Arguments:
        observations: The observations.
        config: The configuration of the run; it is built in a temporary folder.

    Raises:
        DiffemError: If the configuration does not fit the observations.
    """
    full, n, em_config, m_step = config.start, len(observations), config.em, config.m_step
    start = replace(full, items=min(full.items, FIT_ITEMS), ranks=(max(full.ranks),))
    once, twice = (replace(start, iterations=steps) for steps in (1, 4))
    with tempfile.TemporaryDirectory(prefix="diffem-check-") as folder:
        em = DiffEM(config, observations, folder, allow_unobserved=True)
        make = lambda start: starts.make(start, em.data, em.train, em.seed, device=em.device)  # noqa: E731
        first = a_round = 0.0
        posterior = em.given_start
        if posterior is None:
            first = _seconds(lambda: make(once))
            a_round = max(_seconds(lambda: make(twice)) - first, 0.0)
            posterior = em.posterior(make(once)[0])
        posterior.save_pretrained(em.run.folder / "start")
        em.build()
    more = min(full.items, len(em.train)) / min(start.items, len(em.train))
    fit = len(full.ranks) * (first + (FIT * more - 1) * a_round)
    generator, rows = torch.Generator(em.device).manual_seed(0), np.arange(min(em.batch, n))
    middle = np.broadcast_to(em.data.units.centre.astype(np.float32), (n, *em.data.shape))
    x = Items(middle, em.data.units)
    sampler, dropout = em.diffusion(steps=1), config.denoiser.observation_dropout  # all steps take equally long
    update = _seconds(lambda: em.trainer.update(em.losses(x, generator, dropout), rate=0.0))
    draw = _seconds(lambda: draw_many(sampler, em.data, rows, 1, 0, batch=em.batch)) / len(rows)
    draw *= em.sampler_class.evaluations(config.sampler) / em.sampler_class.evaluations(sampler.settings)
    iterations = em_config.iterations
    updates = min(iterations, 1) * m_step.first_steps + max(iterations - 1, 0) * m_step.steps
    scored = DRAWS * em.data.corruption.predictable
    often = min(em_config.score_items, len(em.validation)) * SPLITS * scored
    later = em.sampler_class.evaluations(config.sampler, renoised=em.renoises)
    later /= em.sampler_class.evaluations(config.sampler)
    draws = min(iterations, 1) * n + max(iterations - 1, 0) * em_config.refresh * later * n + iterations * often
    if iterations:  # the end: choice of the width, reconstructions, test score
        rated, tested = (min(len(part), PREDICTIONS) for part in (em.validation, em.test))
        draws += n + scored * (3 * rated * final_splits(rated) + tested * final_splits(tested))  # about three widths
        updates += config.prior.steps * (config.prior.kind == "unconditional")
    whole, parts = fit + updates * update + draws * draw, (fit, updates * update, draws * draw)
    size = m_step.micro_batch or m_step.batch
    first, second, third = (duration(seconds) for seconds in parts)
    return f"about {duration(whole)} on this machine, as busy as it is now ({em.device}): {first} for the start, {second} for {updates:,} updates, {third} for {draws:,.0f} draws; memory: {memory.words(em.trainer.footprint() * size)} for an update of {size}, {memory.words(sampler.footprint() * em.batch)} for {em.batch} draws at a time"


def _seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes: the median of three calls after a first, slower one, or the first if it took 2 s."""
    times: list[float] = []
    while len(times) < 4 and (not times or times[0] < 2):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)
