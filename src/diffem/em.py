"""DiffEM: expectation maximisation with a conditional diffusion model as the E-step.

    start: reconstructions x_i ~ q_0(. | y_i) from the initial prior
    for k = 1 .. K
        M-step: train the denoiser d(x_t, t, y) on (x_i, y'), with y' ~ Q(. | x_i), or a part of y_i, drawn anew at every step;
                what y_i measured of x_i weighs more than what q_k-1 imputed
        E-step: draw x_i ~ q_k(. | y_i) for every observation
        judge:  refuse the iteration if validation observations say that it is worse; save it if it is the best; stop in time
    end: choose the width of the best q_k, draw again, and report its score on test observations
    prior: train the denoiser without an observation, d(x_t, t), on the best reconstructions

Held-out observations are reconstructed and scored, never trained on. Half of them, the validation part, selects: see
:mod:`diffem.selection`. The other half, the test part, only reports.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from diffem import devices, files, metrics, seeding, starts
from diffem.config import Config
from diffem.corruptions import LinearCorruption, Params
from diffem.denoisers import Denoiser
from diffem.diagnostics import PREDICTIONS, Score, final_splits, score
from diffem.diagnostics.divergence import energy_items
from diffem.errors import DiffemError
from diffem.m_step import Trainer
from diffem.mixtures import Mixture
from diffem.observations import Observations, evenly, open_array
from diffem.posteriors import (
    DiffusionPosterior,
    MixturePosterior,
    ObservationPosterior,
    PosteriorSampler,
    from_pretrained,
    likelihood_basis,
)
from diffem.run import Run
from diffem.selection import GATE, Selection, to_start

Progress = Callable[[str, int, int], None]
PASSES = 20  # passes over the data in which every item shows a part of its real observation; after n, PASSES / n do
COMPARED, CORRUPTED = 2048, 4  # at most 2,048 reconstructions score a black box; each is corrupted 4 times
WIDTHS = (0.5, 0.7, 1.0, 1.5, 2.5, 4.0, 6.0, 9.0)  # the end chooses among them


@dataclass
class State:
    """Where a run is: what a checkpoint holds beside tensors."""

    iteration: int = 1
    phase: str = "m_step"  # then e_step, commit, and m_step of the next one; at the end last, prior, done
    step: int = 0  # of the optimiser, in this phase
    loss_sum: float = 0.0
    examples: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    score_seconds: float = 0.0  # of them, what scores took
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
        self.train, self.validation, self.test = observations.split(self.seed)
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
        self.selection: Selection

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
            if self.state.phase == "last":
                self._last()
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
        em = self.config.em
        self.selection = Selection.begin(em.guard, em.patience, self._judge(sampler, x))
        self.state.iteration = 0
        verdict = {"accepted": True, "best": True}
        self.state.rows.append(self._row(self.selection.first, verdict, 0, sampler, x))
        self._next("m_step" if em.iterations else "last", 1)

    def _save_start(self, sampler: PosteriorSampler) -> None:
        """Makes the start what the run folder holds."""
        sampler.save_pretrained(self.run.folder / "posterior")
        shutil.rmtree(self.run.folder / "prior", ignore_errors=True)
        earlier = Path(self.config.start.run) / "prior"
        if self.config.start.run and earlier.exists():
            from_pretrained(earlier, self.corruption, *self.place).save_pretrained(self.run.folder / "prior")
        elif not isinstance(sampler, ObservationPosterior):
            sampler.save_pretrained(self.run.folder / "prior")

    def _m_step(self) -> None:
        state, config = self.state, self.config.m_step
        first = state.iteration == 1
        if state.step == 0 and config.optimizer == "reset":
            self.trainer.reset_optimizer()
        self._train(config.first_steps if first else config.steps, self.config.denoiser.observation_dropout)
        state.phase = "e_step"
        self._checkpoint()

    def _e_step(self) -> None:
        state, sampler = self.state, self._sampler(self.config.e_step.width)
        x = self.run.array("next", (len(self.observations), *self.shape))
        drawn = self._reconstruct(sampler, x, state.iteration)
        current = self._judge(sampler, x)
        state.row = self._row(current, self.selection.decide(current), drawn, sampler, x)
        state.phase = "commit"
        self._checkpoint()

    def _commit(self) -> None:
        # Every action here can be done twice: a run killed between two of them repeats the first.
        state = self.state
        last = "of" in state.row  # the row of what the run ends with
        if state.row["accepted"]:
            self._keep_reconstructions(state.row["best"])
        if state.row["best"] and state.row.get("of") != 0:
            sampler = self._sampler(state.row["width"])
            sampler.save_pretrained(self.run.folder / "posterior")
            if self.config.prior.kind == "joint":
                self._sampler(1.0).save_pretrained(self.run.folder / "prior")
        (self.run.folder / "next.npy").unlink(missing_ok=True)
        state.rows.append(state.row)
        if last and state.row["of"]:
            self._finish()
        elif last:
            self._next("done")
        elif self.selection.over or state.iteration == self.config.em.iterations:
            self._next("last", state.iteration + 1)
        else:
            self._next("m_step", state.iteration + 1)

    def _keep_reconstructions(self, best: bool) -> None:
        """Makes the next reconstructions those that train, and, if they are the best, those of the run."""
        folder = self.run.folder
        if (folder / "next.npy").exists():
            os.replace(folder / "next.npy", folder / "current.npy")
        if best:
            files.link(folder / "current.npy", folder / "reconstructions.npy")

    def _last(self) -> None:
        """What the run ends with: the best iteration at its best width, with reconstructions that are all drawn from it; or
        the start. Test observations score both."""
        state, folder = self.state, self.run.folder
        best = next(row for row in reversed(state.rows) if row["best"])
        start = from_pretrained(folder / "start", self.corruption, *self.place)
        sampler, x, drawn = start, self.run.array("reconstructions"), 0
        files.link(folder / "reconstructions.npy", folder / "current.npy")
        if best["iteration"]:
            saved = from_pretrained(folder / "posterior", self.corruption, *self.place)
            assert isinstance(saved, DiffusionPosterior)
            self.trainer.averaged.network.load_state_dict(saved.denoiser.network.state_dict())
            sampler = self._sampler(self._chosen_width(best["width"]))
            if sampler.width != best["width"] or self.config.em.refresh < 1:
                x = self.run.array("next", (len(self.observations), *self.shape))
                drawn = self._reconstruct(sampler, x, state.iteration)
        first, current = (self._closely(s, self.test) for s in (start, sampler))
        verdict = {"accepted": True, "best": True, "of": best["iteration"], **to_start(current, first)}
        about = {"start_score": first.mean, "start_score_se": first.standard_error, "start_ratio": first.ratio}
        state.row, state.phase = self._row(current, {**verdict, **about}, drawn, sampler, x), "commit"
        self._checkpoint()

    def _chosen_width(self, width: float) -> float:
        """1, or the width that is better on validation observations, by more than the error."""
        can = self.config.sampler.guidance == "none" and isinstance(self.corruption, LinearCorruption)
        if not (can and self.config.em.guard and width):
            return width

        @cache
        def found(k: int) -> Score:
            return self._closely(self._sampler(WIDTHS[k]), self.validation)

        k = one = WIDTHS.index(1.0)
        if not math.isfinite(found(one).criterion):
            return width
        for step in (1, -1):
            while 0 <= k + step < len(WIDTHS) and found(k + step).criterion < found(k).criterion:
                k += step
        delta, error = found(k).criterion_difference(found(one))
        return WIDTHS[k] if delta < -GATE * error else 1.0

    def _finish(self) -> None:
        """Goes on to the prior, unless the posterior's own network is it."""
        if self.config.prior.kind == "unconditional":
            self.trainer.restart_from_average()
            self._next("prior")
        else:
            self._next("done")

    def _prior(self) -> None:
        state = self.state
        self._train(self.config.prior.steps, dropout=1.0)
        sampler = self._sampler(width=1.0, steps=self.config.prior.sampler_steps)
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
            self.device,
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

    def _train(self, target: int, dropout: float) -> None:
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
            self.progress(f"{what}: loss {state.loss_sum / state.step:.3f}", state.step, target)
            if state.step % config.checkpoint == 0:
                self._checkpoint()
        state.examples, state.evaluations = state.step * config.batch, 3 * state.step * config.batch

    def _loss(self, x: np.ndarray, generator: torch.Generator, dropout: float) -> Tensor:
        """The loss of one batch of reconstructions, observed anew."""
        config, (centre, half) = self.config.m_step, self.scaling
        rows = torch.randint(len(self.train), (config.batch,), generator=generator, device=self.device)
        index = self.train[rows.cpu().numpy()]
        clean = torch.from_numpy(x[index]).to(self.device)
        reconstructed = torch.ones(len(clean), dtype=torch.bool, device=self.device)
        if self.examples is not None:
            chosen = torch.rand(len(clean), generator=generator, device=self.device) < config.clean_share
            rows = torch.randint(len(self.examples), (config.batch,), generator=generator, device=self.device)
            clean = _pick(chosen, torch.from_numpy(self.examples[rows.cpu().numpy()]).to(clean), clean)
            reconstructed &= ~chosen
        mirrored = torch.zeros_like(reconstructed)
        if config.flip:
            mirrored = torch.rand(len(clean), generator=generator, device=self.device) < 0.5
            clean = _pick(mirrored, clean.flip(-1), clean)
        y, params = self._corrupt_again(clean, generator)
        weigh = None
        # without parameters every observation measures the same, and there is nothing to weigh
        if dropout < 1 and config.imputed_weight < 1 and self.observations.params:
            real, source = self.observations.batch(index)
            real, source = real.to(self.device), {k: v.to(self.device) for k, v in source.items()}
            y, params = self._split((y, params), (real, source), reconstructed & ~mirrored, generator)
            weigh = self._weigh(source, reconstructed, mirrored)
        y = self.model_corruption.scale_y(y, params, centre, half)
        return self.trainer.denoiser.loss((clean - centre) / half, y, params, generator, dropout, weigh)

    def _split(
        self,
        simulated: tuple[Tensor, Params],
        real: tuple[Tensor, Params],
        allowed: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Params]:
        """The simulated observations, some of them replaced by a thinned part of the real ones.

        What is hidden of them is real, too: this is what a network on the splitting loss learns from. All are replaced in the
        first :data:`PASSES` over the training observations; after n passes PASSES / n of them, or they would be learned by heart.

        Arguments:
            simulated: Observations (B, *y shape) of reconstructions, and their parameters.
            real: The observations that were reconstructed, and theirs.
            allowed: Which ones may be replaced (B,).
            generator: Draws which ones are, and what is hidden of them.
        """
        split = self.corruption.thin(*real, generator)
        if split is None:
            return simulated
        passes = self.config.m_step.batch * self.trainer.updates / len(self.train)
        chosen = torch.rand(len(allowed), generator=generator, device=self.device) * passes < PASSES
        some = (split[0][0] != 0).flatten(1).any(1)  # a single row of a projection leaves nothing to show
        return _mixed(chosen & allowed & some, split[0], simulated)

    def _weigh(self, source: Params, reconstructed: Tensor, mirrored: Tensor) -> Callable[[Tensor], Tensor]:
        """W of :mod:`diffem.denoisers`, of a batch of items.

        Arguments:
            source: Parameters of the real observations behind the items.
            reconstructed: Which items are reconstructions (B,); clean examples are measured in every entry.
            mirrored: Which of the items were mirrored (B,).
        """
        share = self.config.m_step.imputed_weight

        def weigh(x: Tensor) -> Tensor:
            turned = _pick(mirrored, x.flip(-1), x)
            measured = self.model_corruption.measured(turned, source)
            measured = _pick(mirrored, measured.flip(-1), measured)
            return _pick(reconstructed, share * x + (1 - share) * measured, x)

        return weigh

    def _decay(self, target: int) -> float:
        """The share of the learning rate that is left."""
        if self.config.m_step.schedule == "constant":
            return 1.0
        within = self.state.step / target
        done = (
            within if self.state.phase == "prior" else (self.state.iteration - 1 + within) / self.config.em.iterations
        )
        return max(0.05, 1 - done)

    def _corrupt_again(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Params]:
        """Fresh observations of reconstructions, a part of them thinned."""
        y, params = self.corruption.observe(x, generator)
        split = self.corruption.thin(y, params, generator)
        if split is None or not self.config.m_step.thinned:
            return y, params
        chosen = torch.rand(len(x), generator=generator, device=x.device) < self.config.m_step.thinned
        return _mixed(chosen, split[0], (y, params))

    def _sampler(self, width: float, steps: int | None = None) -> DiffusionPosterior:
        config = self.config.sampler if steps is None else dataclasses.replace(self.config.sampler, steps=steps)
        return self.sampler_class(
            self.corruption,
            self.shape,
            self.scaling,
            self.trainer.averaged,
            config,
            self.config.network,
            width,
        )

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

    def _judge(self, sampler: PosteriorSampler, x: np.ndarray) -> Score:
        """What the selection compares: the score of validation observations; of a black box, how far its reconstructions x
        of training observations, observed anew, are from the observations."""
        if isinstance(self.corruption, LinearCorruption):
            return self._score(
                sampler, evenly(self.validation, self.config.em.score_items), self.config.em.score_splits
            )
        rows, began = evenly(self.train, COMPARED), time.monotonic()
        found = energy_items(torch.from_numpy(x[rows]), self.observations, rows, self.scaling, self.seed, CORRUPTED)
        self.state.score_seconds += time.monotonic() - began
        return Score("energy_distance", found)

    def _score(self, sampler: PosteriorSampler, rows: np.ndarray, splits: int) -> Score:
        began = time.monotonic()
        found = score(sampler, self.observations, rows, self.seed, self.config.em.score_draws, splits)
        self.state.score_seconds += time.monotonic() - began
        return found

    def _closely(self, sampler: PosteriorSampler, part: np.ndarray) -> Score:
        """The score of many predictions of a part of the observations."""
        rows = evenly(part, PREDICTIONS)
        return self._score(sampler, rows, final_splits(len(rows)))

    def _row(self, current: Score, verdict: dict, drawn: int, sampler: PosteriorSampler, x: np.ndarray) -> dict:
        """A row of metrics: `verdict` is the selection's, `drawn` the items that the sampler's network drew into x."""
        state = self.state
        return {
            "iteration": state.iteration,
            "seconds": self._seconds(),
            "score_seconds": state.score_seconds,
            "examples": state.examples,
            "network_evaluations": state.evaluations + drawn * self.config.sampler.evaluations,
            "loss": state.loss_sum / state.step if state.step else None,
            "score_name": current.name,
            "score": current.mean,
            "score_se": current.standard_error,
            "log_score": current.log_score,
            "criterion": current.criterion,
            "ratio": current.ratio,
            "ratio_se": current.ratio_error,
            "width": getattr(sampler, "width", None),
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
        tensors = {**self.trainer.state(), **self.selection.tensors}
        if denoiser.precondition == "start":
            tensors |= {f"start.{k}": v for k, v in denoiser.reference.tensors.items()}
        self.run.save_checkpoint(tensors, {**dataclasses.asdict(self.state), "selection": self.selection.facts})

    def _restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        start = None
        if "start.mean" in tensors:
            basis = likelihood_basis(self.corruption, self.shape)
            start = Mixture(*(tensors[f"start.{n}"] for n in Mixture.names), basis=basis)
        self._build(start)
        self.trainer.load(tensors)
        em = self.config.em
        self.selection = Selection.load(em.guard, em.patience, state.pop("selection"), tensors)
        self.state = State(**state)
        self.run.save_metrics(self.state.rows)


def _pick(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The items of a that are chosen (B,), and those of b that are not."""
    return torch.where(chosen.view(-1, *(1,) * (a.ndim - 1)), a, b)


def _mixed(chosen: Tensor, a: tuple[Tensor, Params], b: tuple[Tensor, Params]) -> tuple[Tensor, Params]:
    """The observations of a that are chosen (B,), and those of b that are not; b may lack masks, as where all is shown."""
    params = {k: _pick(chosen, v, b[1].get(k, torch.ones_like(v))) for k, v in a[1].items()}
    return _pick(chosen, a[0], b[0]), params


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
