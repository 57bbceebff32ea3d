r"""Ambient Diffusion: a prior from corrupted observations without EM, for masks and projections.

The observation :math:`y = A x` is corrupted further, to :math:`\tilde A x`, and the denoiser sees only
:math:`\tilde A x_t`. The loss compares its output with all of the observation,

.. math:: E \, \| W (y - A \, h(\tilde A x_t, \tilde A, \sigma_t)) \|^2 \, ,

and is minimal for :math:`h = E[x \mid \tilde A x_t, \tilde A]`: given :math:`\tilde A` the network cannot know which
further entries :math:`A` shows, and must predict them all. The weights W do not move the minimum; here they are one
over the standard deviation of each entry of y under the reference posterior. For sampling, :math:`\tilde A` is drawn
once; posterior samples use diffusion posterior sampling (:mod:`diffem.rivals.guidance`) with the same denoiser. Noise
in y is treated as part of the data, as in the paper.

References:
    | Ambient Diffusion: Learning Clean Distributions from Corrupted Data (Daras et al., 2023), arXiv 2305.19256
    | Ambient Diffusion Posterior Sampling (Aali et al., 2024), arXiv 2403.08728
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffem import seeding
from diffem.corruptions import Params, RandomMask, RandomProjection
from diffem.data import Items
from diffem.denoiser import Denoiser
from diffem.em import STEPS, DiffEM
from diffem.errors import DiffemError
from diffem.loop import finish
from diffem.mixtures import Diagonal, ExactPosterior, Rows
from diffem.mixtures.model import RowsPosterior
from diffem.rivals.guidance import DPSSampler, noise_std
from diffem.samplers import Query, register_sampler


class AmbientDenoiser(Denoiser):
    """h(A~ x_t, A~, sigma): a :class:`Denoiser` whose `params` are those of A~; `y` and `withheld` are not used.

    Its variance head is not trained: the variances are those of the reference posterior.
    """

    def posterior(self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor) -> ExactPosterior:
        if isinstance(self.corruption, RandomProjection):
            # The minimum-norm solution of A~ x = A~ x_t carries the same information as A~ x_t. Its noise is white in
            # the row space of A~; the noise A~ z is not white.
            solve = torch.linalg.pinv(params["matrix"]) @ params["matrix"]
            return self.reference.posterior(Rows((solve @ x_t[..., None])[..., 0], solve, sigma[:, None]))
        likelihood = self.corruption.likelihood(self.corruption.forward(x_t, params), params)
        assert isinstance(likelihood, Diagonal)
        scale = (noise_std(self.corruption) / sigma).square()[:, None]
        return self.reference.posterior(replace(likelihood, precision=likelihood.precision * scale))

    def _inputs(
        self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor
    ) -> tuple[ExactPosterior, list[Tensor]]:
        seen = self.corruption.forward(x_t, params)
        back = self._lift(seen, params)
        scaled = seen * torch.rsqrt(1 + sigma.square()).view(-1, *(1,) * (seen.ndim - 1))
        return super()._inputs(back, sigma, scaled, params, torch.zeros_like(withheld))

    def observed_loss(
        self, y: Tensor, params: Params, further: tuple[Tensor, Params], generator: torch.Generator
    ) -> Tensor:
        """The loss of the module docstring for a batch, in model units.

        Arguments:
            y: Observations, shape (B, *y shape).
            params: Parameters of A.
            further: The observations corrupted further, and the parameters of A~.
            generator: Draws noise levels and noise.
        """
        corruption = self.corruption
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
        return (error / (variance.detach() + noise_std(corruption) ** 2))[seen].mean()

    def _lift(self, y: Tensor, params: Params) -> Tensor:
        """The minimum-norm x with A~ x = y."""
        if isinstance(self.corruption, RandomProjection):
            return (torch.linalg.pinv(params["matrix"]) @ y[..., None])[..., 0]
        return self.corruption.adjoint(y, params)


@register_sampler
class AmbientSampler(DPSSampler):
    """Samples with an :class:`AmbientDenoiser`, guided as in `dps`."""

    kind = "ambient"
    denoiser_class = AmbientDenoiser

    @classmethod
    def suits(cls, corruption, sampler, denoiser) -> None:
        if not isinstance(corruption, RandomMask | RandomProjection):
            raise DiffemError(f"ambient: needs RandomMask or RandomProjection, got {corruption.config['name']}")
        super().suits(corruption, sampler, denoiser)

    def shown(self, query: Query) -> Params:
        if query.shown is None:
            # if there is no observation, its parameters are drawn too
            params = self._drawn(query.y, query.seeds) if query.withheld.all() else query.params
            query.shown = self._further(query.y, params, query.seeds)
        return query.shown

    def _drawn(self, y: Tensor, seeds: Tensor) -> Params:
        """Parameters of the corruption, drawn item by item, so that they do not depend on the batch."""
        drawn = [self.corruption.draw(1, self.shape, _generator(seed)) for seed in seeds]
        return {k: torch.cat([d[k] for d in drawn]).to(y.device) for k in drawn[0]}

    def _further(self, y: Tensor, params: Params, seeds: Tensor) -> Params:
        """Parameters of A~, also drawn item by item."""
        parts = []
        for i, seed in enumerate(seeds):
            split = self.corruption.thin(y[i : i + 1], {k: v[i : i + 1] for k, v in params.items()}, _generator(seed))
            assert split is not None
            parts.append(split[0][1])
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed) & (2**62 - 1))


def prior(em: DiffEM) -> None:
    """The prior is the posterior's own network."""
    em.posterior(em.diffusion(width=0.0)).save_pretrained(em.run.folder / "prior")
    em.next_iteration("done")
    finish(em)


class Ambient(DiffEM):
    """A run of Ambient Diffusion: one M-step of `m_step.first_steps` updates on the observations, then sampling."""

    steps = {**STEPS, "prior": prior}  # noqa: RUF012

    def __init__(self, config, *args, **kwargs) -> None:
        if config.sampler.kind != "ambient" or config.em.iterations != 1:
            raise DiffemError("ambient: needs sampler.kind ambient and em.iterations 1")
        super().__init__(config, *args, **kwargs)
        # the further corruption is drawn by the formula, so that sampling needs no data
        self.data.corruption = self.observations.corruption.scaled(self.data.units)

    def losses(self, x: Items, generator: torch.Generator, dropout: float) -> list[Tensor]:
        rows = seeding.integers(len(self.train), self.config.m_step.batch, generator)
        y, params = self.data.batch(self.train[rows], self.device)
        split, denoiser = self.data.corruption.thin(y, params, generator), self.trainer.denoiser
        assert isinstance(denoiser, AmbientDenoiser)
        assert split is not None
        return [denoiser.observed_loss(y, params, split[0], generator)]


AmbientSampler.algorithm = Ambient
