"""The M-step: its training examples, and single updates of the network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from diffem import devices, distributed, memory, seeding
from diffem.corruptions import Corruption, Observed, Params
from diffem.data import Dataset, Items, Observations, evenly, open_array
from diffem.denoiser import Denoiser
from diffem.errors import DiffemError

LEAST_RATE = 0.05  # fraction of the learning rate at the end of a linear schedule
CLIP = 1.0  # the largest norm of a gradient
COMPARED = 64  # observations whose parameters are compared: masks, kernels, noise
PASSES = 20  # over the data, in which every item shows its real observation; after n passes a fraction PASSES / n does


@dataclass(frozen=True)
class MStepConfig:
    """The M-step.

    Attributes:
        steps: Optimiser steps per iteration. Raise it for large data sets, lower it to save time.
        first_steps: Steps of the first iteration, which begins with an untrained network. Change it together with
            steps.
        batch: Items per step. Lower it if there are fewer observations than this.
        micro_batch: Items that go through the network at a time; gradients are accumulated. 0 for the whole batch. Set
            it if memory does not suffice; the error says to what.
        learning_rate: Learning rate of Adam. Lower it if the loss jumps, or for large networks (the paper: 1e-4 to
            2e-4).
        schedule: Learning rate schedule: `constant`, or `linear`, which falls to a twentieth over all iterations, and
            again over the training of the prior. Leave it.
        ema: Decay of the exponential moving average of the weights, which the E-step uses. Raise it if steps are many
            (the paper: 0.9999).
        thinned: Fraction of the simulated observations that are thinned: a part of them is hidden, as when a run is
            scored. Set 0 to reproduce the paper.
        imputed_weight: Weight of imputed entries of a reconstruction in the loss; measured ones have weight 1 (lambda
            in `diffem.denoiser`). With 1 all entries weigh the same, and no real observation is shown, as in the paper.
            It applies where parameters (masks, kernels, noise levels) differ between observations, and the corruption
            can say what it measured. Otherwise it is always 1, and so with samplers that are guided by y instead of a
            network that sees y (sampler.kind mmps, dps, ambient). Set 1 to reproduce the paper.
        optimizer: Whether to `carry` or `reset` the state of the optimiser between iterations. Leave it; the paper
            resets.
        flip: Mirror half of the items left to right before they are corrupted. Set it for images with no preferred
            side.
        clean_examples: A .npy file of a few clean items, shape (n, *shape), in the units of y; empty for none. Set it
            if you have some.
        clean_share: Fraction of each batch that is taken from the clean examples. Lower it if they are very few.
    """

    steps: int = 150
    first_steps: int = 600
    batch: int = 128
    micro_batch: int = 0
    learning_rate: float = 2e-3
    schedule: str = "linear"
    ema: float = 0.99
    thinned: float = 0.5
    imputed_weight: float = 0.003
    optimizer: str = "carry"
    flip: bool = False
    clean_examples: str = ""
    clean_share: float = 0.1

    def __post_init__(self) -> None:
        if min(self.steps, self.first_steps, self.batch) < 1 or self.micro_batch < 0:
            raise DiffemError("m_step: steps, first_steps and batch must be at least 1, micro_batch >= 0")
        if not 0 <= self.ema < 1 or not all(0 <= share <= 1 for share in (self.thinned, self.clean_share)):
            raise DiffemError("m_step: ema must be in [0, 1), thinned and clean_share in [0, 1]")
        if not 0 < self.learning_rate < math.inf:
            raise DiffemError(f"m_step.learning_rate: must be > 0, got {self.learning_rate}")
        if not 0 < self.imputed_weight <= 1:
            raise DiffemError(f"m_step.imputed_weight: must be in (0, 1], got {self.imputed_weight}")
        if self.schedule not in ("constant", "linear"):
            raise DiffemError(f"m_step.schedule: must be constant or linear, got {self.schedule!r}")
        if self.optimizer not in ("carry", "reset"):
            raise DiffemError(f"m_step.optimizer: must be carry or reset, got {self.optimizer!r}")

    def rate(self, done: float) -> float:
        """The learning rate when a fraction `done` of the updates has been made."""
        return self.learning_rate * (1.0 if self.schedule == "constant" else max(LEAST_RATE, 1 - done))


@dataclass
class Batch:
    """What one update trains on, in model units.

    Attributes:
        x: Items (B, *shape): reconstructions, and clean examples.
        y: Their observations (B, *y shape), simulated or real.
        params: The parameters of y.
        source: The parameters of the real observations behind the items; None where all entries have equal weight.
        reconstructed: Which items are reconstructions (B,).
        mirrored: Which of the items were mirrored (B,).
    """

    x: Tensor
    y: Tensor
    params: Params
    source: Params | None
    reconstructed: Tensor
    mirrored: Tensor

    def part(self, rows: slice) -> Batch:
        """Some of its items."""
        of = lambda params: {k: v[rows] for k, v in params.items()}  # noqa: E731
        source = None if self.source is None else of(self.source)
        return Batch(self.x[rows], self.y[rows], of(self.params), source, self.reconstructed[rows], self.mirrored[rows])


def measure_differently(observations: Observations, rows: np.ndarray) -> bool:
    """Whether observations measure their items differently (masks, kernels or noise levels differ), and the corruption
    can say how. Then what one of them did not measure is learned from others. Otherwise none of them knows more of any
    part than the others."""
    if type(observations.corruption).measured is Corruption.measured:
        return False
    params = observations.parameters(evenly(rows, COMPARED))
    return any(bool((value != value[:1]).any()) for value in params.values())


class Examples:
    """Training examples of the M-step: reconstructions, observed anew at every update.

    Arguments:
        data: The observations.
        train: The rows of the training observations.
        config: See :class:`MStepConfig`.
        device: Where batches are made.
    """

    def __init__(self, data: Dataset, train: np.ndarray, config: MStepConfig, device: torch.device) -> None:
        self.data, self.train, self.config, self.device = data, train, config, device
        self.weighed = measure_differently(data.observations, train)
        self.clean = self._clean()

    @property
    def digest(self) -> str | None:
        """A checksum of the clean examples; None if there are none."""
        return None if self.clean is None else hashlib.sha256(self.clean.array.tobytes()).hexdigest()[:16]

    def _clean(self) -> Items | None:
        path, shape = self.config.clean_examples, self.data.array_shape[1:]
        if not path:
            return None
        if not Path(path).is_file():
            raise DiffemError(f"m_step.clean_examples: {path}: no such file; it is a .npy of clean items")
        examples = np.asarray(open_array(Path(path)), dtype=self.data.observations.item_layout.dtype)
        if examples.shape[1:] != shape or not len(examples) or not np.isfinite(examples).all():
            raise DiffemError(
                f"m_step.clean_examples: {path}: must hold finite items of shape {shape}, has {examples.shape}"
            )
        return self.data.items(examples)

    def batch(self, x: Items, generator: torch.Generator, updates: int, alone: bool = False) -> Batch:
        """A batch of items and their observations.

        Arguments:
            x: The reconstructions, row i for observation i.
            generator: The source of all random numbers.
            updates: How many updates the weights have had: real observations become rarer with it.
            alone: Whether all observations are withheld; then none is real, and all entries weigh the same.
        """
        config, data, device = self.config, self.data, self.device
        rows = self.train[self._integers(len(self.train), generator)]
        items = devices.put(x[rows], device)
        reconstructed = torch.ones(len(items), dtype=torch.bool, device=device)
        if self.clean is not None:
            chosen = torch.rand(len(items), generator=generator, device=device) < config.clean_share
            items = pick(chosen, devices.put(self.clean[self._integers(len(self.clean), generator)], device), items)
            reconstructed &= ~chosen
        mirrored = torch.zeros_like(reconstructed)
        if config.flip:
            mirrored = torch.rand(len(items), generator=generator, device=device) < 0.5
            items = pick(mirrored, items.flip(-1), items)
        simulated, source = self.simulate(items, generator), None
        if not alone and config.imputed_weight < 1 and self.weighed:
            real = data.batch(rows, device)
            source = real[1]
            simulated = self._split(simulated, real, reconstructed & ~mirrored, generator, updates)
        return Batch(items, *simulated, source, reconstructed, mirrored)

    def simulate(self, x: Tensor, generator: torch.Generator) -> Observed:
        """New observations of items, some of them thinned."""
        y, params = self.data.corruption.observe(x, generator)
        split = self.data.corruption.thin(y, params, generator)
        if split is None or not self.config.thinned:
            return y, params
        chosen = torch.rand(len(x), generator=generator, device=x.device) < self.config.thinned
        return _mixed(chosen, split[0], (y, params))

    def _split(
        self, simulated: Observed, real: Observed, allowed: Tensor, generator: torch.Generator, updates: int
    ) -> Observed:
        """The simulated observations, some of them replaced by a thinned part of the real ones.

        The hidden part is real data, too: it is the target of a splitting loss. All allowed observations are replaced in
        the first :data:`PASSES` passes over the training data. After n passes only PASSES / n of them are, to avoid
        overfitting.

        Arguments:
            simulated: Observations of reconstructions.
            real: The observations that were reconstructed.
            allowed: Which ones may be replaced (B,).
            generator: Draws which ones are replaced, and which part is hidden.
            updates: How many updates have been made.
        """
        split = self.data.corruption.thin(*real, generator)
        if split is None:
            return simulated
        passes = self.config.batch * updates / len(self.train)
        chosen = torch.rand(len(allowed), generator=generator, device=self.device) * passes < PASSES
        some = (split[0][0] != 0).flatten(1).any(1)  # a single row of a projection leaves nothing to show
        return _mixed(chosen & allowed & some, split[0], simulated)

    def _integers(self, below: int, generator: torch.Generator) -> np.ndarray:
        return seeding.integers(below, self.config.batch, generator)


def weigh(x: Tensor, batch: Batch, corruption: Corruption, imputed_weight: float) -> Tensor:
    """W x of :mod:`diffem.denoiser`: the part of x that the source observations measured, plus `imputed_weight` times the rest.

    Clean examples count as measured in every entry.

    Arguments:
        x: Shape (B, *shape), in model units.
        batch: The batch of the items.
        corruption: The corruption in model units.
        imputed_weight: lambda.
    """
    assert batch.source is not None
    measured = corruption.measured(pick(batch.mirrored, x.flip(-1), x), batch.source)
    measured = pick(batch.mirrored, measured.flip(-1), measured)
    return pick(batch.reconstructed, imputed_weight * x + (1 - imputed_weight) * measured, x)


def pick(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The items of a that are chosen (B,), and those of b that are not."""
    return torch.where(chosen.view(-1, *(1,) * (a.ndim - 1)), a, b)


