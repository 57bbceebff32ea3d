"""DiffEM: expectation maximisation with a conditional diffusion model as the E-step.

    start: reconstructions x_i ~ q_0(. | y_i) from the initial prior
    for k = 1 .. K
        M-step: train the denoiser d(x_t, t, y) on pairs (x_i, y'), where y' is a new simulated observation of x_i, or
                the real y_i with a part hidden; measured entries of x_i have more weight than imputed ones
        E-step: draw x_i ~ q_k(. | y_i) for every observation; from k = 2 on from the last x_i plus noise (em.renoise)
        judge:  score q_k on validation observations; refuse it if it is clearly worse than the best one so far
        commit: put its draws in place, keep q_k if it is the best, end the loop early if none was for a while
    end: choose the width of the best q_k, draw again, and report its score on test observations
    prior: train the denoiser without an observation, d(x_t, t), on the best reconstructions

Held-out observations are never trained on. The score is how well q_k predicts hidden parts of them (for a black box:
whether reconstructions of training observations, corrupted again, look like these). One half of the held-out
observations, the validation part, is used for selection (:mod:`diffem.selection`). The other half, the test part, is
only used for reporting.

A run is a sequence of the steps below (:data:`STEPS`),

    start, e_step, judge, commit, (m_step, e_step, judge, commit) for every iteration,
    end, e_step (unless the draws are at hand), judge, commit, prior (unless prior.kind is joint, or the start is kept)

Each is a function of the run (:class:`DiffEM`, in :mod:`diffem.loop`, which also says how a killed run goes on).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffem import distributed, files, memory, seeding, starts
from diffem.errors import DiffemError
from diffem.judging import chosen_width, elapsed, precise_score, row_of, selection_score
from diffem.loop import ABOUT_THE_END, DiffEM, Progress, draw_all, finish, rest, roll_back, with_hooks
from diffem.posterior import from_pretrained
from diffem.samplers import DiffusionSampler
from diffem.selection import Selection, to_start

REFRESH = 20_000  # the random stream that decides which reconstructions are drawn anew


def start(em: DiffEM) -> None:
    """Fit the initial prior, in an empty run folder: what an earlier run left there is removed."""
    folder = em.run.folder
    old = "metrics.jsonl", "reconstructions.npy", "good.safetensors", "previous.safetensors"  # of a run that was here
    for name in (*ABOUT_THE_END, *old):
        (folder / name).unlink(missing_ok=True)
    if em.given_start is not None:
        posterior, about = em.given_start, {"kind": em.given_start.sampler.kind, "run": em.config.start.run}
    else:
        tell = lambda text: em.watch(Progress(text, 0, 0, 1))  # noqa: E731
        sampler, about = starts.make(em.config.start, em.data, em.train, em.seed, tell, em.device, em.run.once)
        posterior = em.posterior(sampler)
        memory.give_back()  # a fit takes more than any later step
    posterior.save_pretrained(folder / "start")
    posterior.save_pretrained(folder / "posterior")
    shutil.rmtree(folder / "prior", ignore_errors=True)
    given = Path(em.config.start.run) / "prior"
    if em.config.start.run and given.exists():
        from_pretrained(given, em.observations.corruption, **em.place).save_pretrained(folder / "prior")
    elif posterior.sampler.kind != "observation":
        posterior.save_pretrained(folder / "prior")
    em.run.write("start.json", json.dumps(about, indent=2).encode())
    em.build()
    em.next("e_step")


def m_step(em: DiffEM) -> None:
    """Train the denoiser on the reconstructions."""
    config, first = em.config.m_step, em.state.iteration == 1
    if em.state.updates == 0 and config.optimizer == "reset":
        em.trainer.reset_optimizer()
    if train_network(em, config.first_steps if first else config.steps, em.config.denoiser.observation_dropout):
        em.next("e_step")


def train_network(em: DiffEM, steps: int, dropout: float) -> bool:
    """Updates the network until this iteration has `steps` updates; `dropout` is the fraction of items without an
    observation. Returns False after a rollback."""
    state, trainer, x = em.state, em.trainer, em.items("current")
    # an extended run uses this iteration number again: other random numbers than in its M-step
    purpose = "prior_step" if state.step == "prior" else "m_step"
    own_seed = em.seed if distributed.first() else seeding.fold(em.seed, distributed.rank())
    loss: Tensor | None = None  # of the last update; read only during the next one, since a GPU would be waited for

    def finite() -> bool:
        """Adds the loss of the last update to the sum; false if it is not finite."""
        nonlocal loss
        if loss is not None and math.isfinite(value := float(loss)):
            state.loss_sum, loss = state.loss_sum + value, None
        return loss is None

    def save() -> None:
        if finite():
            em.checkpoint()

    trainer.denoiser.network.train()
    while state.updates < steps:
        em.unsaved = True
        keys = state.iteration, purpose, state.updates
        generator = seeding.generator(em.seed, *keys, em.device)
        with seeding.global_generators(em.device, own_seed, *keys):  # of dropout layers
            following = trainer.update(em.losses(x, generator, dropout), learning_rate(em, state.updates / steps))
        if not finite():
            break
        loss, mean = following, state.loss_sum / state.updates if state.updates else None
        state.updates += 1
        em.watch(Progress(state.step, state.iteration, state.updates, steps, mean))
        rest(em, save)
    if not finite():
        assert loss is not None
        what = f"the loss is {float(loss)}"
    elif not trainer.finite:  # the gradient of the last update was not
        what = "weights are not finite"
    else:
        return True
    roll_back(em, f"{what} at iteration {state.iteration}, update {state.updates - 1}")
    return False


def learning_rate(em: DiffEM, within: float) -> float:
    """The learning rate of the next update, when a fraction `within` of this iteration's updates is done."""
    iterations, done = em.config.em.iterations, em.state.iteration - 1 + within
    return em.config.m_step.rate(within if em.state.step == "prior" else done / iterations) / 2**em.state.failures


