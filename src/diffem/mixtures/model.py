r"""Mixtures of low-rank Gaussians, with exact posteriors.

The model of a clean item, flattened to :math:`x \in \mathbb{R}^d`, is

.. math:: p(x) = \sum_k w_k \, \mathcal{N}(x \mid \mu_k, V_k V_k^T + \mathrm{diag}(\psi_k)) \, ,
    \qquad V_k \in \mathbb{R}^{d \times r} \, .

Its posterior is exact under the likelihoods of :mod:`diffem.mixtures.likelihoods`:

* :class:`Diagonal`: given the latent :math:`u` of :math:`x = \mu + V u + \sqrt\psi e` the entries are independent. With
  :math:`\omega_i = \lambda_i / (1 + \psi \lambda_i)`, only the :math:`r \times r` matrix
  :math:`I + V^T \mathrm{diag}(\omega) V` is factorised (Woodbury). For a batch it is computed by one matrix product
  with the outer products of the rows of :math:`V`, of which one triangle suffices.
* :class:`Rows`, for small :math:`d`: one Kalman update per row of :math:`A`.

With a second observation :math:`x_t = x + \sigma_t z` the mixture is a denoiser in closed form:
:meth:`Mixture.posterior` then returns the moments of :math:`p(x \mid x_t, y)`.

References:
    | The EM Algorithm for Mixtures of Factor Analyzers (Ghahramani & Hinton, 1996)
    | Mixtures of Probabilistic Principal Component Analysers (Tipping & Bishop, 1999)
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from .likelihoods import Basis, Diagonal, Likelihood, Rows

LOG_2PI = math.log(2 * math.pi)
ROWS = 32  # of an operator that are conditioned on at a time


class ExactPosterior:
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
        """Whether S is diagonal, so that scaling by S does not mix observed with unobserved entries."""
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
        """S f, where S is a square root of the posterior covariance, or of an approximation of it."""
        raise NotImplementedError

    def whiten(self, residual: Tensor) -> Tensor:
        """S^-1 residual; for residual = x - mean, its entries have variance about 1."""
        raise NotImplementedError

    def draw(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """One exact draw per item, from uniform (B,) in [0, 1) and standard normal (B, rank + d)."""
        raise NotImplementedError

    def _component(self, uniform: Tensor) -> Tensor:
        cumulative = self.responsibilities.cumsum(1)
        k = (uniform[:, None].to(cumulative) * cumulative[:, -1:] >= cumulative).sum(1)
        return k.clamp(max=cumulative.shape[1] - 1)


class Mixture(nn.Module):
    """A mixture of low-rank Gaussians. Its parameters are buffers: moved and saved with the module, but never trained.

    Arguments:
        log_weights: Logarithms of the weights, shape (K,).
        mean: Means, shape (K, d).
        factor: Factors V, shape (K, d, r); r may be 0.
        variance: Diagonals psi > 0, shape (K, d).
        basis: The orthonormal basis in which mean, factor and variance are written; None: the entries themselves.
    """

    names = ("log_weights", "mean", "factor", "variance")
    log_weights: Tensor
    mean: Tensor
    factor: Tensor
    variance: Tensor
    outer: Tensor

    def __init__(
        self, log_weights: Tensor, mean: Tensor, factor: Tensor, variance: Tensor, basis: Basis | None = None
    ) -> None:
        super().__init__()
        for name, tensor in zip(self.names, (log_weights, mean, factor, variance), strict=True):
            self.register_buffer(name, tensor)
        i, j = torch.tril_indices(factor.shape[2], factor.shape[2])
        self.register_buffer("outer", factor[..., i] * factor[..., j], persistent=False)  # (K, d, r (r + 1) / 2)
        self.basis = basis
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

    def copied(self, *args, **kwargs) -> Mixture:
        """A copy on another device or with another dtype; arguments as for :meth:`torch.Tensor.to`."""
        return Mixture(*(t.to(*args, **kwargs) for t in self.tensors.values()), basis=self.basis)

    def _apply(self, fn, recurse=True):
        self._eigen = None
        return super()._apply(fn, recurse)

    def covariance(self) -> Tensor:
        """Covariances of the components, shape (K, d, d)."""
        return self.factor @ self.factor.mT + torch.diag_embed(self.variance)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (K, d) and eigenvectors (K, d, d) of the covariances."""
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(self.covariance())
            self._eigen = values.clamp(min=self.variance.amin(1, keepdim=True)), vectors
        return self._eigen

    def posterior(self, likelihood: Likelihood) -> ExactPosterior:
        """p(x | observation) for a batch of observations."""
        likelihood = likelihood.to(self.mean)
        if isinstance(likelihood, Rows):
            return RowsPosterior(self, likelihood)
        return DiagonalPosterior(self, likelihood)


