r"""Where EM starts: from the observation itself, from a mixture fitted to the observations, or from an earlier run.

A mixture is fitted to nine tenths of the *training* observations; the remaining tenth is for early stopping
(:mod:`diffem.mixtures.fit`) and selects the number of components and the rank. The selected mixture is the one whose
exact posterior best predicts hidden parts of that tenth, by the criterion of :mod:`diffem.diagnostics.scores` that also
compares iterations. The likelihood would select too large a rank, because entries that hardly vary dominate it. One
component is always among the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffem import memory, seeding
from diffem.corruptions import Corruption
from diffem.data import Dataset, evenly
from diffem.denoiser import Denoiser
from diffem.diagnostics.scores import score
from diffem.errors import DiffemError
from diffem.mixtures import Likelihood, Mixture
from diffem.mixtures.fit import Batches, converge, single, spread
from diffem.posterior import Posterior
from diffem.samplers import MixtureSampler, ObservationSampler, Sampler

Once = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
VALIDATION = 0.1
RIDGE = 1.0  # pseudo-observations that regularise each component
BATCH = 256  # observations at a time: larger batches do not fit into the cache of a processor
FIRST = 2048  # observations from which the first guess is made
NUMBERS = 2**23  # limit on the values in one array, for both: fewer observations are taken if items are large
LARGEST = 2 * 2**30  # bytes that the fit of a candidate may take
SCORED, DRAWS, SPLITS = 512, 4, 4  # held-back observations that compare candidates; draws and splits of each
SMALL = 32  # items with at most this many features are fitted in double precision


@dataclass(frozen=True)
class StartConfig:
    """The start of EM.

    Attributes:
        kind: `mixture` (of Gaussians), `gaussian` (one component), `observation`, `run` (the posterior of an earlier
            run, with its weights), or `auto`: `mixture` if the exact posterior is available (linear-Gaussian, and A
            simple or items small), else `observation`. Set `run` to go on from an earlier run, `observation` if a
            mixture takes too long.
        run: The earlier run's folder, for `run`.
        components: Candidates for the number of components; 1 is always tried. Give [1] to save time, more numbers if
            the data are of several kinds.
        ranks: Candidates for the rank: in how many directions the entries of a component vary together (its covariance
            is a diagonal plus a matrix of this rank). Candidates whose fit would take more than 2 GB are left out. Give
            fewer to save time.
        items: At most this many training observations are used. Lower it to save time; more take no more memory.
        iterations: A fit ends after the round that reaches this many EM steps. Lower it to save time.
        tolerance: A fit has converged, and ends, after three rounds in a row (of two or three EM steps each) that raise
            the validation log likelihood of an observation by no more than this. Raise it for large items if the start
            takes too long (preset `fashion-mask75`: 1).
    """

    kind: str = "auto"
    run: str = ""
    components: tuple[int, ...] = (1, 2, 4)
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    items: int = 16384
    iterations: int = 200
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "mixture", "gaussian", "observation", "run"):
            raise DiffemError(f"start.kind: must be auto, mixture, gaussian, observation or run, got {self.kind!r}")
        if (self.kind == "run") != bool(self.run):
            raise DiffemError("start.run: name the folder of an earlier run, together with start.kind run")
        if min(self.components, default=1) < 1 or self.items < 2 or self.iterations < 1:
            raise DiffemError("start: components and iterations must be at least 1, items at least 2")
        if not self.ranks or min(self.ranks) < 0:
            raise DiffemError("start.ranks: give at least one rank >= 0")

    def resolve(self, corruption: Corruption, shape: tuple[int, ...]) -> str:
        """The kind of start for this corruption and items of `shape`; resolves `auto`."""
        exact = corruption.exact(shape)
        if self.kind == "auto":
            return "mixture" if exact else "observation"
        if not exact and self.kind not in ("observation", "run"):
            raise DiffemError(f"start.kind: {self.kind} needs a corruption with a likelihood(); use observation or run")
        return self.kind


def make(
    config: StartConfig,
    data: Dataset,
    train: np.ndarray,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    device: torch.device | str = "cpu",
    once: Once = lambda name, make: make(),
) -> tuple[Sampler, dict]:
    """The sampler that a run starts from, and a record of how it was made.

    Arguments:
        config: See :class:`StartConfig`; of any kind but `run`.
        data: The observations.
        train: The training rows; no others are read.
        seed: Seed of the run.
        progress: Called with a text that says what is being fitted.
        device: The device of the fit.
        once: Returns the stored result of a name, or computes and stores it; see :meth:`diffem.run.Run.once`.
    """
    kind = config.resolve(data.corruption, data.shape)
    if kind == "observation":
        return ObservationSampler(data.corruption, data.shape), {"kind": kind}
    mixture, about = fit(config, data, train, seed, progress, device, once)
    return MixtureSampler(data.corruption, data.shape, mixture), {"kind": kind, **about}


def refuse(
    start: Posterior | None, corruption: Corruption, shape: tuple[int, ...], trained_on: dict, name: str
) -> None:
    """Raises a DiffemError if a posterior cannot be the start of a run.

    Arguments:
        start: The posterior.
        corruption: That of the run.
        shape: The shape of an item.
        trained_on: The digest of the observations, and the seed that determines which of them are held out.
        name: The name of the posterior in error messages.
    """
    if start is None:
        return
    if start.shape != shape:
        raise DiffemError(f"start.run: {name} was trained on items of shape {start.shape}, not {shape}")
    if start.sampler.mixture is not None and not corruption.exact(shape):
        raise DiffemError(
            f"start.run: {name} uses a mixture, whose posterior is not known for {corruption.config['name']}; start from a run with this corruption"
        )
    theirs = start.trained_on or trained_on
    if theirs["observations"] == trained_on["observations"] and theirs["seed"] != trained_on["seed"]:
        raise DiffemError(f"start.run: {name} held out others of these observations; use --em.seed {theirs['seed']}")


def fit(
    config: StartConfig,
    data: Dataset,
    train: np.ndarray,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    device: torch.device | str = "cpu",
    once: Once = lambda name, make: make(),
) -> tuple[Mixture, dict]:
    """The mixture, and a record of the candidates; arguments as for :func:`make`."""
    generator = seeding.generator(seed, 0, "start")
    order = train[torch.randperm(len(train), generator=generator).numpy()[: config.items]]
    cut = max(1, round(VALIDATION * len(order)))
    few = math.prod(data.shape) <= SMALL and torch.device(device).type != "mps"  # mps has no float64
    dtype = torch.float64 if few else torch.float32

    features = math.prod(data.shape)
    components = (1,) if config.resolve(data.corruption, data.shape) == "gaussian" else sorted({1, *config.components})
    at_once = memory.at_once(features * max(components), BATCH, NUMBERS)

    def batches(indices: np.ndarray, size: int = at_once) -> Batches:
        def generate() -> Iterator[Likelihood]:
            for chunk in data.chunks(np.sort(indices), size):
                y, params = data.batch(chunk, device)
                yield data.corruption.likelihood(y.to(dtype), params)

        return generate

    fitting, validating = batches(order[cut:]), batches(order[:cut])
    first = next(batches(order[cut:], memory.at_once(features, FIRST, NUMBERS))())
    unfitted = evenly(np.sort(order[:cut]), SCORED)

    def criterion(mixture: Mixture) -> float:
        sampler = MixtureSampler(data.corruption, data.shape, mixture.copied(torch.float32))
        return score(sampler, data, unfitted, seed, DRAWS, SPLITS, at_once).criterion

    best: tuple[float, Mixture] | None = None
    record = []
    ranks = {min(r, features - 1) for r in config.ranks}
    for rank in sorted({r for r in ranks if footprint(1, r, features) <= LARGEST} or {0}):
        one: Mixture | None = None
        for count in components:
            if count > 1 and footprint(count, rank, features) > LARGEST:
                break
            progress(f"start: {count} component(s) of rank {rank}")
            guess = single(first, rank, features, generator) if one is None else spread(one, count, first, generator)

            def fitted(guess: Mixture = guess) -> dict[str, Tensor]:
                limits = config.iterations, config.tolerance, RIDGE
                mixture, likelihood, iterations = converge(guess, fitting, validating, *limits)
                numbers = torch.tensor([likelihood, iterations, criterion(mixture)], dtype=torch.float64)
                return {**mixture.tensors, "numbers": numbers}

            tensors = once(f"{count}-of-rank-{rank}", fitted)
            likelihood, iterations, found = tensors.pop("numbers").tolist()
            mixture = Mixture(**{k: v.to(device) for k, v in tensors.items()}, basis=guess.basis)
            one = one or mixture
            about = {"components": count, "rank": rank, "log_likelihood": likelihood, "iterations": int(iterations)}
            record.append({**about, "criterion": found})
            if best is None or found < best[0] or not math.isfinite(best[0]):
                best = found, mixture
    assert best is not None
    chosen = best[1].copied(torch.float32)
    return chosen, {"components": chosen.components, "rank": chosen.rank, "candidates": record}


def footprint(components: int, rank: int, features: int) -> int:
    """Approximate bytes used by exact EM: eight times the moments of (latent, 1) of every entry, see
    mixtures/fit.py."""
    return 8 * 4 * components * features * (rank + 1) ** 2


def take_weights(earlier: Denoiser, denoiser: Denoiser) -> None:
    """Warm start: loads the weights of an earlier run; refuses a network of another shape."""
    theirs, ours = earlier.network.state_dict(), denoiser.network.state_dict()
    if earlier.precondition != denoiser.precondition:
        raise DiffemError(
            f"start.run: its denoiser.precondition is {earlier.precondition}, this run's is {denoiser.precondition}"
        )
    if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in ours.items()}:
        raise DiffemError("start.run: its network is another one; use the same network section")
    denoiser.network.load_state_dict(theirs)
