r"""Linear-Gaussian likelihoods of a flattened item :math:`x \in \mathbb{R}^d`, of two kinds.

* :class:`Diagonal`: :math:`z_i = x_i + \mathcal{N}(0, 1 / \lambda_i)`, independent over the coefficients in an
  orthonormal basis (pixels for masks and noise, cosines for a blur). :math:`\lambda_i = 0` marks an unobserved entry.
* :class:`Rows`: :math:`y = A x + \mathcal{N}(0, s^2 I)` with its own matrix for every item.

Both may include a second observation :math:`x_t = x + \sigma_t z` (:meth:`Diagonal.given`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
        """The basis with its matrices squared entry by entry: it synthesises variances of independent coefficients."""
        return Basis([m if m is None else m.square() for m in self.matrices], self.shape)

    def synthesise(self, c: Tensor) -> Tensor:
        """The item with coefficients c, shape (..., d) -> (..., d)."""
        return self._apply(c, transpose=True)


@dataclass(frozen=True)
class Diagonal:
    """z_i = x_i + N(0, 1 / precision_i) in an orthonormal basis (None: the entries themselves).

    Arguments:
        z: Observed values, shape (B, d); values where the precision is 0 are ignored.
        precision: Inverse noise variances, shape (B, d), >= 0.
        varied: Whether the precision of an entry differs between observed items; exact EM then weights items by it.
    """

    z: Tensor
    precision: Tensor
    basis: Basis | None = None
    varied: bool = False

    def given(self, x_t: Tensor, sigma: Tensor) -> Diagonal:
        """The likelihood when x_t = x + sigma z is observed as well; x_t (B, d), sigma (B, 1)."""
        if self.basis is not None:
            x_t = self.basis.analyse(x_t)
        extra = 1 / sigma.square()
        total = self.precision + extra
        z = torch.where(self.precision > 0, self.z, 0.0)
        # A convex combination, not a sum of large terms: exact to rounding at any precision.
        return replace(self, z=x_t + self.precision / total * (z - x_t), precision=total)

    def withheld(self, where: Tensor) -> Diagonal:
        """The likelihood without the observations of the items where `where` (B,) is true."""
        return replace(self, precision=torch.where(where[:, None], 0.0, self.precision))

    def to(self, reference: Tensor) -> Diagonal:
        return replace(self, z=self.z.to(reference), precision=self.precision.to(reference))


@dataclass(frozen=True)
class Rows:
    """y = A x + N(0, noise^2), with matrices A (B, m, d), y (B, m) and noise > 0 (B, 1), infinite if y is withheld."""

    y: Tensor
    matrix: Tensor
    noise: Tensor
    x_t: Tensor | None = None
    sigma: Tensor | None = None

    def given(self, x_t: Tensor, sigma: Tensor) -> Rows:
        """The likelihood when x_t = x + sigma z is observed as well; x_t (B, d), sigma (B, 1)."""
        return replace(self, x_t=x_t, sigma=sigma)

    def withheld(self, where: Tensor) -> Rows:
        """The likelihood without the observations of the items where `where` (B,) is true."""
        return replace(self, noise=torch.where(where[:, None], torch.inf, self.noise))

    def to(self, reference: Tensor) -> Rows:
        x_t = None if self.x_t is None else self.x_t.to(reference)
        sigma = None if self.sigma is None else self.sigma.to(reference)
        return Rows(self.y.to(reference), self.matrix.to(reference), self.noise.to(reference), x_t, sigma)


Likelihood = Diagonal | Rows
