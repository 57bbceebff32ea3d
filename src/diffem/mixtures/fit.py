r"""Exact EM for mixtures on observations, accelerated by SQUAREM.

Exact EM is slow if much is missing. From the parameters :math:`\theta_0` and two EM steps :math:`\theta_1, \theta_2`,
with :math:`r = \theta_1 - \theta_0`, :math:`v = \theta_2 - \theta_1 - r` and :math:`a = |r| / |v|`, a third EM step
starts from

.. math:: \theta_0 + 2 a r + a^2 v \, .

If the likelihood there is lower than at :math:`\theta_1`, the third step is discarded, and the fit continues from
:math:`\theta_2`.

Reference:
    | Simple and Globally Convergent Methods for Accelerating the Convergence of Any EM Algorithm
    | (Varadhan & Roland, 2008)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .likelihoods import Diagonal, Likelihood
from .model import DiagonalPosterior, ExactPosterior, Mixture, RowsPosterior

MOST = 0.25  # upper bound of the initial variance, in model units: EM does not change it where nothing was observed
LEAST = 1e-3  # lower bound of an initial variance: EM cannot leave 0
SURE = 5.0  # a variance is significant if it exceeds 0 by this many standard errors
REACH = 4.0  # the initial limit of the step length of SQUAREM; it grows fourfold whenever it is reached
ROUNDS = 3  # a fit stops after this many rounds in a row that hardly raise the validation likelihood

Batches = Callable[[], Iterator[Likelihood]]


def em_step(mixture: Mixture, batches, floor: float = 1e-6, ridge: float = 0.0) -> tuple[Mixture, float]:
    """One exact EM step; returns the new mixture and the mean log likelihood of the old one.

    Arguments:
        mixture: The current parameters.
        batches: Iterable of likelihoods of one class; :class:`Diagonal` ones share one basis.
        floor: Lower bound of the entries of the diagonal.
        ridge: The number of pseudo-observations that regularise small components; 0 is maximum likelihood.
    """
    statistics = _Statistics(mixture)
    for likelihood in batches:
        statistics.add(likelihood)
    return statistics.maximise(floor, ridge), statistics.log_likelihood / statistics.items


class _Statistics:
    """The sufficient statistics of exact EM: sums over items, so that memory does not grow with their number."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.items, self.log_likelihood = mixture, 0, 0.0
        self.sums: tuple[Tensor, ...] = ()

    def add(self, likelihood: Likelihood) -> None:
        posterior = self.mixture.posterior(likelihood)
        self.items += len(posterior.log_evidence)
        self.log_likelihood += posterior.log_evidence.cpu().double().sum().item()
        sums = self._diagonal(posterior) if isinstance(posterior, DiagonalPosterior) else self._rows(posterior)
        self.sums = tuple(a + b for a, b in zip(self.sums, sums, strict=True)) if self.sums else sums

    def _diagonal(self, posterior: DiagonalPosterior) -> tuple[Tensor, ...]:
        """Sums for the regressions of observed entries on (latent, 1): see :meth:`_maximise_diagonal`."""
        z, lam, varied = posterior.likelihood.z, posterior.likelihood.precision, posterior.likelihood.varied
        K, B, r = posterior.latent.shape
        gamma = posterior.responsibilities.T[..., None]  # (K, B, 1)
        u = torch.cat((posterior.latent, torch.ones(K, B, 1).to(z)), 2)
        second = u[..., :, None] * u[..., None, :]
        second[..., :r, :r] += torch.cholesky_inverse(posterior.chol) if r else 0.0
        value = torch.where(lam > 0, z, 0.0)
        seen = (lam > 0).to(z)
        gain = self.mixture.variance[:, None] * posterior._weight  # (K, B, d); 0 where nothing was observed

        def sums(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, d) or (K, B, d)
            gram = weight.mT @ (gamma * second.flatten(2))  # (K, d, (r+1)^2)
            return gram, (weight * value).mT @ (gamma * u), ((weight * value.square()).mT @ gamma)[..., 0]

        if varied:
            once, twice = sums(gain), sums(gain.square())
        else:  # the gain of an entry is the same for all items that observe it: a single sum suffices
            gains = gain.amax(1)
            scaled = lambda parts: tuple(gains.view(K, -1, *(1,) * (v.ndim - 2)) * v for v in parts)  # noqa: E731
            once = scaled(sums(seen))
            twice = scaled(once)
        return gamma.sum((1, 2)), (seen.T @ gamma)[..., 0], *once, *twice

    def _rows(self, posterior: ExactPosterior) -> tuple[Tensor, ...]:
        assert isinstance(posterior, RowsPosterior)
        gamma, mean = posterior.responsibilities, posterior._means
        second = torch.einsum("bk,bkde->kde", gamma, posterior._covs)
        return (
            gamma.sum(0),
            gamma.T[..., None, :] @ mean.transpose(0, 1),
            second + torch.einsum("bk,bkd,bke->kde", gamma, mean, mean),
        )

    def maximise(self, floor: float, ridge: float) -> Mixture:
        """The M-step: a mixture with larger likelihood (with larger posterior density if `ridge` > 0)."""
        counts = self.sums[0]
        log_weights = ((counts + ridge) / (counts + ridge).sum()).log()
        if len(self.sums) == 3:
            return self._maximise_rows(log_weights, floor)
        return self._maximise_diagonal(log_weights, floor, ridge)

    def _maximise_rows(self, log_weights: Tensor, floor: float) -> Mixture:
        counts, first, second = self.sums
        weight = counts.clamp(min=1e-6)[:, None, None]
        mean = first / weight
        cov = second / weight - mean.mT @ mean
        values, vectors = torch.linalg.eigh(0.5 * (cov + cov.mT))  # ascending
        rank, features = self.mixture.rank, self.mixture.features
        # Maximum likelihood of probabilistic PCA (Tipping & Bishop): the discarded eigenvalues are averaged.
        variance = values[:, : max(features - rank, 1)].mean(1).clamp(min=floor)
        factor = vectors[..., features - rank :] * (values[:, features - rank :] - variance[:, None]).clamp(
            min=0
        ).sqrt().unsqueeze(1)
        return Mixture(log_weights, mean[:, 0], factor, variance[:, None].expand(-1, features))

    def _maximise_diagonal(self, log_weights: Tensor, floor: float, ridge: float) -> Mixture:
        # Two conditional maximisations (ECM). First mu and V: for every entry a weighted regression of observed values
        # on (latent, 1), with weights 1 / (psi + 1 / lambda) = gain / psi. Then psi, by one EM step of
        # z = (mu + V u) + e + noise, where e has posterior mean gain * (z - mu - V u) and variance psi (1 - gain).
        _, seen, gram, cross, _, gram2, cross2, square2 = self.sums
        K, d, p = cross.shape
        gram, gram2, psi = gram.view(K, d, p, p), gram2.view(K, d, p, p), self.mixture.variance
        gained = gram[..., -1, -1]
        if ridge:
            # Pseudo-observations have no noise; relative to them, real ones have the weight `gain`. They pull factors
            # to 0, and means to the mean of all observed values, which is itself near 0 where noise hides it.
            overall = cross[..., -1].sum(0) / (gained.sum(0) + ridge)
            target = cross.clone()
            target[..., -1] += ridge * overall
            solvable = gram + ridge * torch.eye(p).to(gram)
        else:
            target, solvable = cross, torch.where((seen > 0)[..., None, None], gram, torch.eye(p).to(gram))
        weights = torch.linalg.solve(solvable, target)  # (K, d, r+1)
        error = square2 - 2 * (weights * cross2).sum(-1) + torch.einsum("kdi,kdij,kdj->kd", weights, gram2, weights)
        total = error.clamp(min=0) + psi * (seen - gained)
        pooled = total.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        pooled = torch.where(seen.sum(1, keepdim=True) > 0, pooled, psi.mean(1, keepdim=True))  # a dead component
        variance = torch.where(seen + ridge > 0, (total + ridge * pooled) / (seen + ridge), psi).clamp(min=floor)
        return Mixture(log_weights, weights[..., -1], weights[..., :-1], variance, self.mixture.basis)


