"""What carries the steps of :mod:`diffem.em`: the objects of a run, its state, its checkpoints, and how it goes on after
a kill.

A run is a sequence of steps. Each begins from the contents of the run folder, and ends with a checkpoint that names the
next step. A killed run repeats the unfinished part of a step with the same random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffem import devices, distributed, files, memory, seeding, starts
from diffem.config import Config, load_config
from diffem.data import Dataset, Items, Observations, refuse_unobserved
from diffem.errors import DiffemError, ToldElsewhere, unreadable
from diffem.judging import elapsed
from diffem.networks import Given, Network
from diffem.posterior import Posterior, from_pretrained
from diffem.run import Run
from diffem.samplers import DiffusionSampler, Sampler, trained_kind
from diffem.selection import Selection
from diffem.trainer import Examples, Trainer
from diffem.watch import Watch, best_row

ABOUT_THE_END = ("prior.json", "pictures.npz", "diagnostics.json", "report.html")  # files of a finished run
TOGETHER = ("m_step", "e_step", "prior")  # the steps that all processes share; the others are done by the first one
FAILURES = 4  # rollbacks after values that are not finite, before the run ends with an error


@dataclass(frozen=True)
class Progress:
    """Progress of a run: `step` of `iteration`, `done` of `total`; in the M-step also the mean `loss` so far; and an
    estimate of the seconds that are `left` of the run, after its first iteration."""

    step: str
    iteration: int
    done: int
    total: int
    loss: float | None = None
    left: float | None = field(default=None, compare=False)


def refuse_minutes(minutes: float, name: str) -> None:
    """Raises an error that begins with `name`, unless `minutes` can be a time between checkpoints; it may be infinite."""
    if not minutes >= 0:
        raise DiffemError(f"{name}: must be a number of minutes >= 0, got {minutes}")


def stopped() -> None:
    """Ends this process, since another one of the run was asked to stop."""
    raise ToldElsewhere("another process of this run was asked to stop")


Hook = Callable[["DiffEM", dict], dict | None]


@dataclass
class State:
    """The state of a run: everything in a checkpoint except the tensors.

    Attributes:
        step: The step that is next or unfinished.
        iteration: 0 is the start; the final draws have their own number.
        updates: Network updates made in this iteration; `loss_sum` is the sum of their losses.
        evaluations: Evaluations of the network that the E-step took.
        width: The width of the E-step's draws; None at the start.
        final: The iteration whose model is the result of the run (0: the start's), while that model is drawn from and
            scored; None before and after.
        failures: How often an iteration had values that were not finite; each time the learning rate is halved.
        batch: Observations per batch of draws: chosen once, since rounding depends on it.
        seconds: Duration of this iteration, of which `score_seconds` were spent on scores.
        row: The metrics of the iteration that waits for its commit; `rows` holds those of all earlier ones.
    """

    step: str = "start"
    iteration: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    evaluations: int = 0
    width: float | None = None
    final: int | None = None
    failures: int = 0
    batch: int = 0
    seconds: float = 0.0
    score_seconds: float = 0.0
    row: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    @property
    def iterations(self) -> list[dict]:
        """The rows of the start and of the iterations, without the one of the final model."""
        return [row for row in self.rows if "final" not in row]

    @property
    def best(self) -> dict:
        """The row of the best iteration so far."""
        return best_row(self.rows)


class DiffEM:
    """A run of the algorithm; :meth:`iterate` yields a row of metrics after the start and after every iteration, and a
    last row, with `final`, that scores the final model on test observations.

    Arguments:
        config: The configuration, or the name of a preset.
        observations: The observations, or their folder.
        out: The run folder; an unfinished run of the same configuration in it is resumed.
        start: A posterior to start from, instead of the start that the configuration names.
        network: A network of your own, see :class:`diffem.networks.Given`.
        hooks: Called before the commit of the start, of every iteration and of the final model, with this object and
            the row of metrics. A returned dictionary is added to the row; it does not influence the run.
        progress: Called with a :class:`Progress` during the work.
        allow_unobserved: Go on even if some entry is never observed.
        device: Where networks run; see :func:`diffem.devices.choose`.
        precision: Their arithmetic; see :func:`diffem.devices.choose`.
        batch: Observations per batch of draws; by default as many as fit in memory (:mod:`diffem.memory`).
        checkpoint_minutes: Minutes between checkpoints: the most work that a killed run loses. With infinity there are
            none within a step.
        compile: Whether torch.compile translates the network: minutes at the start, for faster updates and draws.
    """

    steps = {}  # by name; diffem.em puts its own here  # noqa: RUF012
    # if set, called after the next checkpoint; it raises an exception to end the run
    stop: Callable[[], object] | None = None
    unsaved = False  # whether the network has updates that are in no checkpoint yet, or one is being written
    trainer: Trainer
    start: Posterior
    selection: Selection

    def __init__(
        self,
        config: Config | str,
        observations: Observations | str | os.PathLike[str],
        out: str | os.PathLike[str],
        start: Posterior | None = None,
        network: Network | None = None,
        hooks: Sequence[Hook] = (),
        progress: Callable[[Progress], None] = lambda progress: None,
        allow_unobserved: bool = False,
        device: str = "auto",
        precision: str = "auto",
        batch: int | None = None,
        checkpoint_minutes: float = 5.0,
        compile: bool = False,
    ) -> None:
        config = load_config(config) if isinstance(config, str) else config
        if not isinstance(observations, Observations):
            observations = Observations.load(Path(observations))
        if batch is not None and batch < 1:
            raise DiffemError(f"batch: must be at least 1, got {batch}")
        refuse_minutes(checkpoint_minutes, "checkpoint_minutes")
        self.config, self.observations, self.seed = config, observations, config.em.seed
        self.network = config.network if network is None else Given(network)
        self.hooks, self.progress, self.watch = hooks, progress, Watch(self)
        self.given_batch, self.checkpoint_minutes = batch, checkpoint_minutes
        self.batch = batch or memory.MOST  # what fits is known when there is a network
        self.device, self.precision = devices.choose(device, precision)
        self.compile = compile
        self.place: dict[str, Any] = {"network": network, "device": device, "precision": precision}
        if not allow_unobserved:
            refuse_unobserved(observations)
        self.sampler_class = trained_kind(config.sampler)
        if not isinstance(self, self.sampler_class.algorithm or DiffEM):
            raise DiffemError(
                f"sampler.kind: {config.sampler.kind} is trained by {self.sampler_class.algorithm.__name__}"
            )
        if distributed.size() > 1 and type(self).losses is not DiffEM.losses:
            raise DiffemError(f"torchrun: {type(self).__name__} runs in one process only")
        self.train, self.validation, self.test = observations.split(self.seed)
        trained_on = {"observations": observations.digest(), "seed": self.seed}
        if start is None and config.start.kind == "run":
            start = from_pretrained(Path(config.start.run) / "posterior", observations.corruption, **self.place)
        starts.refuse(start, observations.corruption, observations.shape, trained_on, config.start.run or "start")
        self.given_start = start
        units = observations.units(self.train) if start is None else start.units
        self.data = Dataset(observations, units, self.train)
        observations.rehearse(self.data.units)
        self.sampler_class.suits(self.data.corruption, config.sampler, config.denoiser)
        self.examples = Examples(self.data, self.train, config.m_step, self.device)
        facts = {
            "observations": len(observations),
            "source": observations.source,
            "digest": trained_on["observations"],
            "corruption": observations.corruption.config,
            "shape": list(observations.shape),
            "scaling": self.data.units.config,
            "range": None if observations.range is None else list(observations.range),
            **({} if self.examples.digest is None else {"clean_examples": self.examples.digest}),
            **({} if network is None else {"own_network": True}),
        }
        self.trained_on = trained_on
        self.run, self.state = Run(out, {**config.to_dict(), "facts": facts}), State()
        self._saved = self._clock = 0.0

    @property
    def rows(self) -> list[dict]:
        """The rows of metrics so far."""
        return self.state.rows

    def iterate(self) -> Iterator[dict]:
        """Runs the rest of the algorithm and yields each row of metrics, first those of finished iterations."""
        with contextlib.ExitStack() as stack:
            distributed.wait()  # until every process has seen the folder as it was
            distributed.shared(lambda: stack.enter_context(self.run.open()))
            if self.run.writes:
                stack.enter_context(self.watch.open())
            alone(self, lambda: resume(self))
            self._saved, known = time.monotonic(), 0
            while True:
                yield from self.rows[known:]
                known = len(self.rows)
                if self.state.step == "done":
                    return
                self._clock = time.monotonic() - self.state.seconds
                step = self.steps[self.state.step]
                if self.state.step in TOGETHER:
                    step(self)
                else:
                    alone(self, lambda step=step: step(self))
                rest(self)

    # --- what the steps share ------------------------------------------------------------------------

    @property
    def sampler(self) -> Sampler:
        """What the E-step of this iteration draws from."""
        return self.start.sampler if self.state.width is None else self.diffusion(width=self.state.width)

    def diffusion(self, **changes) -> DiffusionSampler:
        """Reverse diffusion with the averaged network; `changes` override fields of its :class:`SamplerConfig`."""
        return self.sampler_class(self.trainer.averaged, dataclasses.replace(self.config.sampler, **changes))

    @property
    def renoises(self) -> bool:
        """Whether E-steps from the second iteration on begin at the last reconstructions (`em.renoise`)."""
        return self.config.em.renoise and self.examples.weighed

    def items(self, name: str) -> Items:
        """An array of the run folder, read in model units."""
        return self.data.items(self.run.present(name, self.data.array_shape))

    @property
    def reconstructions(self) -> np.memmap:
        """The draws of this iteration, row i for observation i, in the units and the layout of y; for hooks."""
        return self.run.array("next" if (self.run.folder / "next.npy").exists() else "current")

    def posterior(self, sampler: Sampler) -> Posterior:
        """A sampler as a :class:`Posterior`, in the units of y."""
        of = self.observations
        return Posterior(sampler, of.corruption, self.data.units, self.trained_on, of.layout, of.item_layout)

    def losses(self, x: Items, generator: torch.Generator, dropout: float) -> Iterable[Tensor]:
        """The loss of one update on reconstructions x, as summands (one per micro-batch)."""
        batch = self.examples.batch(x, generator, self.trainer.updates, alone=dropout == 1)
        return self.trainer.losses(batch, generator, dropout)

    # --- state ---------------------------------------------------------------------------------------

    def next(self, step: str, **changes) -> None:
        """Saves a checkpoint from which `step` begins."""
        self.state = dataclasses.replace(self.state, step=step, **changes)
        self.checkpoint()
        self.run.forget_parts()

    def next_iteration(self, step: str, **changes) -> None:
        """Like :meth:`next`, with counters at zero; also writes the metrics, and keeps the checkpoint for rollbacks."""
        state = self.state
        self.run.save_metrics(state.rows)
        self._clock = time.monotonic()
        self.state = State(state.step, state.iteration + 1, failures=state.failures, batch=state.batch, rows=state.rows)
        self.next(step, **changes)
        self.run.keep_checkpoint()

    def checkpoint(self) -> None:
        """Saves everything that a resumed run needs."""
        self.unsaved = True
        self.state.seconds, self._saved = elapsed(self._clock), time.monotonic()
        if not self.run.writes:
            return
        tensors, facts = self.trainer.state(), dataclasses.asdict(self.state)
        if hasattr(self, "selection"):
            tensors, facts = {**tensors, **self.selection.tensors}, {**facts, "selection": self.selection.facts}
        self.run.save_checkpoint(tensors, facts)
        self.unsaved = False

    def build(self) -> None:
        """Loads the start, and builds the trainer, with new weights or with those of an earlier run."""
        self.start = from_pretrained(self.run.folder / "start", self.observations.corruption, **self.place)
        earlier = self.start.sampler
        mixture = None if earlier.mixture is None else earlier.mixture.copied("cpu")
        parts = self.data.corruption, self.data.shape, self.config.denoiser, self.network, mixture
        with seeding.global_generators("cpu", self.seed):
            denoiser = self.sampler_class.denoiser_class(*parts)
        denoiser.precision = self.precision
        kind = self.sampler_class.denoiser_class
        if isinstance(earlier, DiffusionSampler) and type(earlier.denoiser) is kind:
            starts.take_weights(earlier.denoiser, denoiser)
        self.trainer = Trainer(denoiser.to(self.device), self.config.m_step)
        self.trainer.refuse_what_does_not_fit()
        item = max(earlier.footprint(), self.diffusion().footprint())
        self.batch = self.given_batch or self.state.batch or memory.batch(item, self.device)
        self.state.batch = self.batch
        if self.compile:
            self.trainer.compile(self.batch)


def load(em: DiffEM) -> bool:
    """Goes on from the checkpoint, if there is one."""
    saved = em.run.load_checkpoint()
    if saved is None:
        return False
    tensors, facts = saved
    em.state.batch = facts.get("batch", 0)
    if hasattr(em, "trainer"):
        em.trainer.restart()
    else:
        em.build()
    restore(em, tensors, facts)
    return True


def resume(em: DiffEM) -> None:
    """Goes on from the checkpoint; a run that has ended goes on, if it is longer now."""
    if not load(em):
        return
    ended = em.state.final is not None or em.state.step in ("end", "prior", "done")
    more = ended and em.state.iterations[-1]["iteration"] < em.config.em.iterations
    if more and em.run.longer and not em.selection.over:
        go_on(em)
    elif em.state.step == "done":
        finish(em)
    elif em.state.step in ("m_step", "prior") and not em.state.updates:
        em.run.keep_checkpoint()  # the run may have been killed before it kept this one
    em.run.save_metrics(em.rows)
    em.run.save_config()  # last: a run that is killed before this is still recognised as extended


def alone(em: DiffEM, step: Callable[[], None]) -> None:
    """Has the first process do a step; the others go on from the checkpoint that it ends with."""
    distributed.shared(step)
    if not em.run.writes:
        load(em)


def rest(em: DiffEM, save: Callable[[], None] | None = None) -> None:
    """Saves if it is time to, and there is something to save; then ends the run, if some process was asked to stop."""
    stopping = distributed.anyone(em.stop is not None)
    late = abs(time.monotonic() - em._saved) >= 60 * em.checkpoint_minutes  # also if the clock was set back
    if stopping or (late and save is not None):
        if save is not None:
            save()
        em._saved = time.monotonic()
    if stopping:
        distributed.wait()
        (em.stop or stopped)()


def draw_all(em: DiffEM, draw: Callable[[np.ndarray], tuple[np.ndarray, Tensor]]) -> list[int]:
    """Fills next.npy with draws, chunk by chunk. Every process draws a chunk of the observations at a time, and the first
    one writes. What an interrupted run has written is kept.

    Arguments:
        draw: Called with rows of observations. Returns those that are drawn anew (n,), and their draws (n, *shape). The
            others keep their reconstructions.

    Returns:
        The rows whose draws are not finite, of the first chunk that has any, where the work ends; none if all are.
    """
    state, data, rank, size = em.state, em.data, distributed.rank(), distributed.size()
    out, done = em.run.growing("next", data.array_shape, state.iteration, em.observations.item_layout.dtype)
    chunks = [*data.chunks(np.arange(done, len(data)), em.batch)]

    def write(parts: list[tuple[np.ndarray, tuple[np.ndarray, Tensor]] | None]) -> list[int]:
        assert out is not None
        for rows, (fresh, x) in (part for part in parts if part is not None):
            if len(fresh) < len(rows):
                out[rows] = em.run.array("current")[rows]
            bad = fresh[~x.isfinite().flatten(1).all(1).numpy()]
            if len(bad):
                return bad.tolist()
            data.items(out)[fresh] = x
        return []

    for k in range(0, len(chunks), size):
        mine = chunks[k + rank] if k + rank < len(chunks) else None
        try:
            parts = distributed.gathered(None if mine is None else (mine, draw(mine)))
        except BaseException:  # such as a signal
            em.run.grown("next", out, int(chunks[k][0]), state.iteration)
            raise
        if bad := distributed.shared(lambda parts=parts: write(parts)):
            return bad
        filled = int(chunks[min(k + size, len(chunks)) - 1][-1]) + 1
        em.watch(Progress("e_step", state.iteration, filled, len(data)))
        rest(em, lambda filled=filled: em.run.grown("next", out, filled, state.iteration))
    if out is not None:
        out.flush()
    return []


def restore(em: DiffEM, tensors: dict[str, Tensor], facts: dict) -> None:
    """Takes over what a checkpoint holds."""
    config, version, selection = em.config.em, facts.pop("version", None), facts.pop("selection", None)
    try:
        state = State(**facts)
        for name, usual in vars(State()).items():
            if not isinstance(value := getattr(state, name), int | float | None if usual is None else type(usual)):
                raise TypeError(f"{name} is {value!r}")
        if state.step not in (*em.steps, "done"):
            raise ValueError(f"step is {state.step!r}")
        if state.iteration and not any(row["best"] and row["iteration"] >= 0 for row in state.rows):
            raise ValueError("no row is the best")
        em.trainer.load(tensors)
        if selection is not None:
            em.selection = Selection.load(config.guard, config.patience, selection, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DiffemError(
            f"{em.run.folder / 'checkpoint.safetensors'}: {unreadable(version)}; another run can go on from this one: "
            f"--out OTHER --start.kind run --start.run {em.run.folder} ({what})"
        ) from error
    em.state = state


def go_on(em: DiffEM) -> None:
    """Extends a finished run: it goes on from its final model."""
    folder, rows = em.run.folder, em.state.iterations
    files.link(folder / "reconstructions.npy", folder / "current.npy")
    em.run.remove("next.npy", *ABOUT_THE_END)
    em.run.forget_parts()
    saved = from_pretrained(folder / "posterior", em.observations.corruption, **em.place).sampler
    if isinstance(saved, DiffusionSampler) and rows[-1]["iteration"]:
        em.trainer.denoiser.network.load_state_dict(saved.denoiser.network.state_dict())
        em.trainer.restart()
        em.trainer.updates = sum(row["examples"] for row in rows) // em.config.m_step.batch  # without the prior's
    em.state = dataclasses.replace(em.state, iteration=rows[-1]["iteration"], rows=rows)
    em.next_iteration("m_step", width=em.config.sampler.width)
    em.run.forget_previous()  # it is that of a finished run


def roll_back(em: DiffEM, what: str) -> None:
    """Returns to the weights of the last commit, with half the learning rate; the run ends after :data:`FAILURES`
    rollbacks. If the final draws failed, those of the best iteration are kept instead."""
    em.run.remove("next.npy")
    em.run.forget_parts()
    if em.state.final is not None:
        em.next("judge", width=em.state.best["width"])
        return
    failures = em.state.failures + 1
    if failures > FAILURES:
        raise DiffemError(
            f"training: {what}, also at a {2**FAILURES}th of m_step.learning_rate; lower it, or look at the observations"
        )
    em.trainer.load(em.run.kept_checkpoint())
    em.trainer.reset_optimizer()
    step = "prior" if em.state.step == "prior" else "m_step"
    em.next(step, updates=0, loss_sum=0.0, failures=failures)


def finish(em: DiffEM) -> None:
    """Removes files that only an unfinished run needs."""
    em.run.remove("current.npy", "good.safetensors", "previous.safetensors")


def with_hooks(em: DiffEM, row: dict) -> dict:
    """A row of metrics with what the hooks add to it, which must be JSON."""
    for hook in em.hooks:
        added = hook(em, dict(row)) or {}
        try:
            row = json.loads(json.dumps(added, default=lambda value: value.item())) | row  # numbers of numpy and torch
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DiffemError(f"hooks: {added} cannot be written as JSON: {error}") from None
    return row
