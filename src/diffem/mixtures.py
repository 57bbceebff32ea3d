r"""Mixtures of low-rank Gaussians: fitted by exact EM on observations, with exact posteriors.

The model of a clean item, flattened to :math:`x \in \mathbb{R}^d`, is

.. math:: p(x) = \sum_k w_k \, \mathcal{N}(x \mid \mu_k, V_k V_k^T + \mathrm{diag}(\psi_k)) \, ,
    \qquad V_k \in \mathbb{R}^{d \times r} \, .

It is observed through a linear-Gaussian likelihood of one of two kinds:

* :class:`Diagonal`: :math:`z_i = x_i + \mathcal{N}(0, 1 / \lambda_i)`, independent over the entries
  of an orthonormal basis (pixels for masks and noise, cosines for a blur). :math:`\lambda_i = 0`
  marks an entry that was not seen. Given the latent :math:`u` of :math:`x = \mu + V u + \sqrt\psi e`
  the entries are independent, so that with :math:`\omega_i = \lambda_i / (1 + \psi \lambda_i)`
  only the :math:`r \times r` matrix :math:`I + V^T \mathrm{diag}(\omega) V` is ever factorised
  (Woodbury); over a batch it is one matrix product with the :math:`d \times r^2` outer products
  of the rows of :math:`V`.
* :class:`Rows`: :math:`y = A x + \mathcal{N}(0, s^2 I)` with another matrix for every item, for
  small :math:`d`: one Kalman update per row of :math:`A`.

Either may carry a second observation :math:`x_t = x + \sigma_t z` (:meth:`Diagonal.given`), which
makes the mixture a denoiser in closed form: :meth:`Mixture.posterior` then returns the moments of
:math:`p(x \mid x_t, y)`.

References:
    | The EM Algorithm for Mixtures of Factor Analyzers (Ghahramani & Hinton, 1996)
    | Mixtures of Probabilistic Principal Component Analysers (Tipping & Bishop, 1999)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


class Basis:
    """An orthonormal change of basis of the flattened item, separable over its axes.

    Arguments:
        matrices: One orthogonal matrix (n, n) per axis of `shape`, or None for the identity.
        shape: The shape of an item, without the batch.
    """

    def __init__(self, matrices: list[Tensor | None], shape: tuple[int, ...]) -> None:
        self.matrices, self.shape = matrices, tuple(shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Basis) or self.shape != other.shape:
            return False
        pairs = zip(self.matrices, other.matrices, strict=True)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def _apply(self, x: Tensor, transpose: bool) -> Tensor:
        batch = x.shape[:-1]
        x = x.reshape(-1, *self.shape)
        for axis, matrix in enumerate(self.matrices, start=1):
            if matrix is not None:
                matrix = matrix.to(x)
                x = torch.movedim(torch.movedim(x, axis, -1) @ (matrix if transpose else matrix.T), -1, axis)
        return x.reshape(*batch, -1)

    def analyse(self, x: Tensor) -> Tensor:
        """Coefficients of x, shape (..., d) -> (..., d)."""
        return self._apply(x, transpose=False)

    def squared(self) -> Basis:
        """Its matrices squared entry by entry: what variances of independent coefficients are synthesised with."""
        return Basis([m if m is None else m.square() for m in self.matrices], self.shape)

    def synthesise(self, c: Tensor) -> Tensor:
        """The item with coefficients c, shape (..., d) -> (..., d)."""
        return self._apply(c, transpose=True)


@dataclass(frozen=True)
class Diagonal:
    """z_i = x_i + N(0, 1 / precision_i) in an orthonormal basis (None: the entries themselves).

    Arguments:
        z: Observed values, shape (B, d); what stands where the precision is 0 does not matter.
        precision: Inverse noise variances, shape (B, d), >= 0.
    """

    z: Tensor
    precision: Tensor
    basis: Basis | None = None

    def given(self, x_t: Tensor, sigma: Tensor) -> Diagonal:
        """The same with x_t = x + sigma z observed too; x_t (B, d), sigma (B, 1)."""
        if self.basis is not None:
            x_t = self.basis.analyse(x_t)
        extra = 1 / sigma.square()
        total = self.precision + extra
        z = torch.where(self.precision > 0, self.z, 0.0)
        # A convex combination, not a sum of large terms: exact to rounding at any precision.
        return replace(self, z=x_t + self.precision / total * (z - x_t), precision=total)

    def withheld(self, where: Tensor) -> Diagonal:
        """The same with the observation of the items in `where` (B,) taken away."""
        return replace(self, precision=torch.where(where[:, None], 0.0, self.precision))

    def to(self, reference: Tensor) -> Diagonal:
        return replace(self, z=self.z.to(reference), precision=self.precision.to(reference))


@dataclass(frozen=True)
class Rows:
    """y = A x + N(0, noise^2), with matrices A (B, m, d), y (B, m) and noise > 0 (B, 1) (inf: withheld)."""

    y: Tensor
    matrix: Tensor
    noise: Tensor
    x_t: Tensor | None = None
    sigma: Tensor | None = None

    def given(self, x_t: Tensor, sigma: Tensor) -> Rows:
        """The same with x_t = x + sigma z observed too; x_t (B, d), sigma (B, 1)."""
        return replace(self, x_t=x_t, sigma=sigma)

    def withheld(self, where: Tensor) -> Rows:
        """The same with the observation of the items in `where` (B,) taken away."""
        return replace(self, noise=torch.where(where[:, None], torch.inf, self.noise))

    def to(self, reference: Tensor) -> Rows:
        x_t = None if self.x_t is None else self.x_t.to(reference)
        sigma = None if self.sigma is None else self.sigma.to(reference)
        return Rows(self.y.to(reference), self.matrix.to(reference), self.noise.to(reference), x_t, sigma)


Likelihood = Diagonal | Rows


class Posterior:
    """p(x | observation) under a mixture: exact moments and draws. Shapes: B items, d features.

    Attributes:
        mean: The posterior mean, shape (B, d).
        log_evidence: log p(observation), up to a constant that does not depend on the mixture, (B,).
        responsibilities: p(k | observation), shape (B, K).
    """

    mean: Tensor
    log_evidence: Tensor
    responsibilities: Tensor

    @property
    def by_entry(self) -> bool:
        """Whether S is diagonal: whether entries can be scaled without turning what is known into what is not."""
        return False

    @property
    def spread(self) -> Tensor:
        """The diagonal of S, shape (B, d)."""
        raise NotImplementedError

    @property
    def variance(self) -> Tensor:
        """The variances of the entries, shape (B, d): the diagonal of S S^T."""
        raise NotImplementedError

    def scale(self, f: Tensor) -> Tensor:
        """S f, where S is a square root of (an approximation of) the posterior covariance."""
        raise NotImplementedError

    def whiten(self, residual: Tensor) -> Tensor:
        """S^-1 residual: for residual = x - mean its entries have variance about 1."""
        raise NotImplementedError

    def draw(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """One exact draw an item, from uniform (B,) in [0, 1) and standard normal (B, rank + d)."""
        raise NotImplementedError

    def _component(self, uniform: Tensor) -> Tensor:
        cumulative = self.responsibilities.cumsum(1)
        k = (uniform[:, None].to(cumulative) * cumulative[:, -1:] >= cumulative).sum(1)
        return k.clamp(max=cumulative.shape[1] - 1)


class Mixture:
    """A mixture of low-rank Gaussians.

    Arguments:
        log_weights: Logarithms of the weights, shape (K,).
        mean: Means, shape (K, d).
        factor: Factors V, shape (K, d, r); r may be 0.
        variance: Diagonals psi > 0, shape (K, d).
        basis: The orthonormal basis in which mean, factor and variance are written; None for the entries.
    """

    names = ("log_weights", "mean", "factor", "variance")

    def __init__(
        self, log_weights: Tensor, mean: Tensor, factor: Tensor, variance: Tensor, basis: Basis | None = None
    ) -> None:
        self.log_weights, self.mean, self.factor, self.variance = log_weights, mean, factor, variance
        self.basis = basis
        self._outer = (factor[..., :, None] * factor[..., None, :]).flatten(2)  # (K, d, r^2)
        self._eigen: tuple[Tensor, Tensor] | None = None

    @classmethod
    def standard(cls, features: int) -> Mixture:
        """N(0, I): the prior behind the usual preconditioning of diffusion models."""
        return cls(torch.zeros(1), torch.zeros(1, features), torch.zeros(1, features, 0), torch.ones(1, features))

    @property
    def components(self) -> int:
        return self.mean.shape[0]

    @property
    def features(self) -> int:
        return self.mean.shape[1]

    @property
    def rank(self) -> int:
        return self.factor.shape[2]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def to(self, *args, **kwargs) -> Mixture:
        return Mixture(*(t.to(*args, **kwargs) for t in self.tensors.values()), basis=self.basis)

    def covariance(self) -> Tensor:
        """Covariances of the components, shape (K, d, d)."""
        return self.factor @ self.factor.mT + torch.diag_embed(self.variance)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (K, d) and eigenvectors (K, d, d) of the covariances."""
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(self.covariance())
            self._eigen = values.clamp(min=self.variance.amin(1, keepdim=True)), vectors
        return self._eigen

    def posterior(self, likelihood: Likelihood) -> Posterior:
        """p(x | observation) for a batch of observations."""
        likelihood = likelihood.to(self.mean)
        if isinstance(likelihood, Rows):
            return RowsPosterior(self, likelihood)
        return DiagonalPosterior(self, likelihood)