class DiagonalPosterior(ExactPosterior):
    """See :class:`ExactPosterior`; S is diagonal in the likelihood's basis (exact variances, no covariances)."""

    def __init__(self, mixture: Mixture, likelihood: Diagonal) -> None:
        self.mixture, self.likelihood = mixture, likelihood
        lam, psi = likelihood.precision, mixture.variance[:, None]
        seen = lam > 0
        z = self._z = torch.where(seen, likelihood.z, 0.0)  # makes unobserved entries finite; their weight is 0
        B, r = z.shape[0], mixture.rank
        # Arrays of shape (K, B, d) are large: as few of them as possible, and the means only on demand.
        self._shrink = 1 / (psi * lam + 1)  # (K, B, d)
        weight = self._weight = lam * self._shrink
        residual = z - mixture.mean[:, None]
        weighted = weight * residual
        outer = z.new_zeros(len(mixture.mean), B, r, r)
        i, j = self._triangle = torch.tril_indices(r, r)
        outer[..., i, j] = weight @ mixture.outer  # the factorisation reads only one triangle
        outer.diagonal(dim1=-2, dim2=-1).add_(1)
        self.chol = torch.linalg.cholesky(outer)
        projection = weighted @ mixture.factor  # (K, B, r)
        self.latent = torch.cholesky_solve(projection[..., None], self.chol)[..., 0]
        quadratic = (weighted * residual).sum(-1) - (projection * self.latent).sum(-1)
        log_noise = -self._shrink.log().sum(-1) - torch.where(seen, lam, 1.0).log().sum(-1)  # of psi + 1 / lam
        log_det = log_noise + 2 * self.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        joint = mixture.log_weights[:, None] - 0.5 * (quadratic + log_det + seen.sum(-1).to(z) * LOG_2PI)  # (K, B)
        self.log_evidence = joint.logsumexp(0)
        self.responsibilities = (joint - self.log_evidence).exp().T

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
        mixture, (i, j) = self.mixture, self._triangle
        inverse = torch.cholesky_inverse(self.chol) if mixture.rank else self.chol
        twice = torch.where(i == j, 1.0, 2.0).to(inverse)  # off-diagonal entries count twice
        spread = (twice * inverse[..., i, j]) @ mixture.outer.mT  # (K, B, d): the diagonal of V C V^T
        variances = self._shrink * (mixture.variance[:, None] + self._shrink * spread)
        if mixture.components > 1:
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
        mixture, k, r = self.mixture, self._component(uniform), self.mixture.rank
        b = torch.arange(k.shape[0], device=k.device)
        normal = normal.to(self.mean)
        noise = torch.linalg.solve_triangular(self.chol[k, b].mT, normal[:, :r, None], upper=True)[..., 0]
        psi, shrink = mixture.variance[k], self._shrink[k, b]
        # the noise of the latent moves the centre; the observation pulls it back by psi * lam / (1 + psi * lam)
        if torch.compiler.is_exporting():  # a program cannot loop over the components that occur
            moved = (mixture.factor[k] @ noise[..., None])[..., 0]
        else:
            moved = torch.empty_like(shrink)
            for component in k.unique():  # one product for all items of a component
                here = k == component
                moved[here] = noise[here] @ mixture.factor[component].T
        x = self._means[k, b] + shrink * moved
        return self._synthesise(x + (psi * shrink).sqrt() * normal[:, r:])


