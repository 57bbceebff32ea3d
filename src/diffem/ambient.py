r"""Ambient Diffusion: a prior from corrupted observations without EM, for masks and projections.

The observation :math:`y = A x` is corrupted further, to :math:`\tilde A x`, and the denoiser is shown only
:math:`\tilde A x_t`. The loss compares with all that was observed,

.. math:: E \, \| W (y - A \, h(\tilde A x_t, \tilde A, \sigma_t)) \|^2 \, ,

and is least for :math:`h = E[x \mid \tilde A x_t, \tilde A]`: given :math:`\tilde A` the network cannot know which further
entries :math:`A` shows, and must predict them all. W (here one over the standard deviation that the reference posterior
leaves to each entry of y) does not move the minimum. Samples are drawn with an :math:`\tilde A` that is drawn once,
posterior samples by diffusion posterior sampling (:mod:`diffem.guidance`) with the same denoiser.
Noise in y is taken for a part of the data, as in the paper.

References:
    | Ambient Diffusion: Learning Clean Distributions from Corrupted Data (Daras et al., 2023), arXiv 2305.19256
    | Ambient Diffusion Posterior Sampling (Aali et al., 2024), arXiv 2403.08728
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diffem import mixtures
from diffem.corruptions import LinearCorruption, Params, RandomMask, RandomProjection
from diffem.denoisers import Denoiser
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Diagonal, Rows, RowsPosterior
from diffem.posteriors import DiffusionPosterior


class AmbientDenoiser(Denoiser):
    """h(A~ x_t, A~, sigma): a :class:`Denoiser` whose `params` are those of A~; y is not used, nor is `withheld`.

    Its head of variances is not trained: they are those of the reference posterior.
    """

    def _posterior(self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor) -> mixtures.Posterior:
        assert isinstance(self.corruption, LinearCorruption)
        if isinstance(self.corruption, RandomProjection):
            # A~ x_t says what its least solution says, whose noise is white where it has any; A~ z is not white
            solve = torch.linalg.pinv(params["matrix"]) @ params["matrix"]
            return self.reference.posterior(Rows((solve @ x_t[..., None])[..., 0], solve, sigma[:, None]))
        likelihood = self.corruption.likelihood(self.corruption.forward(x_t, params), params)
        assert isinstance(likelihood, Diagonal)
        scale = (self.corruption.noise_std / sigma).square()[:, None]
        return self.reference.posterior(replace(likelihood, precision=likelihood.precision * scale))

    def _inputs(
        self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor
    ) -> tuple[mixtures.Posterior, list[Tensor]]:
        assert isinstance(self.corruption, LinearCorruption)
        seen = self.corruption.forward(x_t, params)
        back = self._lift(seen, params)
        scaled = seen * torch.rsqrt(1 + sigma.square()).view(-1, *(1,) * (seen.ndim - 1))
        return super()._inputs(back, sigma, scaled, params, torch.zeros_like(withheld))

    def observed_loss(
        self, y: Tensor, params: Params, further: tuple[Tensor, Params], generator: torch.Generator
    ) -> Tensor:
        """The loss of the module's head for a batch, in model units.

        Arguments:
            y: Observations, shape (B, *y shape).
            params: Parameters of A.
            further: The observations corrupted further, and the parameters of A~.
            generator: Draws times and noise.
        """
        corruption = self.corruption
        assert isinstance(corruption, LinearCorruption)
        sigma = self.times(len(y), generator).to(y)
        level = sigma.view(-1, *(1,) * len(self.shape))
        noise = torch.randn(len(y), *self.shape, generator=generator, device=generator.device).to(y)
        x_t = self._lift(*further) + level * noise
        posterior, f, _ = self.predict(x_t, sigma, y, further[1])
        mean = (posterior.mean + posterior.scale(f)).view(-1, *self.shape).to(y)
        seen = corruption.seen(y, params).expand(y.shape)
        error = (y - corruption.forward(mean, params)).square()
        if isinstance(posterior, RowsPosterior):
            variance = (posterior.chol.mT @ params["matrix"].to(posterior.chol).mT).square().sum(1)
        else:
            variance = posterior.variance.view(y.shape)
        return (error / (variance.detach() + corruption.noise_std**2))[seen].mean()

    def _lift(self, y: Tensor, params: Params) -> Tensor:
        """The least x with A~ x = y."""
        assert isinstance(self.corruption, LinearCorruption)
        if isinstance(self.corruption, RandomProjection):
            return (torch.linalg.pinv(params["matrix"]) @ y[..., None])[..., 0]
        return self.corruption.adjoint(y, params)


class AmbientPosterior(DiffusionPosterior):
    """Samples with an :class:`AmbientDenoiser`; arguments as for :class:`DiffusionPosterior`, whose guidance is `dps`."""

    kind = "ambient"

    def _told(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor) -> Params:
        drawn = self._drawn(y, seeds) if withheld.all() else params  # then params are those of no observation
        return self._further(y, drawn, seeds)

    def _drawn(self, y: Tensor, seeds: Tensor) -> Params:
        """Parameters of the corruption, an item at a time, so that they do not depend on its neighbours."""
        drawn = [self.model_corruption.draw(1, self.shape, _generator(seed)) for seed in seeds]
        return {k: torch.cat([d[k] for d in drawn]).to(y.device) for k in drawn[0]}

    def _further(self, y: Tensor, params: Params, seeds: Tensor) -> Params:
        """Parameters of A~, likewise."""
        parts = []
        for i, seed in enumerate(seeds):
            split = self.model_corruption.thin(
                y[i : i + 1], {k: v[i : i + 1] for k, v in params.items()}, _generator(seed)
            )
            assert split is not None
            parts.append(split[0][1])
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed) & (2**62 - 1))


class Ambient(DiffEM):
    """A run of Ambient Diffusion: one M-step of `m_step.first_steps` on the observations, then samples."""

    denoiser_class = AmbientDenoiser
    sampler_class = AmbientPosterior

    def __init__(self, config, observations, *args, **kwargs) -> None:
        if not isinstance(observations.corruption, RandomMask | RandomProjection):
            name = observations.corruption.config["name"]
            raise DiffemError(f"ambient: needs RandomMask or RandomProjection, got {name}")
        if config.sampler.guidance != "dps" or config.em.iterations != 1:
            raise DiffemError("ambient: needs sampler.guidance dps and em.iterations 1")
        super().__init__(config, observations, *args, **kwargs)

    def _loss(self, x: np.ndarray, generator: torch.Generator, dropout: float) -> Tensor:
        rows = torch.randint(len(self.train), (self.config.m_step.batch,), generator=generator, device=self.device)
        y, params = self.observations.batch(self.train[rows.cpu().numpy()])
        y = self.model_corruption.scale_y(y, params, *self.scaling).to(self.device)
        params = {k: v.to(self.device) for k, v in params.items()}
        split = self.model_corruption.thin(y, params, generator)
        denoiser = self.trainer.denoiser
        assert isinstance(denoiser, AmbientDenoiser)
        assert split is not None
        return denoiser.observed_loss(y, params, split[0], generator)

    def _finish(self) -> None:
        self._sampler(width=0.0).save_pretrained(self.run.folder / "prior")
        self._next("done")