def _mean_log_likelihood(mixture: Mixture, batches: Batches) -> float:
    values = torch.cat([mixture.posterior(b).log_evidence for b in batches()])
    return values.cpu().double().mean().item()


def converge(
    mixture: Mixture, fitting: Batches, validating: Batches, iterations: int, tolerance: float, ridge: float
) -> tuple[Mixture, float, int]:
    """Accelerated EM with early stopping.

    Returns the mixture with the largest validation likelihood, that likelihood, and the number of EM steps.

    Arguments:
        mixture: The first guess.
        fitting: Each call yields the likelihoods that are fitted.
        validating: Each call yields the likelihoods by which the fit is stopped.
        iterations: The fit ends after the round that reaches this many EM steps.
        tolerance: It ends after :data:`ROUNDS` rounds in a row that raise the validation likelihood by no more than
            this.
        ridge: As in :func:`em_step`.
    """
    value = _mean_log_likelihood(mixture, validating)
    best, reference, waited, steps, reach = (value, mixture), value, 0, 0, REACH
    while steps < iterations and waited < ROUNDS:
        mixture, reach, made = _accelerated(mixture, fitting, ridge, reach)
        steps += made
        value = _mean_log_likelihood(mixture, validating)
        if value > best[0]:
            best = value, mixture
        waited = 0 if value > reference + tolerance else waited + 1
        reference = max(reference, value)
    return best[1], best[0], steps