class DiagonalPosterior(Posterior):
    """See :class:`Posterior`; S is diagonal in the likelihood's basis (exact variances, no covariances)."""

    def __init__(self, mixture: Mixture, likelihood: Diagonal) -> None:
        self.mixture, self.likelihood = mixture, likelihood
        lam, psi = likelihood.precision, mixture.variance[:, None]
        seen = lam > 0
        z = self._z = torch.where(seen, likelihood.z, 0.0)  # so that what was not seen is finite; it weighs nothing
        B, r = len(z), mixture.rank
        # Everything of shape (K, B, d) is large: as few of them as can be, and the means only where they are asked for.
        inflated = psi * lam + 1  # (K, B, d)
        weight = self._weight = lam / inflated
        residual = z - mixture.mean[:, None]
        weighted = weight * residual
        outer = (weight @ mixture._outer).view(len(mixture.mean), B, r, r)
        self.chol = torch.linalg.cholesky(outer + torch.eye(r).to(z))
        projection = weighted @ mixture.factor  # (K, B, r)
        self.latent = torch.cholesky_solve(projection[..., None], self.chol)[..., 0]
        quadratic = (weighted * residual).sum(-1) - (projection * self.latent).sum(-1)
        log_noise = inflated.log().sum(-1) - torch.where(seen, lam, 1.0).log().sum(-1)  # of psi + 1 / lam
        log_det = log_noise + 2 * self.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        joint = mixture.log_weights[:, None] - 0.5 * (quadratic + log_det + seen.sum(-1).to(z) * LOG_2PI)  # (K, B)
        self.log_evidence = joint.logsumexp(0)
        self.responsibilities = (joint - self.log_evidence).exp().T

    @cached_property
    def _shrink(self) -> Tensor:
        return 1 / (self.mixture.variance[:, None] * self.likelihood.precision + 1)  # (K, B, d)

    @cached_property
    def _means(self) -> Tensor:
        """Posterior means of the components in the basis, shape (K, B, d)."""
        mixture = self.mixture
        centre = mixture.mean[:, None] + self.latent @ mixture.factor.mT
        return centre + mixture.variance[:, None] * self._weight * (self._z - centre)

    @cached_property
    def _mean(self) -> Tensor:
        return torch.einsum("bk,kbd->bd", self.responsibilities, self._means)

    @cached_property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self._synthesise(self._mean)

    def _analyse(self, x: Tensor) -> Tensor:
        return x if self.likelihood.basis is None else self.likelihood.basis.analyse(x)

    def _synthesise(self, c: Tensor) -> Tensor:
        return c if self.likelihood.basis is None else self.likelihood.basis.synthesise(c)

    @property
    def by_entry(self) -> bool:
        return self.likelihood.basis is None

    @cached_property
    def std(self) -> Tensor:
        """Posterior standard deviations in the basis, shape (B, d)."""
        mixture = self.mixture
        inverse = torch.cholesky_inverse(self.chol) if mixture.rank else self.chol
        spread = inverse.flatten(2) @ mixture._outer.mT  # (K, B, d): V C V^T
        variances = mixture.variance[:, None] * self._shrink + self._shrink.square() * spread
        variances = variances + (self._means - self._mean).square()
        return torch.einsum("bk,kbd->bd", self.responsibilities, variances).sqrt()

    @property
    def spread(self) -> Tensor:
        return self.std

    @property
    def variance(self) -> Tensor:
        basis = self.likelihood.basis
        return self.std.square() if basis is None else basis.squared().synthesise(self.std.square())

    def scale(self, f: Tensor) -> Tensor:
        return self._synthesise(self.std * self._analyse(f))

    def whiten(self, residual: Tensor) -> Tensor:
        return self._synthesise(self._analyse(residual) / self.std)

    def draw(self, uniform: Tensor, normal: Tensor) -> Tensor:
        mixture, _lam = self.mixture, self.likelihood.precision
        k, b, r = self._component(uniform), torch.arange(len(uniform), device=uniform.device), mixture.rank
        normal = normal.to(self.mean)
        noise = torch.linalg.solve_triangular(self.chol[k, b].mT, normal[:, :r, None], upper=True)[..., 0]
        psi, shrink = mixture.variance[k], self._shrink[k, b]
        # the latent's noise moves the centre; what was seen pulls it back by psi * lam / (1 + psi * lam)
        x = self._means[k, b] + shrink * torch.einsum("bdr,br->bd", mixture.factor[k], noise)
        return self._synthesise(x + (psi * shrink).sqrt() * normal[:, r:])


