r"""Posterior sampling with a denoiser that knows no observation: the E-steps of earlier EM methods.

Given the denoiser's mean :math:`\hat x = d(x_t, \sigma_t)`, they put in its place

* `mmps`, moment matching (EM-MMPS): :math:`\hat x + C A^T (s^2 I + A C A^T)^{-1} (y - A \hat x)` with
  :math:`C = \sigma_t^2 \, \partial \hat x / \partial x_t`, which is :math:`\mathrm{Cov}[x \mid x_t]` for the exact
  denoiser. Exact where :math:`p(x \mid x_t)` is Gaussian and the solver has converged.
* `dps` (EMDiffusion): :math:`\hat x - \zeta / \tau \, \nabla_{x_t} \| y - A \hat x \|`, so that the step of
  :mod:`diffem.posteriors` ends :math:`\zeta \nabla` away. It takes no account of :math:`\mathrm{Cov}[x \mid x_t]`, and
  is biased: it follows the observation too little where the noise level is high and too much where it is low.

Both differentiate through the network, at every step of the sampler.

References:
    | Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024), arXiv 2405.13712
    | Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023), arXiv 2209.14687
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from azula.denoise import Denoiser as AzulaDenoiser
from azula.denoise import DiracPosterior
from azula.guidance.mmps import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VESchedule
from torch import Tensor

from diffem.corruptions import LinearCorruption, Params

Mean = Callable[[Tensor], Tensor]


class _AtLevel(AzulaDenoiser):
    """A function x_t -> mean at one noise level, as azula wants it."""

    def __init__(self, mean: Mean, sigma: Tensor) -> None:
        super().__init__()
        self.mean, self.schedule = mean, VESchedule(float(sigma), float(sigma))

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        return DiracPosterior(mean=self.mean(x_t))


def mmps(
    mean: Mean,
    x_t: Tensor,
    sigma: Tensor,
    y: Tensor,
    params: Params,
    corruption: LinearCorruption,
    solver: str = "gmres",
    iterations: int = 1,
) -> Tensor:
    """The moment-matched posterior mean of x.

    Arguments:
        mean: The denoiser at this noise level, x_t -> E[x | x_t].
        x_t: Noisy items, shape (B, *shape).
        sigma: Their noise level, a scalar.
        y: Observations in model units, shape (B, *y shape).
        params: Their operator parameters.
        corruption: The corruption in model units.
        solver: `gmres` or `cg`.
        iterations: Of the solver; each differentiates through the network once, and the result once more.

    Returns:
        Shape (B, *shape).
    """
    noise = IsotropicCovariance(corruption.noise_std**2)

    def forward(x: Tensor) -> Tensor:
        return corruption.forward(x, params).flatten(1)

    guided = MMPSDenoiser(_AtLevel(mean, sigma), y.flatten(1), forward, noise, solver, iterations)
    with warnings.catch_warnings():  # of torch about itself, at its first derivative in forward mode
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        return guided(x_t, torch.zeros((), device=x_t.device)).mean


def dps(
    mean: Mean,
    x_t: Tensor,
    y: Tensor,
    params: Params,
    corruption: LinearCorruption,
    strength: float,
    tau: Tensor,
) -> Tensor:
    """The mean of x, moved towards the observation.

    Arguments:
        mean: The denoiser at this noise level, x_t -> E[x | x_t].
        x_t: Noisy items, shape (B, *shape).
        y: Observations in model units, shape (B, *y shape).
        params: Their operator parameters.
        corruption: The corruption in model units.
        strength: zeta.
        tau: The share of the way to the mean that the sampler's step goes.

    Returns:
        Shape (B, *shape).
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        x = mean(x_t)
        # an item at a time: azula's takes one norm of the whole batch, so that a draw would depend on its neighbours
        distance = (y - corruption.forward(x, params)).flatten(1).norm(dim=1).sum()
    return x.detach() - strength / tau * torch.autograd.grad(distance, x_t)[0]
