"""DiffEM: expectation maximisation with a conditional diffusion model as the E-step.

    start: reconstructions x_i ~ q_0(. | y_i) from the initial prior
    for k = 1 .. K
        M-step: train the denoiser d(x_t, t, y) on (x_i, y'), with y' ~ Q(. | x_i) drawn anew at every step
        E-step: draw x_i ~ q_k(. | y_i) for every observation
        gate:   keep the iteration unless held-out observations say that it is worse

A refused iteration leaves reconstructions and saved models as they were; the network goes on training on
the last accepted reconstructions. Held-out observations are reconstructed and scored, never trained on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from diffem import seeding, starts
from diffem.config import Config
from diffem.corruptions import LinearCorruption, Params
from diffem.denoisers import Denoiser
from diffem.diagnostics import Score, score
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.observations import Observations
from diffem.posteriors import (
    DiffusionPosterior,
    MixturePosterior,
    ObservationPosterior,
    PosteriorSampler,
    likelihood_basis,
)
from diffem.run import Run

Progress = Callable[[str, int, int], None]


class DiffEM:
    """A run of the algorithm; :meth:`iterate` yields a row of metrics after the start and every iteration.

    Arguments:
        config: The configuration.
        observations: The observations.
        out: The run folder; if it holds an unfinished run of the same configuration, that one goes on.
        allow_unobserved: Go on although some entry is in no observation.
        progress: Called with what is being done, how much is done, and of how much.
    """

    def __init__(
        self,
        config: Config,
        observations: Observations,
        out: str | os.PathLike[str],
        allow_unobserved: bool = False,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.config, self.observations, self.progress = config, observations, progress
        self.corruption, self.shape, self.seed = observations.corruption, observations.shape, config.em.seed
        missing = [] if allow_unobserved else observations.unobserved()
        if missing:
            raise DiffemError(
                f"{observations.source}: mask.npy: no observation shows entry {list(missing[0])}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, so it cannot be learned; --allow-unobserved goes on"
            )
        self.train, self.held_out = observations.split(self.seed)
        self.scaling = observations.scaling(self.train)
        facts = {
            "observations": len(observations),
            "corruption": self.corruption.config,
            "shape": list(self.shape),
            "scaling": list(self.scaling),
        }
        self.run = Run(out, config, facts)
        self.rows: list[dict] = []

    # --- the algorithm -------------------------------------------------------------------------------

    def iterate(self) -> Iterator[dict]:
        """Runs what is left of the algorithm, yielding each finished row of metrics (finished ones first)."""
        saved = self.run.load_checkpoint()
        if saved is None:
            self._start()
        else:
            self._restore(*saved)
        yield from self.rows
        while self.iteration <= self.config.em.iterations:
            self._clock = time.monotonic() - self.seconds
            if self.phase == "m_step":
                self._m_step()
            if self.phase == "e_step":
                self._e_step()
            if self.phase == "commit":
                self._commit()
            yield self.rows[-1]

    def _start(self) -> None:
        begun = time.monotonic()
        sampler, about = self._initial_prior()
        sampler.save_pretrained(self.run.folder / "start")
        sampler.save_pretrained(self.run.folder / "posterior")
        if isinstance(sampler, MixturePosterior):
            sampler.save_pretrained(self.run.folder / "prior")
        self.run.write("start.json", json.dumps(about, indent=2).encode())
        x = self.run.array("next", (len(self.observations), *self.shape))
        self._reconstruct(sampler, x, iteration=0)
        os.replace(self.run.folder / "next.npy", self.run.folder / "reconstructions.npy")
        first = self._score(sampler)
        self.best = self.first = first
        self.iteration, self.phase, self.step, self.loss_sum = 1, "m_step", 0, 0.0
        self.examples = self.evaluations = 0
        self.row = {}
        self._build(sampler.mixture if isinstance(sampler, MixturePosterior) else None)
        self.seconds = time.monotonic() - begun
        row = {
            "iteration": 0,
            "accepted": True,
            "seconds": self.seconds,
            "examples": 0,
            "network_evaluations": 0,
            "loss": None,
        }
        self.rows.append({**row, **self._judged(first, None), "dispersion": None})
        self.seconds = 0.0
        self.run.save_metrics(self.rows)
        self._checkpoint()

    def _m_step(self) -> None:
        config, x = self.config.m_step, self.run.array("reconstructions")
        target = config.first_steps if self.iteration == 1 else config.steps
        if self.step == 0 and config.optimizer == "reset":
            self.optimizer = self._adam()
        self.network.train()
        while self.step < target:
            generator = seeding.generator(self.seed, self.iteration, "m_step", self.step)
            torch.manual_seed(seeding.fold(self.seed, self.iteration, self.step) >> 1)  # dropout
            rows = self.train[torch.randint(len(self.train), (config.batch,), generator=generator).numpy()]
            clean = torch.from_numpy(x[rows])
            y, params = self._corrupt_again(clean, generator)
            centre, half = self.scaling
            y = self.model_corruption.scale_y(y, params, centre, half)
            loss = self.denoiser.loss((clean - centre) / half, y, params, generator)
            if not torch.isfinite(loss):
                raise DiffemError(
                    f"m_step: the loss is {loss.item()} at iteration {self.iteration}, step {self.step}; lower m_step.learning_rate"
                )
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * self._decay()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
            self.optimizer.step()
            self.updates += 1
            rate = min(config.ema, (1 + self.updates) / (10 + self.updates))
            for averaged, parameter in zip(self.average.parameters(), self.network.parameters(), strict=True):
                averaged.lerp_(parameter.detach(), 1 - rate)
            self.step += 1
            self.loss_sum += loss.item()
            self.window.append(loss.item())
            self.progress(
                f"iteration {self.iteration}, M-step: loss {self.loss_sum / self.step:.3f}", self.step, target
            )
            if self.iteration == 1 and self._settled():
                break
            if self.step % config.checkpoint == 0:
                self._checkpoint()
        self.examples += self.step * config.batch
        self.evaluations += 3 * self.step * config.batch
        self.phase = "e_step"
        self._checkpoint()

    def _e_step(self) -> None:
        sampler = self._sampler()
        self._measure(sampler)
        x = self.run.array("next", (len(self.observations), *self.shape))
        drawn = self._reconstruct(sampler, x, self.iteration)
        self.evaluations += drawn * (self.config.sampler.steps + 1)
        current = self._score(sampler)
        delta, error = current.difference(self.best)
        accepted = delta <= self.config.em.gate * error
        self.row = {
            "iteration": self.iteration,
            "accepted": accepted,
            "seconds": time.monotonic() - self._clock,
            "examples": self.examples,
            "network_evaluations": self.evaluations,
            "loss": self.loss_sum / self.step,
            **self._judged(current, (delta, error)),
            "dispersion": sampler.dispersion,
        }
        if accepted and delta < 0:
            self.best = current
        self.residual, self.phase = sampler.residual, "commit"
        self._checkpoint()

    def _commit(self) -> None:
        # Every action here can be done twice: a run killed between two of them repeats the first.
        if self.row["accepted"]:
            following = self.run.folder / "next.npy"
            if following.exists():
                os.replace(following, self.run.folder / "reconstructions.npy")
            sampler = self._sampler(self.row["dispersion"])
            sampler.save_pretrained(self.run.folder / "posterior")
            sampler.save_pretrained(self.run.folder / "prior")
        (self.run.folder / "next.npy").unlink(missing_ok=True)
        if not self.rows or self.rows[-1]["iteration"] != self.row["iteration"]:
            self.rows.append(self.row)
        self.run.save_metrics(self.rows)
        self.iteration, self.phase, self.step, self.loss_sum, self.window = self.iteration + 1, "m_step", 0, 0.0, []
        self.examples = self.evaluations = 0
        self.seconds = 0.0
        self._clock = time.monotonic()
        self._checkpoint()

    # --- its parts -----------------------------------------------------------------------------------

    def _initial_prior(self) -> tuple[PosteriorSampler, dict]:
        kind = self.config.start.resolve(self.corruption)
        if kind == "observation":
            return ObservationPosterior(self.corruption, self.shape, self.scaling), {"kind": kind}
        assert isinstance(self.corruption, LinearCorruption)
        mixture, about = starts.fit(
            self.config.start,
            self.observations,
            self.train,
            self.corruption.scaled(*self.scaling),
            self.scaling,
            self.seed,
            lambda text: self.progress(text, 0, 1),
        )
        return MixturePosterior(self.corruption, self.shape, self.scaling, mixture), {"kind": kind, **about}

    def _build(self, start: Mixture | None) -> None:
        self.model_corruption = self.corruption.scaled(*self.scaling)
        if start is not None:  # memory laid out as after a resume: strides change the rounding of products
            start = Mixture(
                *(v.clone(memory_format=torch.contiguous_format) for v in start.tensors.values()), basis=start.basis
            )
        make = lambda: Denoiser(self.model_corruption, self.shape, self.config.denoiser, self.config.network, start)  # noqa: E731
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.fold(self.seed, 0) >> 1)
            self.denoiser, self.averaged_denoiser = make(), make()
        self.network, self.average = self.denoiser.network, self.averaged_denoiser.network
        self.average.load_state_dict(self.network.state_dict())
        self.average.requires_grad_(False).eval()
        self.optimizer, self.updates = self._adam(), 0
        self.window: list[float] = []
        self.residual = torch.ones(self.config.sampler.steps + 1, 3)

    def _adam(self) -> torch.optim.Optimizer:
        config = self.config.m_step
        return torch.optim.AdamW(self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    def _decay(self) -> float:
        if self.config.m_step.schedule == "constant":
            return 1.0
        done = (self.iteration - 1 + self.step / self.config.m_step.steps) / max(self.config.em.iterations, 1)
        return max(0.05, 1 - min(done, 1.0))

    def _settled(self, window: int = 200) -> bool:
        """Whether the loss fell by less than 1 % between the last two windows, after having fallen at all."""
        if self.step < max(2 * window, self.config.m_step.steps) or self.step % window:
            return False
        first = float(np.mean(self.window[:50]))
        before, after = float(np.mean(self.window[-2 * window : -window])), float(np.mean(self.window[-window:]))
        return 0.99 * before < after and before < 0.97 * first

    def _corrupt_again(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Params]:
        """Fresh observations of reconstructions, a part of them thinned."""
        params = self.corruption.draw(len(x), self.shape, generator)
        y = self.corruption.apply(x, params, generator)
        split = self.corruption.thin(y, params, generator)
        if split is None or not self.config.m_step.thinned:
            return y, params
        (thin_y, thin_params), _ = split
        chosen = torch.rand(len(x), generator=generator) < self.config.m_step.thinned
        pick = lambda a, b: torch.where(chosen.view(-1, *(1,) * (a.ndim - 1)), a, b)  # noqa: E731
        whole = {k: params.get(k, torch.ones_like(v)) for k, v in thin_params.items()}
        return pick(thin_y, y), {k: pick(v, whole[k]) for k, v in thin_params.items()}

    def _sampler(self, dispersion: float | None = None) -> DiffusionPosterior:
        if dispersion is None:
            dispersion = self.config.e_step.dispersion(self.iteration, self.config.em.iterations)
        return DiffusionPosterior(
            self.corruption,
            self.shape,
            self.scaling,
            self.averaged_denoiser,
            self.config.sampler,
            self.config.network,
            self.residual,
            dispersion,
        )

    def _measure(self, sampler: DiffusionPosterior) -> None:
        """Residual variances, on re-corrupted held-out reconstructions of the last accepted iteration."""
        rows = self.held_out[:512]
        x = torch.from_numpy(self.run.array("reconstructions")[rows])
        y, params = self._corrupt_again(x, seeding.generator(self.seed, self.iteration, "e_step"))
        sampler.measure(x, y, params, seeding.item_seeds(self.seed, self.iteration, "score", rows))

    def _reconstruct(self, sampler: PosteriorSampler, out: np.memmap, iteration: int) -> int:
        """Draws reconstructions into `out`; returns how many were drawn, not kept (em.refresh)."""
        before = self.run.array("reconstructions") if iteration and self.config.em.refresh < 1 else None
        done = drawn = 0
        for chunk in self.observations.chunks(size=self.config.e_step.batch):
            seeds = seeding.item_seeds(self.seed, iteration, "e_step", chunk)
            fresh = np.ones(len(chunk), dtype=bool)
            if before is not None:
                fresh = (seeding.uniform(seeds, stream=20_000) < self.config.em.refresh).numpy()
                out[chunk[~fresh]] = before[chunk[~fresh]]
            if fresh.any():
                y, params = self.observations.batch(chunk[fresh])
                out[chunk[fresh]] = sampler.sample(y, params, seeds[fresh]).numpy()
            drawn += int(fresh.sum())
            done += len(chunk)
            self.progress(f"iteration {iteration}, E-step", done, len(self.observations))
        out.flush()  # the memory map is complete before a checkpoint says so
        return drawn

    def _score(self, sampler: PosteriorSampler) -> Score:
        config = self.config.em
        return score(sampler, self.observations, self.held_out[: config.score_items], self.seed, config.score_draws)

    def _judged(self, current: Score, delta: tuple[float, float] | None) -> dict:
        start = None if delta is None else current.difference(self.first)
        return {
            "score_name": current.name,
            "score": current.mean,
            "score_se": current.standard_error,
            "delta": delta and delta[0],
            "delta_se": delta and delta[1],
            "start_delta": start and start[0],
            "start_delta_se": start and start[1],
            "ratio": current.ratio,
        }

    # --- state ---------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        names = [name for name, _ in self.network.named_parameters()]
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[i]}.{slot}": torch.as_tensor(v) for slot, v in slots.items()}
        tensors |= {f"start.{k}": v for k, v in self.denoiser.reference.tensors.items()}
        tensors |= {"residual": self.residual, "best": self.best.items, "first": self.first.items}
        state = {
            "iteration": self.iteration,
            "phase": self.phase,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "window": self.window if self.iteration == 1 else [],
            "updates": self.updates,
            "examples": self.examples,
            "evaluations": self.evaluations,
            "seconds": time.monotonic() - getattr(self, "_clock", time.monotonic()),
            "row": self.row,
            "rows": self.rows,
            "best": {"name": self.best.name, "ratio": self.best.ratio},
            "first": {"name": self.first.name, "ratio": self.first.ratio},
            "start": self.denoiser.precondition == "start",
        }
        self.run.save_checkpoint(tensors, state)

    def _restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        start = None
        if state["start"]:
            basis = likelihood_basis(self.corruption, self.shape)
            start = Mixture(*(tensors[f"start.{n}"] for n in Mixture.names), basis=basis)
        self._build(start)
        part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.network.load_state_dict(part("network."))
        self.average.load_state_dict(part("average."))
        slots: dict[int, dict] = {}
        for i, (name, _) in enumerate(self.network.named_parameters()):
            found = {
                s: tensors[k] for s in ("step", "exp_avg", "exp_avg_sq") if (k := f"optimizer.{name}.{s}") in tensors
            }
            if found:
                slots[i] = found
        if slots:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.residual = tensors["residual"]
        self.best = Score(state["best"]["name"], tensors["best"], state["best"]["ratio"])
        self.first = Score(state["first"]["name"], tensors["first"], state["first"]["ratio"])
        for name in (
            "iteration",
            "phase",
            "step",
            "loss_sum",
            "window",
            "updates",
            "examples",
            "evaluations",
            "seconds",
            "row",
            "rows",
        ):
            setattr(self, name, state[name])
        self.run.save_metrics(self.rows)