class RowsPosterior(Posterior):
    """See :class:`Posterior`; S is the Cholesky factor of the whole posterior covariance."""

    def __init__(self, mixture: Mixture, likelihood: Rows) -> None:
        self.mixture, self.likelihood = mixture, likelihood
        values, vectors = mixture.eigen()  # (K, d), (K, d, d)
        B, _K = len(likelihood.y), mixture.components
        if likelihood.x_t is None or likelihood.sigma is None:
            mean = mixture.mean.expand(B, -1, -1)
            cov = mixture.covariance().expand(B, -1, -1, -1)
            log_joint = mixture.log_weights.expand(B, -1)
        else:
            total = values + likelihood.sigma[:, None].square()  # (B, K, d)
            residual = likelihood.x_t[:, None] - mixture.mean
            coefficient = torch.einsum("kde,bkd->bke", vectors, residual)
            log_joint = mixture.log_weights - 0.5 * (coefficient.square() / total + total.log() + LOG_2PI).sum(-1)
            mean = mixture.mean + torch.einsum("kde,bke->bkd", vectors, values / total * coefficient)
            shrunk = values * likelihood.sigma[:, None].square() / total
            cov = (vectors * shrunk[:, :, None]) @ vectors.mT
        for row, value in zip(likelihood.matrix.unbind(1), likelihood.y.unbind(1), strict=True):
            gain = torch.einsum("bkde,be->bkd", cov, row)
            variance = (gain * row[:, None]).sum(-1) + likelihood.noise.square()  # (B, K); inf when withheld
            innovation = value[:, None] - (mean * row[:, None]).sum(-1)
            seen = torch.isfinite(variance)
            term = innovation.square() / variance + variance.log() + LOG_2PI
            log_joint = log_joint - 0.5 * torch.where(seen, term, 0.0)
            scaled = gain / variance[..., None]
            mean = mean + scaled * innovation[..., None]
            cov = cov - scaled[..., None] * gain[..., None, :]
        self._means, self._covs = mean, cov
        self.log_evidence = log_joint.logsumexp(1)
        self.responsibilities = (log_joint - self.log_evidence[:, None]).exp()
        self.mean = torch.einsum("bk,bkd->bd", self.responsibilities, mean)
        self._chol: Tensor | None = None

    @property
    def chol(self) -> Tensor:
        """Cholesky factor of the posterior covariance, shape (B, d, d)."""
        if self._chol is None:
            centred = self._means - self.mean[:, None]
            cov = torch.einsum("bk,bkde->bde", self.responsibilities, self._covs)
            cov = cov + torch.einsum("bk,bkd,bke->bde", self.responsibilities, centred, centred)
            self._chol = _safe_cholesky(cov)
        return self._chol

    @property
    def spread(self) -> Tensor:
        return self.chol.diagonal(dim1=-2, dim2=-1)

    @property
    def variance(self) -> Tensor:
        return self.chol.square().sum(-1)

    def scale(self, f: Tensor) -> Tensor:
        return (self.chol @ f.to(self.chol)[..., None])[..., 0]

    def whiten(self, residual: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.chol, residual.to(self.chol)[..., None], upper=False)[..., 0]

    def draw(self, uniform: Tensor, normal: Tensor) -> Tensor:
        k, b = self._component(uniform), torch.arange(len(uniform), device=uniform.device)
        chol, noise = _safe_cholesky(self._covs[b, k]), normal[:, self.mixture.rank :].to(self.mean)
        return self._means[b, k] + (chol @ noise[..., None])[..., 0]