def e_step(em: DiffEM) -> None:
    """Draw a reconstruction of every observation, or of a fraction of them (em.refresh); the others keep theirs."""
    state, config, data, sampler = em.state, em.config.em, em.data, em.sampler
    later = state.final is None and state.iteration > 0
    fraction, renoises = config.refresh if later else 1.0, later and state.iteration > 1 and em.renoises
    purpose = "e_step" if state.final is None else "end"  # an extended run uses this iteration number again

    def renewed(rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The keys of those rows that are drawn anew, and these rows."""
        seeds = seeding.item_seeds(em.seed, state.iteration, purpose, rows)
        chosen = seeding.uniform(seeds, stream=REFRESH) < fraction  # all, if the fraction is 1
        return seeds[chosen], rows[chosen.numpy()]

    def draw(rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Those rows that are drawn anew, and their draws."""
        seeds, fresh = renewed(rows)
        if not len(fresh):
            return fresh, torch.zeros(0, *data.shape)
        (y, params), seeds = data.batch(fresh, sampler.device), seeds.to(sampler.device)
        if renoises:
            x = sampler.renoise(em.items("current")[fresh].to(sampler.device), y, params, seeds)
        else:
            x = sampler.draw(y, params, seeds)
        return fresh, x.cpu()

    if bad := draw_all(em, draw):
        what = f"the draws of {len(bad)} observations (first: {bad[0]}) are not finite at iteration {state.iteration}"
        if state.width is None:
            raise DiffemError(f"start: {what}")
        roll_back(em, what)
        return
    evaluations = 0 if state.width is None else em.sampler_class.evaluations(em.config.sampler, renoises)
    _, drawn = renewed(np.arange(len(data)))  # counted again, since a resumed E-step has drawn only a part of them
    em.next("judge", evaluations=len(drawn) * evaluations)


def judge(em: DiffEM) -> None:
    """Score the iteration, and decide whether it is accepted, and whether it is the best."""
    state, config, sampler = em.state, em.config.em, em.sampler
    if state.final is not None:  # the final model is scored on test observations; this score decides nothing
        first = precise_score(em, "start", em.start.sampler, em.test)
        current = precise_score(em, "end", sampler, em.test)
        verdict = {"accepted": True, "best": True, "final": state.final, **to_start(current, first)}
        verdict |= {"start_score": first.mean, "start_score_se": first.standard_error, "start_ratio": first.ratio}
    else:
        current = selection_score(em, sampler)
        if state.iteration == 0:
            em.selection = Selection.begin(config.guard, config.patience, current)
            verdict = {"accepted": True, "best": True}
        else:
            verdict = em.selection.decide(current)
    em.next("commit", row=with_hooks(em, row_of(em, current, verdict)))


def commit(em: DiffEM) -> None:
    """Put the results of the iteration in place. Every action can be done twice, since a killed run repeats some."""
    state, folder = em.state, em.run.folder
    em.run.forget_previous()  # it is of a step that needs next.npy
    if (folder / "next.npy").exists():
        if state.row["accepted"]:
            os.replace(folder / "next.npy", folder / "current.npy")
        else:
            (folder / "next.npy").unlink()
    if state.row["best"]:
        files.link(folder / "current.npy", folder / "reconstructions.npy")
    if state.row["best"] and state.width is not None:
        scores = state.row if "final" in state.row else None
        em.posterior(em.sampler).save_pretrained(folder / "posterior", scores)
        if em.config.prior.kind == "joint":
            em.posterior(em.diffusion(width=1.0)).save_pretrained(folder / "prior")
    state.rows.append(state.row)
    last = state.iteration >= em.config.em.iterations or em.selection.over
    if state.final is None:
        following: dict[str, Any] = {"step": "end"} if last else {"step": "m_step", "width": em.config.sampler.width}
    elif state.final and em.config.prior.kind == "unconditional":
        em.trainer.restart_from_average()
        following = {"step": "prior"}
    else:
        following = {"step": "done"}
    em.next_iteration(**following)
    if em.state.step == "done":
        finish(em)


def end(em: DiffEM) -> None:
    """Choose the final model: the best iteration at its best width, from which all reconstructions are drawn; or the
    start."""
    state, folder = em.state, em.run.folder
    best = state.best
    files.link(folder / "reconstructions.npy", folder / "current.npy")
    if not best["iteration"]:
        em.next("judge", final=0)
        return
    saved = from_pretrained(folder / "posterior", em.observations.corruption, **em.place).sampler
    assert isinstance(saved, DiffusionSampler)
    em.trainer.averaged.network.load_state_dict(saved.denoiser.network.state_dict())
    width = chosen_width(em, best["width"])
    partly = em.config.em.refresh < 1 or (em.renoises and best["iteration"] > 1)
    again = partly or width != best["width"]
    em.next("e_step" if again else "judge", final=best["iteration"], width=width)


def prior(em: DiffEM) -> None:
    """Train the denoiser without observations, on the best reconstructions."""
    config, state = em.config, em.state
    if not train_network(em, config.prior.steps, dropout=1.0):
        return
    if em.run.writes:
        em.posterior(em.diffusion(width=1.0, steps=config.prior.sampler_steps)).save_pretrained(em.run.folder / "prior")
    about = {
        "steps": state.updates,
        "examples": state.updates * config.m_step.batch,
        "seconds": elapsed(em._clock),
    }
    em.run.write("prior.json", json.dumps({**about, "loss": state.loss_sum / state.updates}, indent=2).encode())
    em.next_iteration("done")
    finish(em)


STEPS: dict[str, Callable[[DiffEM], None]] = {f.__name__: f for f in (start, m_step, e_step, judge, commit, end, prior)}
DiffEM.steps = STEPS