class RowsPosterior(ExactPosterior):
    """See :class:`ExactPosterior`; S is the Cholesky factor of the full posterior covariance."""

    def __init__(self, mixture: Mixture, likelihood: Rows) -> None:
        self.mixture, self.likelihood = mixture, likelihood
        values, vectors = mixture.eigen()  # (K, d), (K, d, d)
        B, _K = likelihood.y.shape[0], mixture.components
        if likelihood.x_t is None or likelihood.sigma is None:
            mean = mixture.mean.expand(B, -1, -1)
            cov = mixture.covariance()[None]
            log_joint = mixture.log_weights.expand(B, -1)
        else:
            total = values + likelihood.sigma[:, None].square()  # (B, K, d)
            residual = likelihood.x_t[:, None] - mixture.mean
            coefficient = torch.einsum("kde,bkd->bke", vectors, residual)
            log_joint = mixture.log_weights - 0.5 * (coefficient.square() / total + total.log() + LOG_2PI).sum(-1)
            mean = mixture.mean + torch.einsum("kde,bke->bkd", vectors, values / total * coefficient)
            shrunk = values * likelihood.sigma[:, None].square() / total
            cov = (vectors * shrunk[:, :, None]) @ vectors.mT
        # Rows are taken in blocks: products of matrices are fast, and the factors of a block stay small. Where y is withheld,
        # the noise is infinite, and the rows are 0.
        seen = torch.isfinite(likelihood.noise)  # (B, 1)
        noise, matrix = torch.where(seen, likelihood.noise, 1.0), likelihood.matrix
        if not torch.compiler.is_exporting() and bool((noise == noise[:1]).all() and seen.all()):
            noise = noise[:1]  # with a common matrix the covariances of all items are equal
        else:
            matrix = torch.where(seen[..., None], matrix, 0.0)
        for rows, value in zip(matrix.split(ROWS, 1), likelihood.y.split(ROWS, 1), strict=True):
            rows = rows[:, None]  # (B, 1, b, d)
            gain = rows @ cov  # (B, K, b, d)
            inner = gain @ rows.mT + torch.diag_embed(noise.square()[..., None].expand(-1, 1, rows.shape[2]))
            chol = torch.linalg.cholesky(inner)
            gain = torch.linalg.solve_triangular(chol, gain, upper=False)
            innovation = torch.where(seen, value, 0.0)[:, None] - (rows @ mean[..., None])[..., 0]
            white = torch.linalg.solve_triangular(chol, innovation[..., None], upper=False)[..., 0]
            log_det = 2 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            term = white.square().sum(-1) + log_det + rows.shape[2] * LOG_2PI
            log_joint = log_joint - 0.5 * torch.where(seen, term, 0.0)
            mean = mean + (gain.mT @ white[..., None])[..., 0]
            cov = cov - gain.mT @ gain
        cov = cov.expand(B, -1, -1, -1)
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
        k, b = self._component(uniform), torch.arange(uniform.shape[0], device=uniform.device)
        chol, noise = _safe_cholesky(self._covs[b, k]), normal[:, self.mixture.rank :].to(self.mean)
        return self._means[b, k] + (chol @ noise[..., None])[..., 0]


def _safe_cholesky(cov: Tensor) -> Tensor:
    """Cholesky factor of a covariance that may be slightly indefinite because of rounding."""
    cov = 0.5 * (cov + cov.mT)
    scale = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eps = torch.finfo(cov.dtype).eps * 4 * scale * torch.eye(cov.shape[-1]).to(cov)
    return torch.linalg.cholesky(cov + eps)
