"""DiffEM: expectation maximisation with a conditional diffusion model as the E-step.

    start: reconstructions x_i ~ q_0(. | y_i) from the initial prior
    for k = 1 .. K
        M-step: train the denoiser d(x_t, t, y) on (x_i, y'), with y' ~ Q(. | x_i) drawn anew at every step
        E-step: draw x_i ~ q_k(. | y_i) for every observation
        guard:  refuse the iteration if observations say that it is worse; save it if it is the best; stop in time
    calibration: widen the best q_k until held-out observations no longer call it over-confident, and draw again; if q_0
        turns out to be better, it is what the run ends with
    prior: train the denoiser without an observation, d(x_t, t), on the best reconstructions

Held-out observations are reconstructed and scored, never trained on. A refused iteration leaves the reconstructions
as they were, and the network goes on training on them; :mod:`diffem.guard` has the rules.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from diffem import devices, files, metrics, seeding, starts
from diffem.config import Config
from diffem.corruptions import LinearCorruption, Params
from diffem.denoisers import Denoiser
from diffem.diagnostics import Score, score
from diffem.diagnostics.divergence import energy_items
from diffem.diagnostics.scores import standard_error
from diffem.errors import DiffemError
from diffem.guard import WIDEST, Guard, compare
from diffem.m_step import Trainer
from diffem.mixtures import Mixture
from diffem.observations import Observations, evenly, open_array
from diffem.posteriors import (
    GROUPS,
    DiffusionPosterior,
    MixturePosterior,
    ObservationPosterior,
    PosteriorSampler,
    from_pretrained,
    likelihood_basis,
)
from diffem.run import Run

Progress = Callable[[str, int, int], None]
COMPARED = 2048  # reconstructions whose divergence is computed,
CORRUPTED = 4  # each of them so often
MEASURED = 512  # held-out reconstructions that measure the corrections of the residual variances
CLOSELY = 0.02  # of a run's evaluations go into a close score, on which width and the choice of the start hang:
PREDICTIONS = 768, 16_384  # at least and at most so many splits of held-out observations are predicted for it,
AGAIN = 32  # each observation split at most so often
REPEATS = 16  # of the predictions of a sampler without a network: nearly free, and half of a difference's error


def scored(config: Config, held_out: int, spent: float | None = None) -> tuple[int, int]:
    """How many of the held-out observations a score takes, and how often each of them is split.

    Arguments:
        config: The configuration.
        held_out: How many there are.
        spent: Evaluations of the network by a run that is to be scored closely; None for the score of an iteration.
    """
    em = config.em
    if spent is None:
        return min(em.score_items, held_out), em.score_splits
    least, most = PREDICTIONS
    predictions = round(min(max(CLOSELY * spent / (em.score_draws * config.sampler.evaluations), least), most))
    items = min(predictions, held_out)
    return items, max(em.score_splits, min(predictions // items, AGAIN))


def repeats(sampler: PosteriorSampler) -> int:
    """How often a sampler predicts every split of a score."""
    return 1 if isinstance(sampler, DiffusionPosterior) else REPEATS


@dataclass
class State:
    """Where a run is: what a checkpoint holds beside tensors."""

    iteration: int = 1
    phase: str = "m_step"  # then e_step, commit, and m_step of the next one; at the end calibration, prior, done
    step: int = 0  # of the optimiser, in this phase
    loss_sum: float = 0.0
    window: list[float] = field(default_factory=list)  # losses of the first M-step
    examples: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    guard_seconds: float = 0.0  # of them, what scores took
    row: dict = field(default_factory=dict)  # of the iteration that waits for its commit
    rows: list[dict] = field(default_factory=list)


class DiffEM:
    """A run of the algorithm; :meth:`iterate` yields a row of metrics after the start and every iteration.

    Arguments:
        config: The configuration.
        observations: The observations.
        out: The run folder; if it holds an unfinished run of the same configuration, that one goes on.
        allow_unobserved: Go on although some entry is in no observation.
        progress: Called with what is being done, how much is done, and of how much.
        start: A posterior sampler to start from, instead of the one that the configuration names.
        reference: Clean items, row i for observation i: distances to them are recorded, and decide nothing.
        features: A map of items in model units to (N, f), where a Frechet distance to the reference is recorded too.
        device: Where networks run; see :func:`diffem.devices.choose`.
        precision: How precisely; likewise.
    """

    denoiser_class = Denoiser
    sampler_class = DiffusionPosterior

    def __init__(
        self,
        config: Config,
        observations: Observations,
        out: str | os.PathLike[str],
        allow_unobserved: bool = False,
        progress: Progress = lambda what, done, total: None,
        start: PosteriorSampler | None = None,
        reference: np.ndarray | None = None,
        features: metrics.Features | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.config, self.observations, self.progress = config, observations, progress
        self.corruption, self.shape, self.seed = observations.corruption, observations.shape, config.em.seed
        self.device, self.precision = devices.choose(device, precision)
        self.place = device, precision
        missing = [] if allow_unobserved else observations.unobserved()
        if missing:
            raise DiffemError(
                f"{observations.source}: mask.npy: no observation shows entry {list(missing[0])}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, so it cannot be learned; --allow-unobserved goes on"
            )
        self.reference, self.features = reference, features
        if reference is not None and tuple(reference.shape) != (len(observations), *self.shape):
            raise DiffemError(
                f"reference: shape {tuple(reference.shape)}, but the reconstructions have {(len(observations), *self.shape)}"
            )
        self.train, self.held_out = observations.split(self.seed)
        self.examples = self._clean_examples()
        if start is None and config.start.kind == "run":
            start = self._earlier_posterior()
        config.sampler.check(self.corruption)
        self.given_start = start
        self.scaling = observations.scaling(self.train) if start is None else start.scaling
        self.model_corruption = self.corruption.scaled(*self.scaling)
        facts = {
            "observations": len(observations),
            "digest": observations.digest(),
            "corruption": self.corruption.config,
            "shape": list(self.shape),
            "scaling": list(self.scaling),
        }
        if self.examples is not None:
            facts["clean_examples"] = hashlib.sha256(self.examples.tobytes()).hexdigest()[:16]
        self.run = Run(out, config, facts)
        self.state = State()
        self.guard: Guard

    @property
    def rows(self) -> list[dict]:
        """The rows of metrics so far."""
        return self.state.rows

    # --- the algorithm -------------------------------------------------------------------------------

    def iterate(self) -> Iterator[dict]:
        """Runs what is left of the algorithm, yielding each finished row of metrics (finished ones first)."""
        saved = self.run.load_checkpoint()
        if saved is None:
            self._start()
        else:
            self._restore(*saved)
        yield from self.state.rows
        known = len(self.state.rows)
        while self.state.phase not in ("prior", "done"):
            self._clock = time.monotonic() - self.state.seconds
            if self.state.phase == "m_step":
                self._m_step()
            if self.state.phase == "e_step":
                self._e_step()
            if self.state.phase == "calibration":
                self._calibration()
            if self.state.phase == "commit":
                self._commit()
            yield from self.state.rows[known:]
            known = len(self.state.rows)
        if self.state.phase == "prior":
            self._clock = time.monotonic() - self.state.seconds
            self._prior()

    def _start(self) -> None:
        self._clock = time.monotonic()
        for name in ("prior.json", "pictures.npz", "diagnostics.json"):  # of a run that was here before
            (self.run.folder / name).unlink(missing_ok=True)
        sampler, about = self._initial_prior()
        self._build(sampler)
        sampler.save_pretrained(self.run.folder / "start")
        self._save_start(sampler)
        self.run.write("start.json", json.dumps(about, indent=2).encode())
        x = self.run.array("next", (len(self.observations), *self.shape))
        self._reconstruct(sampler, x, iteration=0)
        self._keep_reconstructions(best=True)
        divergence = self._divergence(x)
        self.guard = Guard.begin(self.config, self._score(sampler), divergence)
        self.state.iteration = 0
        self.state.rows.append(self._row(self.guard.first, divergence, {"accepted": True, "best": True}, 0, sampler, x))
        self._next("m_step" if self.config.em.iterations else "done", 1)

    def _save_start(self, sampler: PosteriorSampler) -> None:
        """Makes the start what the run folder holds."""
        sampler.save_pretrained(self.run.folder / "posterior")
        shutil.rmtree(self.run.folder / "prior", ignore_errors=True)
        earlier = Path(self.config.start.run) / "prior"
        if self.config.start.run and earlier.exists():
            from_pretrained(earlier, self.corruption, *self.place).save_pretrained(self.run.folder / "prior")
        elif not isinstance(sampler, ObservationPosterior):
            sampler.save_pretrained(self.run.folder / "prior")

    def _start_sampler(self) -> PosteriorSampler:
        return from_pretrained(self.run.folder / "start", self.corruption, *self.place)

    def _m_step(self) -> None:
        state, config = self.state, self.config.m_step
        first = state.iteration == 1
        anew = not first and state.iteration > self.config.em.iterations - config.reinitialise
        if state.step == 0 and anew:
            old = self.trainer.denoiser
            self.trainer = self._trainer(old.reference if old.precondition == "start" else None)
        elif state.step == 0 and config.optimizer == "reset":
            self.trainer.reset_optimizer()
        steps = config.first_steps if first or anew else config.steps
        self._train(steps, self.config.denoiser.observation_dropout, first)
        state.phase = "e_step"
        self._checkpoint()

    def _e_step(self) -> None:
        state = self.state
        sampler = self._sampler(self.guard.width(state.iteration))
        if sampler.dispersion:
            self._measure(sampler)
        x = self.run.array("next", (len(self.observations), *self.shape))
        drawn = self._reconstruct(sampler, x, state.iteration)
        current, divergence = self._score(sampler), self._divergence(x)
        verdict = self.guard.decide(state.iteration, current, divergence)
        state.row = self._row(current, divergence, verdict, drawn, sampler, x)
        self.correction, state.phase = sampler.correction, "commit"
        self._checkpoint()

    def _commit(self) -> None:
        # Every action here can be done twice: a run killed between two of them repeats the first.
        state = self.state
        of = state.row.get("of")  # the calibration's rows have it
        if state.row["accepted"]:
            self._keep_reconstructions(state.row["best"])
        if state.row.get("undone"):
            files.link(self.run.folder / "reconstructions.npy", self.run.folder / "current.npy")
        if of == 0:
            self._save_start(self._start_sampler())
        elif state.row["best"]:
            sampler = self._sampler(state.row["dispersion"])
            sampler.save_pretrained(self.run.folder / "posterior")
            if self.config.prior.kind == "joint":
                sampler.save_pretrained(self.run.folder / "prior")
        (self.run.folder / "next.npy").unlink(missing_ok=True)
        state.rows.append(state.row)
        if of == 0:
            self._next("done")
        elif of is not None:
            self._finish()
        elif self.guard.over or state.iteration == self.config.em.iterations:
            self._next("calibration", state.iteration + 1)
        else:
            self._next("m_step", state.iteration + 1)

    def _keep_reconstructions(self, best: bool) -> None:
        """Makes the next reconstructions those that train, and, if they are the best, those of the run."""
        folder = self.run.folder
        if (folder / "next.npy").exists():
            os.replace(folder / "next.npy", folder / "current.npy")
        if best:
            files.link(folder / "current.npy", folder / "reconstructions.npy")

    def _calibration(self) -> None:
        """What the run ends with, scored closely: the best iteration, widened if held-out observations call it
        over-confident, with reconstructions that are all drawn from it; or the start."""
        state, wanted, folder = self.state, self.config.e_step.ratio, self.run.folder
        last = next(row for row in reversed(state.rows) if row["best"])
        if last["iteration"] == 0:
            return self._next("done")
        saved = from_pretrained(folder / "posterior", self.corruption, *self.place)
        assert isinstance(saved, DiffusionPosterior)
        files.link(folder / "reconstructions.npy", folder / "current.npy")
        self.trainer.averaged.network.load_state_dict(saved.denoiser.network.state_dict())
        self.correction = saved.correction
        sampler = self._sampler(last["dispersion"])
        start = self._start_sampler()
        first, current = self._score(start, True), self._score(sampler, True)
        can_widen = self.config.sampler.kind == "ddpm" and self.config.sampler.guidance == "none"
        if can_widen and current.ratio is not None and current.ratio < wanted:
            sampler, current = self._widened(sampler, last["ratio"], current, first)
        self.correction, x, drawn = sampler.correction, self.run.array("current"), 0
        kept: PosteriorSampler = sampler
        if sampler.dispersion != last["dispersion"] or self.config.em.refresh < 1:
            x = self.run.array("next", (len(self.observations), *self.shape))
            drawn = self._reconstruct(sampler, x, state.iteration)
        divergence, of = self._divergence(x) if drawn else self.guard.divergence, last["iteration"]
        found = compare(current, divergence, first, self.guard.first_divergence)
        if not self.guard.outdoes(found):
            x = self.run.array("next", (len(self.observations), *self.shape))
            self._reconstruct(start, x, iteration=0)
            kept, current, divergence, of = start, first, self.guard.first_divergence, 0
        about = {"start_score": first.mean, "start_score_se": first.standard_error, "start_ratio": first.ratio}
        about |= {f"start_{name}": value for name, value in found.items()}
        verdict = {"accepted": True, "best": True, "of": of, **about}
        state.row, state.phase = self._row(current, divergence, verdict, drawn, kept, x), "commit"
        self._checkpoint()

    def _widened(
        self, sampler: DiffusionPosterior, ratio: float, narrow: Score, first: Score
    ) -> tuple[DiffusionPosterior, Score]:
        """A sampler that is no longer over-confident, and its score, unless that makes it worse than the start.

        Arguments:
            sampler: The best iteration's.
            ratio: What the score of an iteration found of it.
            narrow: Its close score.
            first: That of the start.
        """
        if not sampler.dispersion:
            self._measure(sampler)
        dispersion, sampler.dispersion = sampler.dispersion, WIDEST
        widest = self._score(sampler).ratio  # on what the iteration was scored on: so far off, it need not be close
        assert widest is not None
        assert narrow.ratio is not None
        # The ratio is nearly linear in the dispersion (concave with few steps, which ends wider), and any two sets of hidden
        # entries agree on how much it grows.
        share = (self.config.e_step.ratio / narrow.ratio - 1) / max(widest / ratio - 1, 1e-6)
        sampler.dispersion = dispersion + min(max(share, 0.0), 1.0) * (WIDEST - dispersion)
        current = self._score(sampler, True)
        worse, error = current.difference(first)
        if worse > self.config.em.gate * error:  # the fault is not in the width
            sampler.dispersion, current = dispersion, narrow
        return sampler, current

    def _finish(self) -> None:
        if self.config.prior.kind == "unconditional":
            self.trainer.restart_from_average()
            self._next("prior")
        else:
            self._next("done")

    def _prior(self) -> None:
        state = self.state
        self._train(self.config.prior.steps, dropout=1.0)
        sampler = self._sampler(dispersion=1.0, steps=self.config.prior.sampler_steps)
        self._measure(sampler)
        sampler.save_pretrained(self.run.folder / "prior")
        about = {"steps": state.step, "examples": state.examples, "seconds": self._seconds()}
        self.run.write("prior.json", json.dumps({**about, "loss": state.loss_sum / state.step}, indent=2).encode())
        self._next("done")

    # --- its parts -----------------------------------------------------------------------------------

    def _initial_prior(self) -> tuple[PosteriorSampler, dict]:
        if self.given_start is not None:
            return self.given_start, {"kind": self.given_start.kind, "run": self.config.start.run}
        kind = self.config.start.resolve(self.corruption)
        if kind == "observation":
            return ObservationPosterior(self.corruption, self.shape, self.scaling), {"kind": kind}
        assert isinstance(self.corruption, LinearCorruption)
        assert isinstance(self.model_corruption, LinearCorruption)
        mixture, about = starts.fit(
            self.config.start,
            self.observations,
            self.train,
            self.model_corruption,
            self.scaling,
            self.seed,
            lambda text: self.progress(text, 0, 1),
        )
        return MixturePosterior(self.corruption, self.shape, self.scaling, mixture), {"kind": kind, **about}

    def _clean_examples(self) -> np.ndarray | None:
        path = self.config.m_step.clean_examples
        if not path:
            return None
        if not Path(path).is_file():
            raise DiffemError(f"m_step.clean_examples: {path}: no such file; it is a .npy of clean items")
        examples = np.asarray(open_array(Path(path)), dtype=np.float32)
        if examples.shape[1:] != self.shape or not len(examples) or not np.isfinite(examples).all():
            raise DiffemError(
                f"m_step.clean_examples: {path}: must hold finite items of shape {self.shape}, has {examples.shape}"
            )
        return examples

    def _earlier_posterior(self) -> PosteriorSampler:
        folder = Path(self.config.start.run)
        earlier = from_pretrained(folder / "posterior", self.corruption, *self.place)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        if config["facts"]["digest"] == self.observations.digest() and config["em"]["seed"] != self.seed:
            raise DiffemError(
                f"start.run: {folder} held out others of these observations; use --em.seed {config['em']['seed']}"
            )
        if earlier.shape != self.shape:
            raise DiffemError(f"start.run: {folder} was trained on items of shape {earlier.shape}, not {self.shape}")
        return earlier

    def _build(self, start: PosteriorSampler | Mixture | None) -> None:
        mixture = start if isinstance(start, Mixture) else None
        if isinstance(start, MixturePosterior):
            mixture = start.mixture
        elif isinstance(start, DiffusionPosterior) and start.denoiser.precondition == "start":
            mixture = start.denoiser.reference
        if mixture is not None:  # memory laid out as after a resume: strides change the rounding of products
            tensors = (v.cpu().clone(memory_format=torch.contiguous_format) for v in mixture.tensors.values())
            mixture = Mixture(*tensors, basis=mixture.basis)
        self.trainer = self._trainer(mixture, start.denoiser if type(start) is self.sampler_class else None)
        self.correction = torch.ones(self.config.sampler.steps + 1, GROUPS)

    def _trainer(self, mixture: Mixture | None, earlier: Denoiser | None = None) -> Trainer:
        """A trainer of new weights, or of those of an earlier run."""

        def make() -> Denoiser:
            parts = self.config.denoiser, self.config.network, mixture
            denoiser = self.denoiser_class(self.model_corruption, self.shape, *parts)
            denoiser.precision = self.precision
            return denoiser.to(self.device)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.fold(self.seed, 0) >> 1)
            denoiser, averaged = make(), make()
        if earlier is not None:
            _take_weights(earlier, denoiser)
        return Trainer(denoiser, averaged, self.config.m_step)

    def _train(self, target: int, dropout: float, until_settled: bool = False) -> None:
        state, config, x = self.state, self.config.m_step, self.run.array("current")
        what = "prior" if state.phase == "prior" else f"iteration {state.iteration}, M-step"
        self.trainer.denoiser.network.train()
        while state.step < target:
            generator = seeding.generator(self.seed, state.iteration, "m_step", state.step, self.device)
            torch.manual_seed(seeding.fold(self.seed, state.iteration, state.step) >> 1)  # dropout inside the network
            loss = self._loss(x, generator, dropout)
            value = loss.item()
            if not np.isfinite(value):
                raise DiffemError(
                    f"m_step: the loss is {value} at iteration {state.iteration}, step {state.step}; lower m_step.learning_rate"
                )
            self.trainer.update(loss, config.learning_rate * self._decay(target))
            state.step += 1
            state.loss_sum += value
            if until_settled:
                state.window.append(value)
            self.progress(f"{what}: loss {state.loss_sum / state.step:.3f}", state.step, target)
            if until_settled and self._settled():
                break
            if state.step % config.checkpoint == 0:
                self._checkpoint()
        state.examples, state.evaluations = state.step * config.batch, 3 * state.step * config.batch

    def _loss(self, x: np.ndarray, generator: torch.Generator, dropout: float) -> Tensor:
        """The loss of one batch of reconstructions, observed anew."""
        config, (centre, half) = self.config.m_step, self.scaling
        rows = torch.randint(len(self.train), (config.batch,), generator=generator, device=self.device)
        clean = torch.from_numpy(x[self.train[rows.cpu().numpy()]]).to(self.device)
        if self.examples is not None:
            chosen = torch.rand(len(clean), generator=generator, device=self.device) < config.clean_share
            rows = torch.randint(len(self.examples), (config.batch,), generator=generator, device=self.device)
            clean = _pick(chosen, torch.from_numpy(self.examples[rows.cpu().numpy()]).to(clean), clean)
        if config.flip:
            chosen = torch.rand(len(clean), generator=generator, device=self.device) < 0.5
            clean = _pick(chosen, clean.flip(-1), clean)
        y, params = self._corrupt_again(clean, generator)
        y = self.model_corruption.scale_y(y, params, centre, half)
        return self.trainer.denoiser.loss((clean - centre) / half, y, params, generator, dropout)

    def _decay(self, target: int) -> float:
        """The share of the learning rate that is left."""
        if self.config.m_step.schedule == "constant":
            return 1.0
        within = self.state.step / target
        done = (
            within if self.state.phase == "prior" else (self.state.iteration - 1 + within) / self.config.em.iterations
        )
        return max(0.05, 1 - done)

    def _settled(self, window: int = 200) -> bool:
        """Whether the loss fell by less than 1 % between the last two windows, after having fallen at all."""
        step, losses = self.state.step, self.state.window
        if step < max(2 * window, self.config.m_step.steps) or step % window:
            return False
        first = float(np.mean(losses[:50]))
        before, after = float(np.mean(losses[-2 * window : -window])), float(np.mean(losses[-window:]))
        return 0.99 * before < after and before < 0.97 * first

    def _corrupt_again(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Params]:
        """Fresh observations of reconstructions, a part of them thinned."""
        y, params = self.corruption.observe(x, generator)
        split = self.corruption.thin(y, params, generator)
        if split is None or not self.config.m_step.thinned:
            return y, params
        (thin_y, thin_params), _ = split
        chosen = torch.rand(len(x), generator=generator, device=x.device) < self.config.m_step.thinned
        whole = {k: params.get(k, torch.ones_like(v)) for k, v in thin_params.items()}
        return _pick(chosen, thin_y, y), {k: _pick(chosen, v, whole[k]) for k, v in thin_params.items()}

    def _sampler(self, dispersion: float, steps: int | None = None) -> DiffusionPosterior:
        config = self.config.sampler if steps is None else dataclasses.replace(self.config.sampler, steps=steps)
        return self.sampler_class(
            self.corruption,
            self.shape,
            self.scaling,
            self.trainer.averaged,
            config,
            self.config.network,
            self.correction if steps is None else None,
            dispersion,
        )

    def _measure(self, sampler: DiffusionPosterior) -> None:
        """Corrections of the residual variances, on re-corrupted held-out reconstructions of the last accepted iteration."""
        rows = evenly(self.held_out, MEASURED)
        x = torch.from_numpy(self.run.array("current")[rows])
        y, params = self._corrupt_again(x, seeding.generator(self.seed, self.state.iteration, "e_step"))
        sampler.measure(x, y, params, seeding.item_seeds(self.seed, self.state.iteration, "score", rows))

    def _reconstruct(self, sampler: PosteriorSampler, out: np.memmap, iteration: int) -> int:
        """Draws reconstructions into `out`; returns how many were drawn, not kept (em.refresh)."""
        keep = self.config.em.refresh < 1 and self.state.phase == "e_step"
        before = self.run.array("current") if keep else None
        done = drawn = 0
        for chunk in self.observations.chunks(size=self.config.e_step.batch):
            seeds = seeding.item_seeds(self.seed, iteration, "e_step", chunk)
            fresh = np.ones(len(chunk), dtype=bool)
            if before is not None:
                fresh = (seeding.uniform(seeds, stream=20_000) < self.config.em.refresh).numpy()
                out[chunk[~fresh]] = before[chunk[~fresh]]
            if fresh.any():
                y, params = self.observations.batch(chunk[fresh])
                x = sampler.sample(y, params, seeds[fresh]).numpy()
                bad = chunk[fresh][~np.isfinite(x).reshape(len(x), -1).all(1)]
                if len(bad):
                    raise DiffemError(
                        f"e_step: the draws of {len(bad)} observations (first: {bad[0]}) are not finite at iteration {iteration}; "
                        "lower m_step.learning_rate"
                    )
                out[chunk[fresh]] = x
            drawn += int(fresh.sum())
            done += len(chunk)
            self.progress(f"iteration {iteration}, E-step", done, len(self.observations))
        out.flush()  # the memory map is complete before a checkpoint says so
        return drawn

    def _score(self, sampler: PosteriorSampler, closely: bool = False) -> Score:
        config, began = self.config.em, time.monotonic()
        spent = sum(row["network_evaluations"] for row in self.state.rows) if closely else None
        items, splits = scored(self.config, len(self.held_out), spent)
        rows = evenly(self.held_out, items)
        found = score(sampler, self.observations, rows, self.seed, config.score_draws, splits, repeats(sampler))
        self.state.guard_seconds += time.monotonic() - began
        return found

    def _divergence(self, x: np.ndarray) -> Tensor:
        """What the reconstructions x of training observations add to their divergence."""
        rows, began = evenly(self.train, COMPARED), time.monotonic()
        found = energy_items(torch.from_numpy(x[rows]), self.observations, rows, self.scaling, self.seed, CORRUPTED)
        self.state.guard_seconds += time.monotonic() - began
        return found

    def _row(
        self, current: Score, divergence: Tensor, verdict: dict, drawn: int, sampler: PosteriorSampler, x: np.ndarray
    ) -> dict:
        """A row of metrics: `verdict` is the guard's, `drawn` the items that the sampler's network drew into x."""
        state = self.state
        return {
            "iteration": state.iteration,
            "seconds": self._seconds(),
            "guard_seconds": state.guard_seconds,
            "examples": state.examples,
            "network_evaluations": state.evaluations + drawn * self.config.sampler.evaluations,
            "loss": state.loss_sum / state.step if state.step else None,
            "score_name": current.name,
            "score": current.mean,
            "score_se": current.standard_error,
            "log_score": current.log_score,
            "criterion": current.criterion,
            "divergence": divergence.mean().item(),
            "divergence_se": standard_error(divergence),
            "ratio": current.ratio,
            "ratio_se": current.ratio_error,
            "dispersion": getattr(sampler, "dispersion", None),
            **verdict,
            **self._compared(sampler, x),
        }

    def _compared(self, sampler: PosteriorSampler, x: np.ndarray) -> dict:
        """Distances of the sampler's reconstructions x to the clean reference, if one was given."""
        if self.reference is None:
            return {}
        rows = evenly(np.arange(len(x)), metrics.ITEMS)
        return {"clean": metrics.compare(x[rows], self.reference[rows], self.scaling, self.features)}

    # --- state ---------------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return time.monotonic() - self._clock

    def _next(self, phase: str, iteration: int | None = None) -> None:
        """Begins a phase with counters at zero."""
        self.state = State(iteration=iteration or self.state.iteration, phase=phase, rows=self.state.rows)
        self._clock = time.monotonic()
        self.run.save_metrics(self.state.rows)
        self._checkpoint()
        if phase == "done":
            (self.run.folder / "current.npy").unlink(missing_ok=True)

    def _checkpoint(self) -> None:
        self.state.seconds = self._seconds()
        denoiser = self.trainer.denoiser
        tensors = {**self.trainer.state(), **self.guard.tensors, "correction": self.correction}
        if denoiser.precondition == "start":
            tensors |= {f"start.{k}": v for k, v in denoiser.reference.tensors.items()}
        self.run.save_checkpoint(tensors, {**dataclasses.asdict(self.state), "guard": self.guard.facts})

    def _restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        start = None
        if "start.mean" in tensors:
            basis = likelihood_basis(self.corruption, self.shape)
            start = Mixture(*(tensors[f"start.{n}"] for n in Mixture.names), basis=basis)
        self._build(start)
        self.trainer.load(tensors)
        self.correction = tensors["correction"]
        self.guard = Guard.load(self.config, state.pop("guard"), tensors)
        self.state = State(**state)
        self.run.save_metrics(self.state.rows)


def _pick(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The items of a that are chosen (B,), and those of b that are not."""
    return torch.where(chosen.view(-1, *(1,) * (a.ndim - 1)), a, b)


def _take_weights(earlier: Denoiser, denoiser: Denoiser) -> None:
    """Warm start: the weights of an earlier run, where the networks are of one form."""
    theirs, ours = earlier.network.state_dict(), denoiser.network.state_dict()
    if earlier.precondition != denoiser.precondition:
        raise DiffemError(
            f"start.run: its denoiser.precondition is {earlier.precondition}, this run's is {denoiser.precondition}"
        )
    if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in ours.items()}:
        raise DiffemError("start.run: its network is another one; use the same network section")
    denoiser.network.load_state_dict(theirs)
