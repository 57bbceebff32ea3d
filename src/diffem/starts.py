r"""Where EM starts: the observation itself, or a Gaussian or mixture prior fitted to the observations by exact EM.

A tenth of the *training* observations is not fitted. Each fit stops when their likelihood no longer rises. How many components
and which rank is decided by how well the exact posterior predicts hidden parts of them: by the criterion of
:mod:`diffem.diagnostics.scores`, which compares iterations, too. The likelihood would choose too large a rank, because
entries that hardly vary dominate it. One component is always among the candidates.

Exact EM is slow where much is missing. It is accelerated by SQUAREM: from the parameters :math:`\theta_0` and two EM steps
:math:`\theta_1, \theta_2`, with :math:`r = \theta_1 - \theta_0`, :math:`v = \theta_2 - \theta_1 - r` and
:math:`a = |r| / |v|`, a third EM step starts from

.. math:: \theta_0 + 2 a r + a^2 v \, .

If the likelihood is lower there than at :math:`\theta_1`, the third step is thrown away and the fit goes on from
:math:`\theta_2`.

Reference:
    | Simple and Globally Convergent Methods for Accelerating the Convergence of Any EM Algorithm
    | (Varadhan & Roland, 2008)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffem import seeding
from diffem.corruptions import Corruption, LinearCorruption
from diffem.diagnostics.scores import score
from diffem.errors import DiffemError
from diffem.mixtures import Diagonal, Likelihood, Mixture, em_step
from diffem.observations import Observations, evenly
from diffem.posteriors import MixturePosterior

VALIDATION = 0.1
BATCH = 256  # observations at a time: larger ones leave the cache of a processor
LEAST = 1e-3  # of a first variance: EM cannot leave 0
SURE = 5.0  # standard errors by which a variance differs from 0
REACH = 4.0  # the largest step length of SQUAREM at first; it grows fourfold where it was reached
FIRST = 2048  # observations that make a first guess
SCORED, DRAWS, SPLITS = 512, 4, 4  # unfitted observations by which candidates are compared, and how closely
ROUNDS = 3  # rounds in a row without a larger validation likelihood, which end a fit


@dataclass(frozen=True)
class StartConfig:
    """The initial prior.

    Attributes:
        kind: `mixture`, `gaussian`, `observation`, `run` (the posterior of an earlier run, with its weights),
            or `auto`: `mixture` where the corruption is linear-Gaussian, else `observation`.
        run: The earlier run's folder, for `run`.
        components: Candidates for the number of components; 1 is always tried.
        ranks: Candidates for the rank of the low-rank part.
        items: At most this many training observations are used.
        iterations: A fit ends after the round that reaches this many EM steps.
        tolerance: A fit ends when the validation log likelihood has not risen by this for three rounds (each two or three EM
            steps).
        ridge: Pseudo-observations that regularise each component; 0 is maximum likelihood.
    """

    kind: str = "auto"
    run: str = ""
    components: tuple[int, ...] = (1, 2, 4)
    ranks: tuple[int, ...] = (4, 8, 16)
    items: int = 16384
    iterations: int = 200
    tolerance: float = 1e-3
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "mixture", "gaussian", "observation", "run"):
            raise DiffemError(f"start.kind: must be auto, mixture, gaussian, observation or run, got {self.kind!r}")
        if (self.kind == "run") != bool(self.run):
            raise DiffemError("start.run: name the folder of an earlier run, together with start.kind run")
        if not self.ranks or min(self.ranks) < 0:
            raise DiffemError("start.ranks: give at least one rank >= 0")

    def resolve(self, corruption: Corruption) -> str:
        """The kind for this corruption."""
        linear = isinstance(corruption, LinearCorruption)
        if self.kind == "auto":
            return "mixture" if linear else "observation"
        if not linear and self.kind not in ("observation", "run"):
            raise DiffemError(f"start.kind: {self.kind} needs a linear-Gaussian corruption; use observation or run")
        return self.kind


Batches = Callable[[], Iterator[Likelihood]]


def fit(
    config: StartConfig,
    observations: Observations,
    train: np.ndarray,
    corruption: LinearCorruption,
    scaling: tuple[float, float],
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    device: torch.device | str = "cpu",
) -> tuple[Mixture, dict]:
    """The mixture prior in model units and a record of the candidates.

    Arguments:
        config: See :class:`StartConfig`.
        observations: The observations.
        train: Indices of the training ones; no others are read.
        corruption: The corruption in model units.
        scaling: (centre, half) of the model units.
        seed: Seed of the run.
        progress: Told in words what is being fitted.
        device: Where it is fitted.
    """
    generator = seeding.generator(seed, 0, "start")
    order = train[torch.randperm(len(train), generator=generator).numpy()[: config.items]]
    cut = max(1, round(VALIDATION * len(order)))
    few = math.prod(observations.shape) <= 32 and torch.device(device).type != "mps"  # which knows no float64
    dtype = torch.float64 if few else torch.float32

    def batches(indices: np.ndarray, size: int = BATCH) -> Batches:
        def generate() -> Iterator[Likelihood]:
            for chunk in observations.chunks(np.sort(indices), size):
                y, params = observations.batch(chunk)
                y, params = y.to(device), {k: v.to(device) for k, v in params.items()}
                y = corruption.scale_y(y, params, *scaling)
                yield corruption.likelihood(y.to(dtype), params)

        return generate

    fitting, validating = batches(order[cut:]), batches(order[:cut])
    first = next(batches(order[cut:], FIRST)())
    features = math.prod(observations.shape)
    unfitted = evenly(np.sort(order[:cut]), SCORED)

    def criterion(mixture: Mixture) -> float:
        assert isinstance(observations.corruption, LinearCorruption)
        sampler = MixturePosterior(observations.corruption, observations.shape, scaling, mixture.to(torch.float32))
        return score(sampler, observations, unfitted, seed, DRAWS, SPLITS).criterion

    best: tuple[float, Mixture] | None = None
    record = []
    components = (1,) if config.resolve(corruption) == "gaussian" else sorted({1, *config.components})
    for rank in sorted({min(r, features - 1) for r in config.ranks}):
        single: Mixture | None = None
        for count in components:
            progress(f"start: {count} component(s) of rank {rank}")
            initial = (
                _single(first, rank, features, generator)
                if single is None
                else _spread(single, count, first, generator)
            )
            mixture, likelihood, iterations = _converge(initial, fitting, validating, config)
            single = single or mixture
            found = criterion(mixture)
            about = {"components": count, "rank": rank, "log_likelihood": likelihood, "iterations": iterations}
            record.append({**about, "criterion": found})
            if best is None or found < best[0] or not math.isfinite(best[0]):
                best = found, mixture
    assert best is not None
    chosen = best[1].to(torch.float32)
    return chosen, {"components": chosen.components, "rank": chosen.rank, "candidates": record}


def _mean_log_likelihood(mixture: Mixture, batches: Batches) -> float:
    values = torch.cat([mixture.posterior(b).log_evidence for b in batches()])
    return values.cpu().double().mean().item()


def _converge(
    mixture: Mixture, fitting: Batches, validating: Batches, config: StartConfig
) -> tuple[Mixture, float, int]:
    """The mixture of the largest validation likelihood on the way of accelerated EM, that likelihood, and the EM steps made."""
    value = _mean_log_likelihood(mixture, validating)
    best, reference, waited, steps, reach = (value, mixture), value, 0, 0, REACH
    while steps < config.iterations and waited < ROUNDS:
        mixture, reach, made = _accelerated(mixture, fitting, config.ridge, reach)
        steps += made
        value = _mean_log_likelihood(mixture, validating)
        if value > best[0]:
            best = value, mixture
        waited = 0 if value > reference + config.tolerance else waited + 1
        reference = max(reference, value)
    return best[1], best[0], steps


def _accelerated(mixture: Mixture, batches: Batches, ridge: float, reach: float) -> tuple[Mixture, float, int]:
    """A round of SQUAREM: the next mixture, the next largest step length, and how many EM steps it took.

    Arguments:
        mixture: The current parameters.
        batches: The observations.
        ridge: As in :func:`em_step`.
        reach: The largest step length a that is tried now.
    """
    first, _ = em_step(mixture, batches(), ridge=ridge)
    second, before = em_step(first, batches(), ridge=ridge)
    start, one, two = (_flat(m) for m in (mixture, first, second))
    r = one - start
    v = two - one - r
    length = min((r.norm() / v.norm().clamp(min=torch.finfo(v.dtype).tiny)).item(), reach)
    if not length > 1:  # no farther than EM itself; or not a number, where the weight of a component has become 0
        return second, reach, 2
    farther = _unflat(start + 2 * length * r + length**2 * v, mixture)
    if not all(bool(part.isfinite().all()) for part in farther.tensors.values()):
        return second, max(reach / 4, REACH), 2
    third, after = em_step(farther, batches(), ridge=ridge)
    if not after >= before:
        return second, max(reach / 4, REACH), 3
    return third, 4 * reach if length == reach else reach, 3


def _flat(mixture: Mixture) -> Tensor:
    """The parameters as one vector, in which every value is allowed: variances by their logarithms."""
    parts = mixture.log_weights, mixture.mean, mixture.factor, mixture.variance.log()
    return torch.cat([part.flatten().cpu().double() for part in parts])  # mps knows no float64


def _unflat(vector: Tensor, like: Mixture) -> Mixture:
    """The mixture of the form of `like` whose parameters are the vector."""
    parts = vector.to(like.mean).split([part.numel() for part in like.tensors.values()])
    log_weights, mean, factor, variance = (a.view_as(b) for a, b in zip(parts, like.tensors.values(), strict=True))
    return Mixture(log_weights - log_weights.logsumexp(0), mean, factor, variance.exp(), like.basis)


def _single(likelihood: Likelihood, rank: int, features: int, generator: torch.Generator) -> Mixture:
    """A first Gaussian: the mean and the variance of what was seen, random factors."""
    if isinstance(likelihood, Diagonal):
        mean, variance = _moments(likelihood) if likelihood.basis is None else _spectrum(likelihood)
        basis = likelihood.basis
    else:
        mean = torch.zeros(features).to(likelihood.y)
        variance = likelihood.y.square().mean() * features / likelihood.matrix.square().sum(-1).mean() / features
        basis = None
    half = 0.5 * variance.expand(features)
    factor = torch.randn(1, features, rank, generator=generator).to(mean) * (half / max(rank, 1)).sqrt()[:, None]
    return Mixture(torch.zeros(1).to(mean), mean[None], factor, half[None], basis)


def _moments(likelihood: Diagonal) -> tuple[Tensor, Tensor]:
    """The mean of each entry, shape (d,), and one variance for all."""
    seen = likelihood.precision > 0
    z = torch.where(seen, likelihood.z, 0.0)
    mean = z.sum(0) / seen.sum(0).clamp(min=1)
    variance = torch.where(seen, (z - mean).square(), 0.0).sum() / seen.sum().clamp(min=1)
    return mean, variance.clamp(min=LEAST)


def _spectrum(likelihood: Diagonal) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each coefficient in the basis, shape (d,), without the noise.

    EM leaves a variance as it was where the noise hides it, and a blur hides many. There it is at most the least
    that was found among those seen better: the spectra of things that are blurred fall.
    """
    z, noise = likelihood.z, (1 / likelihood.precision).mean(0)
    power = (z - z.mean(0)).square().mean(0)
    variance, error = power - noise, (2 / len(z)) ** 0.5 * power
    order = noise.argsort()
    sure = torch.where(variance > SURE * error, variance, torch.inf)[order]
    bound = torch.empty_like(sure)
    bound[order] = sure.cummin(0).values
    variance = torch.where(variance > SURE * error, variance, bound).clamp(min=LEAST).clamp(max=power.max())
    return z.mean(0) * variance / (variance + noise / len(z)), variance


def _spread(single: Mixture, count: int, likelihood: Likelihood, generator: torch.Generator) -> Mixture:
    """Components around reconstructions that the single Gaussian draws."""
    posterior = single.posterior(likelihood)
    n, width = len(posterior.mean), single.rank + single.features
    uniform = torch.rand(n, generator=generator)
    normal = torch.randn(n, width, generator=generator)
    draws = posterior.draw(uniform.to(posterior.mean.device), normal)
    if single.basis is not None:
        draws = single.basis.analyse(draws)
    mean = draws[torch.randperm(n, generator=generator)[torch.arange(count) % n]]
    return Mixture(
        torch.full((count,), -math.log(count)).to(mean),
        mean,
        0.7 * single.factor.expand(count, -1, -1),
        0.5 * single.variance.expand(count, -1),
        single.basis,
    )
