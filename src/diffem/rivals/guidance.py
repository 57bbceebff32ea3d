r"""Posterior sampling with a denoiser that sees no observation: the E-steps of earlier EM methods.

They replace the denoiser's mean :math:`\hat x = d(x_t, \sigma_t)` by

* `mmps`, moment matching (EM-MMPS): :math:`\hat x + C A^T (s^2 I + A C A^T)^{-1} (y - A \hat x)` with
  :math:`C = \sigma_t^2 \, \partial \hat x / \partial x_t`, which is :math:`\mathrm{Cov}[x \mid x_t]` for the exact
  denoiser. Exact where :math:`p(x \mid x_t)` is Gaussian and the solver has converged.
* `dps` (EMDiffusion): :math:`\hat x - \zeta / \tau \, \nabla_{x_t} \| y - A \hat x \|`, which shifts the result of the
  step of :mod:`diffem.samplers` by :math:`-\zeta \nabla`. It ignores :math:`\mathrm{Cov}[x \mid x_t]`, and is biased:
  it follows the observation too little at high noise levels, and too much at low ones.

Both differentiate through the network, at every step of the sampler. They are selected by `sampler.kind`, and
configured by `sampler.options`: `solver` (`gmres` or `cg`) and its `iterations` for `mmps`, `strength` (zeta) for
`dps`.

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

from diffem.corruptions import Corruption, Params
from diffem.corruptions.base import NOISE_FLOOR
from diffem.denoiser import DenoiserConfig
from diffem.errors import DiffemError, suggest
from diffem.samplers import DiffusionSampler, Query, SamplerConfig, register_sampler

Mean = Callable[[Tensor], Tensor]


class _AtLevel(AzulaDenoiser):
    """A function x_t -> mean at one noise level, as a denoiser of azula."""

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
    corruption: Corruption,
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
        iterations: Iterations of the solver. Each differentiates through the network once, the result once more.

    Returns:
        Shape (B, *shape).
    """
    noise = IsotropicCovariance(noise_std(corruption) ** 2)

    def forward(x: Tensor) -> Tensor:
        return corruption.forward(x, params).flatten(1)

    guided = MMPSDenoiser(_AtLevel(mean, sigma), y.flatten(1), forward, noise, solver, iterations)
    with warnings.catch_warnings():  # torch's own deprecation warning, at the first forward-mode derivative
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        return guided(x_t, torch.zeros((), device=x_t.device)).mean


def dps(
    mean: Mean,
    x_t: Tensor,
    y: Tensor,
    params: Params,
    corruption: Corruption,
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
        tau: The fraction of the way to the mean that the sampler's step covers.

    Returns:
        Shape (B, *shape).
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        x = mean(x_t)
        # a norm per item: azula's norm of the whole batch would make a draw depend on the other items
        distance = (y - corruption.forward(x, params)).flatten(1).norm(dim=1).sum()
    return x.detach() - strength / tau * torch.autograd.grad(distance, x_t)[0]


def noise_std(corruption: Corruption) -> float:
    """The standard deviation of noise that is the same everywhere, at least :data:`NOISE_FLOOR`."""
    assert isinstance(corruption.noise, float)
    return max(corruption.noise, NOISE_FLOOR)


class GuidedSampler(DiffusionSampler):
    """Reverse diffusion with a network that sees no observation; its mean is guided towards the observation."""

    widens = False
    options: dict[str, object]  # names and defaults

    @classmethod
    def suits(cls, corruption: Corruption, sampler: SamplerConfig, denoiser: DenoiserConfig) -> None:
        if not corruption.linear:
            raise DiffemError(f"sampler.kind: {cls.kind} needs a linear-Gaussian corruption; use diffusion")
        if not isinstance(corruption.noise, float):
            raise DiffemError(f"sampler.kind: {cls.kind} needs noise that is the same everywhere; use diffusion")
        for name, value in sampler.options.items():
            if name not in cls.options:
                raise DiffemError(
                    f"sampler.options: {name}: {cls.kind} has no such option;{suggest(name, cls.options)}"
                )
            wanted = type(cls.options[name])
            if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
                raise DiffemError(f"sampler.options: {name}: must be like {cls.options[name]!r}, got {value!r}")
        if denoiser.observation_dropout != 1:
            raise DiffemError(
                f"sampler.kind: {cls.kind} guides a network that sees no observation; set denoiser.observation_dropout to 1"
            )

    def option(self, name: str):
        """The configured value of an option, or its default."""
        return self.settings.options.get(name, self.options[name])

    def shown(self, query: Query) -> Params:
        """The operator parameters that the network sees."""
        return query.params

    def estimate(self, x: Tensor, sigma: Tensor, tau: Tensor, query: Query, stream: int) -> Tensor:
        unseen, params = torch.ones_like(query.withheld), self.shown(query)

        def mean(x_t: Tensor) -> Tensor:
            return self.denoiser(x_t, sigma.expand(len(x_t)), query.y, params, unseen)

        if query.withheld.all():  # a draw from the prior, with nothing to guide it
            return super().estimate(x, sigma, tau, query, stream)
        return self.guided(mean, x, sigma, tau, query)

    def guided(self, mean: Mean, x: Tensor, sigma: Tensor, tau: Tensor, query: Query) -> Tensor:
        """The mean, corrected by the observation."""
        raise NotImplementedError


@register_sampler
class MMPSSampler(GuidedSampler):
    """The E-step of EM-MMPS."""

    kind = "mmps"
    options = {"solver": "gmres", "iterations": 1}  # noqa: RUF012

    @classmethod
    def suits(cls, corruption: Corruption, sampler: SamplerConfig, denoiser: DenoiserConfig) -> None:
        super().suits(corruption, sampler, denoiser)
        solver = sampler.options.get("solver", "gmres")
        if solver not in ("gmres", "cg") or sampler.options.get("iterations", 1) < 1:
            raise DiffemError("sampler.options: solver must be gmres or cg, with iterations at least 1")

    @classmethod
    def evaluations(cls, sampler: SamplerConfig, renoised: bool = False) -> int:
        return super().evaluations(sampler, renoised) * (1 + 2 * (sampler.options.get("iterations", 1) + 1))

    def guided(self, mean: Mean, x: Tensor, sigma: Tensor, tau: Tensor, query: Query) -> Tensor:
        solver, iterations = self.option("solver"), self.option("iterations")
        return mmps(mean, x, sigma, query.y, query.params, self.corruption, solver, iterations)


@register_sampler
class DPSSampler(GuidedSampler):
    """The E-step of EMDiffusion."""

    kind = "dps"
    options = {"strength": 1.0}  # noqa: RUF012

    @classmethod
    def evaluations(cls, sampler: SamplerConfig, renoised: bool = False) -> int:
        return 3 * super().evaluations(sampler, renoised)

    def guided(self, mean: Mean, x: Tensor, sigma: Tensor, tau: Tensor, query: Query) -> Tensor:
        return dps(mean, x, query.y, query.params, self.corruption, self.option("strength"), tau)