def _accelerated(mixture: Mixture, batches: Batches, ridge: float, reach: float) -> tuple[Mixture, float, int]:
    """A round of SQUAREM: the next mixture, the next limit of the step length, and the number of EM steps it took.

    Arguments:
        mixture: The current parameters.
        batches: The observations.
        ridge: As in :func:`em_step`.
        reach: The limit of the step length a in this round.
    """
    first, _ = em_step(mixture, batches(), ridge=ridge)
    second, before = em_step(first, batches(), ridge=ridge)
    start, one, two = (_flat(m) for m in (mixture, first, second))
    r = one - start
    v = two - one - r
    length = min((r.norm() / v.norm().clamp(min=torch.finfo(v.dtype).tiny)).item(), reach)
    if not length > 1:  # no longer than the steps of EM; or NaN, if the weight of a component has become 0
        return second, reach, 2
    farther = _unflat(start + 2 * length * r + length**2 * v, mixture)
    if not all(bool(part.isfinite().all()) for part in farther.tensors.values()):
        return second, max(reach / 4, REACH), 2
    third, after = em_step(farther, batches(), ridge=ridge)
    if not after >= before:
        return second, max(reach / 4, REACH), 3
    return third, 4 * reach if length == reach else reach, 3


def _flat(mixture: Mixture) -> Tensor:
    """The parameters as one unconstrained vector: variances by their logarithms."""
    parts = mixture.log_weights, mixture.mean, mixture.factor, mixture.variance.log()
    return torch.cat([part.flatten().cpu().double() for part in parts])  # mps has no float64


def _unflat(vector: Tensor, like: Mixture) -> Mixture:
    """The mixture with the parameters in the vector, in the shapes and the basis of `like`."""
    parts = vector.to(like.mean).split([part.numel() for part in like.tensors.values()])
    log_weights, mean, factor, variance = (a.view_as(b) for a, b in zip(parts, like.tensors.values(), strict=True))
    return Mixture(log_weights - log_weights.logsumexp(0), mean, factor, variance.exp(), like.basis)


def single(likelihood: Likelihood, rank: int, features: int, generator: torch.Generator) -> Mixture:
    """An initial Gaussian: mean and variance of the observed values, random factors."""
    if isinstance(likelihood, Diagonal):
        mean, variance = _moments(likelihood) if likelihood.basis is None else _spectrum(likelihood)
        basis = likelihood.basis
    else:
        mean = torch.zeros(features).to(likelihood.y)
        variance = likelihood.y.square().mean() / likelihood.matrix.square().sum(-1).mean()
        variance = variance.clamp(max=MOST)  # rows that sum correlated entries overestimate it
        basis = None
    half = 0.5 * variance.expand(features)
    factor = torch.randn(1, features, rank, generator=generator).to(mean) * (half / max(rank, 1)).sqrt()[:, None]
    return Mixture(torch.zeros(1).to(mean), mean[None], factor, half[None], basis)


def _moments(likelihood: Diagonal) -> tuple[Tensor, Tensor]:
    """The mean of each entry, shape (d,), and one variance for all entries."""
    seen = likelihood.precision > 0
    z = torch.where(seen, likelihood.z, 0.0)
    mean = z.sum(0) / seen.sum(0).clamp(min=1)
    variance = torch.where(seen, (z - mean).square(), 0.0).sum() / seen.sum().clamp(min=1)
    return mean, variance.clamp(min=LEAST)


def _spectrum(likelihood: Diagonal) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each coefficient in the basis, shape (d,), without the noise.

    EM does not change a variance that is hidden by noise, as many are after a blur. It is bounded by the smallest
    significant variance of the coefficients with less noise: the spectra of blurred objects decay.
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


def spread(mixture: Mixture, count: int, likelihood: Likelihood, generator: torch.Generator) -> Mixture:
    """Initial components, centred at posterior draws of the single Gaussian."""
    posterior = mixture.posterior(likelihood)
    n, width = len(posterior.mean), mixture.rank + mixture.features
    uniform = torch.rand(n, generator=generator)
    normal = torch.randn(n, width, generator=generator)
    draws = posterior.draw(uniform.to(posterior.mean.device), normal)
    if mixture.basis is not None:
        draws = mixture.basis.analyse(draws)
    mean = draws[torch.randperm(n, generator=generator)[torch.arange(count) % n]]
    return Mixture(
        torch.full((count,), -math.log(count)).to(mean),
        mean,
        0.7 * mixture.factor.expand(count, -1, -1),
        0.5 * mixture.variance.expand(count, -1),
        mixture.basis,
    )
