r"""The directions of x in which observations vary, and those in which they do not: a cross-validated spectrum.

Second moments of :math:`x` are estimated for pairs of coefficients (entries, or cosine coefficients for a blur), over
the observations that show both. For few features, and for projections, they are the weighted least-squares solution
:math:`C` of

.. math:: E[r r^T \mid A] = A C A^T + s^2 I \, , \qquad r = y - A \bar x \, , \qquad
    \textrm{weights } S^{-1} \otimes S^{-1} \, , \qquad S = A C A^T + s^2 I \, ,

iterated. This is Fisher scoring of the Gaussian likelihood; if data are not Gaussian, the weights lose efficiency but
cause no bias. Where several combinations of x are measured at once, the weights favour rows that hardly vary.

The variance along a direction is biased low in the sample in which the direction was found. So directions are found in
one half of the sample, and their variance is taken from the other half, in blocks that give its standard error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DIRECTIONS = 256  # the largest number of coordinates,
WEIGHTED = 12  # and the largest for weighted least squares
ROUNDS = 4  # iterations of weighted least squares
BLOCKS = 16  # parts of the sample
FEW = 20  # fewer observations of a pair are too few
SURE = 5.0  # coordinates are used if their variance is above 0 by this many standard errors
GAP = 8.0  # constant directions vary less than all others by this factor; a smoothly decaying spectrum has no such gap
NEARLY = 1e-3  # a share of the variance that counts as zero


@dataclass(frozen=True)
class Spectrum:
    """The cross-validated variances along the principal directions of x, in ascending order.

    Attributes:
        kept: The coordinates that are used: those that vary, (k,).
        share: Variances, without the noise, in units in which each coordinate has variance 1, (k,).
        error: Their standard errors over the blocks.
        width: The squared length of each direction in the units of y: share / width is the variance along it.
        vectors: The directions, one per column, (k, k).
        noise: The declared noise.
    """

    kept: np.ndarray
    share: np.ndarray
    error: np.ndarray
    width: np.ndarray
    vectors: np.ndarray
    noise: float

    @classmethod
    def of(cls, z: np.ndarray, seen: np.ndarray, matrix: Tensor | None, noise: float) -> Spectrum | None:
        """The spectrum of observations, or None if there are too many coordinates, or too few observations of some
        pair.

        Arguments:
            z: Coefficients, (n, d); or measurements by matrices, (n, m).
            seen: Which of them were observed, same shape.
            matrix: The matrices, (n, m, features), or None.
            noise: The standard deviation of the noise on z.
        """
        if len(z) < 2 * BLOCKS:
            return None
        few = matrix is not None or z.shape[1] <= WEIGHTED
        blocks = _weighted(z, seen, matrix, noise) if few else _pairs(z, seen, noise)
        if blocks is None:
            return None
        variance = blocks.diagonal(axis1=1, axis2=2)
        mean, error = variance.mean(0), variance.std(0, ddof=1) / math.sqrt(BLOCKS)
        kept = np.flatnonzero((mean > SURE * error) & (mean > 1e-10 * mean.mean()))
        if len(kept) < 2:
            return None
        scale = np.sqrt(mean[kept])
        blocks = blocks[:, kept[:, None], kept] / np.outer(scale, scale)
        share = np.zeros((BLOCKS, len(kept)))
        for half in (0, 1):
            vectors = np.linalg.eigh(blocks[1 - half :: 2].sum(0))[1]
            share[half::2] = np.einsum("ik,bij,jk->bk", vectors, blocks[half::2], vectors, optimize=True)
        vectors = np.linalg.eigh(blocks.sum(0))[1]
        width = np.square(vectors / scale[:, None]).sum(0)
        return cls(kept, share.mean(0), share.std(0, ddof=1) / math.sqrt(BLOCKS), width, vectors, noise)

    @property
    def constant(self) -> int:
        """How many directions do not vary: their variances are not significantly above zero, or less than the noise,
        while all others are larger by the factor :data:`GAP`."""
        least = np.maximum(self.noise**2 * self.width, NEARLY)  # smaller variances count as zero
        zero = np.logical_and.accumulate(self.share <= np.maximum(4 * self.error, least))
        upper = np.maximum.accumulate(np.maximum(np.maximum(self.share, 0) + 3 * self.error, least))
        lower = np.minimum.accumulate((self.share - 3 * self.error)[::-1])[::-1]
        return max((k for k in range(1, len(zero)) if zero[k - 1] and lower[k] >= GAP * upper[k - 1]), default=0)


def _pairs(z: np.ndarray, seen: np.ndarray, noise: float) -> np.ndarray | None:
    """Covariances, with the noise subtracted, from each block of the sample, (BLOCKS, d, d), pair by pair."""
    d, shown = z.shape[1], seen.astype(np.float64)
    if d > DIRECTIONS or (together := shown.T @ shown).min() < FEW:
        return None
    u = (z - (z * shown).sum(0) / shown.sum(0)) * shown
    return np.stack([u[b::BLOCKS].T @ u[b::BLOCKS] * BLOCKS / together for b in range(BLOCKS)]) - noise**2 * np.eye(d)


def _weighted(z: np.ndarray, seen: np.ndarray, matrix: Tensor | None, noise: float) -> np.ndarray | None:
    """The same by weighted least squares, see the module."""
    n = len(z) // BLOCKS * BLOCKS
    if matrix is None:  # in standardised units, since weights are regularised by a share of the mean variance
        scale = np.array([z[seen[:, i], i].std() if seen[:, i].any() else 0.0 for i in range(z.shape[1])])
        a = torch.diag_embed(torch.from_numpy(seen[:n] * np.where(scale > 0, scale, 1.0)))
    else:
        a = matrix[:n].double()
        scale = np.ones(a.shape[2])
    y, d = torch.from_numpy(z[:n]), a.shape[2]
    if d > WEIGHTED or not y.var() > 0:
        return None
    flat = (a.mT @ a).flatten(1)
    if torch.linalg.matrix_rank(_kronecker(flat), rtol=1e-9, hermitian=True) < d * (d + 1) // 2:
        return None  # some pair is never seen together
    guess, mean = torch.eye(d).double() * y.square().sum() / a.square().sum(), None
    for _ in range(ROUNDS):
        guess, mean = _solve(a, y, noise, guess)
    parts = [_solve(a[b::BLOCKS], y[b::BLOCKS], noise, guess, mean)[0].numpy() for b in range(BLOCKS)]
    return np.stack(parts) * np.outer(scale, scale)


def _solve(a: Tensor, y: Tensor, noise: float, guess: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The C (d, d) that solves sum K C K = sum e e^T minus the noise's part, with K = A^T S^-1 A and e = A^T S^-1 r.

    Arguments:
        a: Rows A, (n, m, d); a row of zeros measures nothing.
        y: Values, (n, m).
        noise: The standard deviation of the noise.
        guess: The C that defines the weights, (d, d).
        mean: The mean of x, (d,); if None, estimated with the same weights. It is also returned.
    """
    values, vectors = torch.linalg.eigh(guess)
    model = (vectors * values.clamp(min=1e-3 * values.mean().abs().item())) @ vectors.T
    level = (noise**2 + 1e-6 * model.trace() / len(model)) * torch.eye(a.shape[1]).double()
    weights = torch.linalg.solve(a @ model @ a.mT + level, a)  # S^-1 A
    k = a.mT @ weights
    if mean is None:
        mean = torch.linalg.pinv(k.sum(0)) @ (weights * y[..., None]).sum((0, 1))
    e = (weights * (y - a @ mean)[..., None]).sum(1)
    right = e.T @ e - noise**2 * (weights.mT @ weights).sum(0)
    inverse = torch.linalg.pinv(_kronecker(k.flatten(1)), rtol=1e-12, hermitian=True)
    solution = (inverse @ right.flatten()).view_as(right)
    return (solution + solution.T) / 2, mean


def _kronecker(k: Tensor) -> Tensor:
    """The matrix (d^2, d^2) that maps C to the sum of K C K, for symmetric K given flattened, (n, d^2)."""
    d = math.isqrt(k.shape[1])
    return (k.T @ k).view(d, d, d, d).transpose(1, 2).reshape(d * d, d * d)
