"""What a run costs on this machine: the start, an update and a draw are timed at their real sizes, and multiplied.

The start is timed by one and by two rounds of EM on few items, for the candidates of the largest rank; a fit usually takes
about :data:`FIT` rounds on all of them, for each rank. Other work on the machine lengthens what is timed as it lengthens a run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from diffem.config import Config
from diffem.corruptions import LinearCorruption
from diffem.diagnostics.scores import PREDICTIONS, final_splits
from diffem.em import DiffEM
from diffem.observations import Observations

FIT = 8
FIT_ITEMS = 1024


def forecast(observations: Observations, config: Config) -> str:
    """How long a run on these observations will take, in words.

    Arguments:
        observations: The observations.
        config: The configuration of the run; it is built in a temporary folder.

    Raises:
        DiffemError: If the configuration does not fit the observations.
    """
    full, n, em_config, m_step = config.start, len(observations), config.em, config.m_step
    start = replace(full, items=min(full.items, FIT_ITEMS), ranks=(max(full.ranks),))
    once, twice = (replace(config, start=replace(start, iterations=steps)) for steps in (1, 4))
    with tempfile.TemporaryDirectory(prefix="diffem-check-") as folder:
        em = DiffEM(once, observations, folder, allow_unobserved=True)
        em._build(em._initial_prior()[0])
        more = min(full.items, len(em.train)) / min(start.items, len(em.train))
        first = _seconds(em._initial_prior)
        em.config = twice
        a_round = max(_seconds(em._initial_prior) - first, 0.0)
        fit = len(full.ranks) * (first + (FIT * more - 1) * a_round)
    generator, rows = torch.Generator(em.device).manual_seed(0), np.arange(min(config.e_step.batch, n))
    x = np.broadcast_to(np.float32(em.scaling[0]), (n, *em.shape))
    y, params = observations.batch(rows)
    sampler = em._sampler(config.e_step.width, steps=1)  # all steps take equally long
    update = _seconds(lambda: em.trainer.update(em._loss(x, generator, config.denoiser.observation_dropout), 0.0))
    draw = _seconds(lambda: sampler.sample(y, params, torch.from_numpy(rows)).cpu()) / len(rows)
    draw *= config.sampler.evaluations / sampler.sampler.evaluations
    iterations = em_config.iterations
    updates = min(iterations, 1) * m_step.first_steps + max(iterations - 1, 0) * m_step.steps
    scored = em_config.score_draws * isinstance(em.corruption, LinearCorruption)
    often = min(em_config.score_items, len(em.validation)) * em_config.score_splits * scored
    draws = iterations * (em_config.refresh * n + often)
    if iterations:  # the end: widths, the reconstructions, and the test
        rated, tested = (min(len(part), PREDICTIONS) for part in (em.validation, em.test))
        draws += n + scored * (3 * rated * final_splits(rated) + tested * final_splits(tested))  # three widths, or so
        updates += config.prior.steps * (config.prior.kind == "unconditional")
    whole, parts = fit + updates * update + draws * draw, (fit, updates * update, draws * draw)
    first, second, third = (_duration(seconds) for seconds in parts)
    return f"about {_duration(whole)} on this machine, as busy as it is now ({em.device}): {first} for the start, {second} for {updates:,} updates, {third} for {draws:,.0f} draws"


def _seconds(work: Callable[[], object]) -> float:
    """Seconds that it takes: the median of three after a slower first one, or that one if it took seconds."""
    times: list[float] = []
    while len(times) < 4 and (not times or times[0] < 2):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