def _mixed(chosen: Tensor, a: Observed, b: Observed) -> Observed:
    """The observations of a that are chosen (B,), and those of b that are not; a mask that b lacks is all true."""
    params = {k: pick(chosen, v, b[1].get(k, torch.ones_like(v))) for k, v in a[1].items()}
    return pick(chosen, a[0], b[0]), params


class Trainer:
    """A denoiser in training, with the running average of its weights.

    Arguments:
        denoiser: What is trained.
        config: See :class:`MStepConfig`.

    Attributes:
        averaged: The same denoiser with the average of the weights; the E-step draws with it.
        weights, averages: The parameters of the two.
        updates: How many updates have been made.
    """

    def __init__(self, denoiser: Denoiser, config: MStepConfig) -> None:
        self.denoiser, self.config, self.updates = denoiser, config, 0
        self.restart()

    def restart(self) -> None:
        """Goes on from the current weights, with a new average and a new optimiser."""
        self.average = AveragedModel(self.denoiser.network)
        # listed once: to walk through the modules of a small network takes as long as its optimiser
        self.weights: list[Tensor] = [*self.denoiser.network.parameters()]
        self.averages: list[Tensor] = [*self.average.module.parameters()]
        self.averaged = self.denoiser.with_network(self.average.module.requires_grad_(False)).eval()
        self.reset_optimizer()

    def compile(self, drawn: int) -> None:
        """Has both networks translated by torch.compile, for updates, and for draws of `drawn` items at a time."""
        mine = distributed.share(self.config.batch)
        sizes = {self.config.micro_batch or mine.stop - mine.start, drawn}
        for denoiser in (self.denoiser, self.averaged):
            denoiser.compile_network(sizes)

    @property
    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return bool(torch.stack([w.isfinite().all() for w in self.weights]).all())

    def restart_from_average(self) -> None:
        """Goes on from the averaged weights, with a new average and a new optimiser."""
        self.denoiser.network.load_state_dict(self.averaged.network.state_dict())
        self.restart()

    def reset_optimizer(self) -> None:
        """Forgets the optimiser's moments."""
        self.optimizer = torch.optim.Adam(self.weights, lr=self.config.learning_rate, fused=True)

    def footprint(self) -> int:
        """Memory that an update takes per item, in bytes."""
        denoiser = self.denoiser
        x = torch.zeros(2, *denoiser.shape)  # two: batch statistics need more than one
        y, params = denoiser.corruption.observe(x, torch.Generator().manual_seed(0))
        x, y, params = x.to(self.device), y.to(self.device), {k: v.to(self.device) for k, v in params.items()}
        with memory.of_update(denoiser.network) as kept, seeding.global_generators(self.device, 0):
            denoiser.loss(x, y, params, torch.Generator(self.device).manual_seed(0))
        return kept[0] // 2

    def refuse_what_does_not_fit(self) -> None:
        """Raises :class:`diffem.memory.TooLarge` if an update needs more memory than there is."""
        item, size = self.footprint(), self.config.micro_batch or self.config.batch
        there = memory.available(self.device)
        if item * size > there:
            fits = 1 << max(there // (2 * item), 1).bit_length() - 1
            raise memory.TooLarge(
                f"m_step: an update of {size} items takes about {memory.words(item * size)} of memory, {memory.words(there)} "
                f"are free; use --m_step.micro_batch {fits}"
            )

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return self.denoiser.device

    def losses(self, batch: Batch, generator: torch.Generator, dropout: float) -> Iterator[Tensor]:
        """The loss of this process's share of a batch as scalar summands, one per micro-batch; `dropout` is the fraction
        of withheld observations."""
        n, mine = len(batch.x), distributed.share(len(batch.x))
        size, state = self.config.micro_batch or n, generator.get_state()
        for start in range(mine.start, mine.stop, size):
            rows = slice(start, min(start + size, mine.stop))
            generator.set_state(state)  # every part sees the same draws
            loss = self.denoiser.loss(
                batch.x, batch.y, batch.params, generator, dropout, self._weigh(batch.part(rows)), rows
            )
            yield loss * ((rows.stop - start) / n)

    def _weigh(self, batch: Batch) -> Callable[[Tensor], Tensor] | None:
        if batch.source is None:
            return None
        return lambda x: weigh(x, batch, self.denoiser.corruption, self.config.imputed_weight)

    def update(self, losses: Iterable[Tensor], rate: float) -> Tensor:
        """One optimiser step on the sum of `losses`, of all processes, with learning rate `rate`, and one step of the average.

        Nothing here waits for a GPU.

        Returns:
            The sum, a scalar. If it is not finite, the weights are spoilt: :meth:`load` earlier ones.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for loss in losses:
            loss.backward()
            total += loss.detach()
        if distributed.size() > 1:
            self._add_those_of_others(total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self._blend()
        self.updates += 1
        return total

    @torch.no_grad()
    def _blend(self) -> None:
        """One step of the average. (AveragedModel's own would wait for a GPU.)"""
        count = int(self.average.n_averaged)
        decay = min(self.config.ema, (1 + count) / (10 + count))  # early on, the average forgets faster
        weight = 1 - decay if count else 1.0  # the first one is a copy
        torch._foreach_lerp_(self.averages, self.weights, weight)
        for old, new in zip(self.average.module.buffers(), self.denoiser.network.buffers(), strict=True):
            old.copy_(new)
        self.average.n_averaged += 1

    def _add_those_of_others(self, loss: Tensor) -> None:
        """Adds the gradients and the losses of all processes."""
        weights = [p for p in self.weights if p.requires_grad]
        for p in weights:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        distributed.add([loss, *(p.grad for p in weights if p.grad is not None)])

    def state(self) -> dict[str, Tensor]:
        """Weights, average and optimiser, by name."""
        network = self.denoiser.network
        tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        names = [name for name, _ in network.named_parameters()]
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[i]}.{slot}": torch.as_tensor(v) for slot, v in slots.items()}
        return {**tensors, "updates": torch.tensor(self.updates)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` returned."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.denoiser.network.load_state_dict(part("network."))
        self.average.load_state_dict(part("average."))
        self.updates = int(tensors["updates"])
        slots: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(self.denoiser.network.named_parameters()):
            if found := part(f"optimizer.{name}."):
                # in the memory layout of before: strides change the rounding of the fused update
                slots[i] = {k: torch.empty_like(parameter).copy_(v) if v.ndim else v for k, v in found.items()}
        if slots:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