def _safe_cholesky(cov: Tensor) -> Tensor:
    """Cholesky factor of a covariance that rounding may have left barely indefinite."""
    cov = 0.5 * (cov + cov.mT)
    scale = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eps = torch.finfo(cov.dtype).eps * 4 * scale * torch.eye(cov.shape[-1]).to(cov)
    return torch.linalg.cholesky(cov + eps)


class _Statistics:
    """What exact EM needs of the data: sums over items, so that memory does not grow with their number."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.items, self.log_likelihood = mixture, 0, 0.0
        self.sums: tuple[Tensor, ...] = ()

    def add(self, likelihood: Likelihood) -> None:
        posterior = self.mixture.posterior(likelihood)
        self.items += len(posterior.log_evidence)
        self.log_likelihood += posterior.log_evidence.double().sum().item()
        sums = self._diagonal(posterior) if isinstance(posterior, DiagonalPosterior) else self._rows(posterior)
        if self.sums:
            total = [a + b for a, b in zip(self.sums, sums, strict=True)]
            if isinstance(posterior, DiagonalPosterior):
                total[-1] = torch.maximum(self.sums[-1], sums[-1])  # the precisions are not a sum
            sums = tuple(total)
        self.sums = sums

    def _diagonal(self, posterior: DiagonalPosterior) -> tuple[Tensor, ...]:
        z, lam = posterior.likelihood.z, posterior.likelihood.precision
        K, B, r = posterior.latent.shape
        gamma = posterior.responsibilities.T[..., None]  # (K, B, 1)
        u = torch.cat((posterior.latent, torch.ones(K, B, 1).to(z)), 2)
        second = u[..., :, None] * u[..., None, :]
        second[..., :r, :r] += torch.cholesky_inverse(posterior.chol) if r else 0.0
        seen = (lam > 0).to(z)
        value = torch.where(lam > 0, z, 0.0)
        gram = seen.T @ (gamma * second.flatten(2))  # (K, d, (r+1)^2)
        cross = value.T @ (gamma * u)  # (K, d, r+1)
        return gamma.sum((1, 2)), gram, cross, value.square().T @ gamma, lam.amax(0)

    def _rows(self, posterior: Posterior) -> tuple[Tensor, ...]:
        assert isinstance(posterior, RowsPosterior)
        gamma, mean = posterior.responsibilities, posterior._means
        second = torch.einsum("bk,bkde->kde", gamma, posterior._covs)
        return (
            gamma.sum(0),
            gamma.T[..., None, :] @ mean.transpose(0, 1),
            second + torch.einsum("bk,bkd,bke->kde", gamma, mean, mean),
        )

    def maximise(self, floor: float, ridge: float) -> Mixture:
        """The M-step: the mixture of larger likelihood (of larger posterior density if `ridge` > 0)."""
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
        # Maximum likelihood of probabilistic PCA (Tipping & Bishop): discarded eigenvalues are averaged.
        variance = values[:, : max(features - rank, 1)].mean(1).clamp(min=floor)
        factor = vectors[..., features - rank :] * (values[:, features - rank :] - variance[:, None]).clamp(
            min=0
        ).sqrt().unsqueeze(1)
        return Mixture(log_weights, mean[:, 0], factor, variance[:, None].expand(-1, features))

    def _maximise_diagonal(self, log_weights: Tensor, floor: float, ridge: float) -> Mixture:
        # Two conditional maximisations (ECM). First mu and V: for every entry a weighted regression of
        # what was seen on (latent, 1). Its weights 1 / (psi + 1 / lambda) are equal for all items that
        # saw the entry, so that they cancel. Then psi, by one EM step of z = (mu + V u) + e + noise.
        _, gram, cross, square, level = self.sums
        K, d, p = cross.shape
        gram = gram.view(K, d, p, p)
        psi, seen = self.mixture.variance, gram[..., -1, -1].clone()
        gain = psi * level / (1 + psi * level)
        if ridge:
            # Pseudo-observations are of entries without noise, so that real ones weigh `gain` against them: factors near 0,
            # means near the mean of all that was seen, which is near 0 itself where noise hides it.
            overall = (gain * cross[..., -1]).sum(0) / ((gain * seen).sum(0) + ridge)
            target = gain[..., None] * cross
            target[..., -1] += ridge * overall
            solvable = gain[..., None, None] * gram + ridge * torch.eye(p).to(gram)
        else:
            target, solvable = cross, torch.where((seen > 0)[..., None, None], gram, torch.eye(p).to(gram))
        weights = torch.linalg.solve(solvable, target)  # (K, d, r+1)
        error = square[..., 0] - 2 * (weights * cross).sum(-1)
        error = error + torch.einsum("kdi,kdij,kdj->kd", weights, gram, weights)
        total = gain.square() * error.clamp(min=0) + psi * (1 - gain) * seen
        pooled = total.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        pooled = torch.where(seen.sum(1, keepdim=True) > 0, pooled, psi.mean(1, keepdim=True))  # a dead component
        variance = torch.where(seen + ridge > 0, (total + ridge * pooled) / (seen + ridge), psi).clamp(min=floor)
        return Mixture(log_weights, weights[..., -1], weights[..., :-1], variance, self.mixture.basis)


def em_step(mixture: Mixture, batches, floor: float = 1e-6, ridge: float = 0.0) -> tuple[Mixture, float]:
    """One exact EM step; returns the new mixture and the mean log likelihood of the old one.

    Arguments:
        mixture: The current parameters.
        batches: Iterable of likelihoods, all of one kind; :class:`Diagonal` ones in one basis, where an
            entry is seen at the same precision in every item that sees it.
        floor: The least entry of the diagonal.
        ridge: Pseudo-observations that regularise small components; 0 is maximum likelihood.
    """
    statistics = _Statistics(mixture)
    for likelihood in batches:
        statistics.add(likelihood)
    return statistics.maximise(floor, ridge), statistics.log_likelihood / statistics.items
