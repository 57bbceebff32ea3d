r"""Samplers of q(x | y), in model units; the E-step draws from them.

:class:`DiffusionSampler` runs the reverse diffusion from :math:`\sigma_t` to :math:`\sigma_s` in steps

.. math:: x_s = x_t - \tau (x_t - \hat x) + \sigma_s \sqrt\tau \, z \, , \qquad
    \tau = 1 - \sigma_s^2 / \sigma_t^2 \, , \qquad
    \hat x = d(x_t, \sigma_t, y) + \sqrt{w_t \, v} \, (r - m) \, .

With width :math:`w = 0` this is DDPM, the sampler of the paper, which loses variance when the steps are few. With
:math:`w = 1` the residual variance of the denoiser is put back: :math:`r` is a draw from the reference posterior,
:math:`m` its mean, and :math:`v(x_t, \sigma_t, y)` the share of its variance that the denoiser leaves unexplained, as
predicted by its second head (:mod:`diffem.denoiser`; NPR-DPM, Bao et al., arXiv 2206.07309).

With an imperfect network the draws are still over-confident. :math:`w > 1` puts back more variance, in entries that are
uncertain. With the variances :math:`s_t^2` of the entries under the reference posterior,

.. math:: w_t = \min(w, 1) + \max(w - 1, 0) \, s_t^2 / \max s_T^2

for every entry: the full w for the most uncertain entry at the first step T, and hardly more than 1 for entries that
were observed or never vary, and at low noise. The same factor everywhere would add visible noise there.

To add your own sampler, write a subclass of :class:`Sampler` with a `kind`, and decorate it with
:func:`register_sampler`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffem import memory, seeding
from diffem.corruptions import Corruption, Params
from diffem.data import Dataset
from diffem.denoiser import OTHER_WEIGHTS, Denoiser, DenoiserConfig
from diffem.errors import DiffemError, suggest
from diffem.mixtures import Mixture
from diffem.networks import Given, NetworkConfig

MOST_STEPS = 3000  # each step uses three random streams; streams of other purposes begin at 10,000
WIDEST = 100.0
WIDTHS = (0.5, 0.7, 1.0, 1.5, 2.5, 4.0, 6.0, 9.0)  # candidates for the width of the final draws
MIDDLE = 1.0  # the noise level, in model units, at which renoising begins: twice the spread of data
RENOISE_STEPS = 2  # at least, of renoising: it takes max(2, steps // 4) steps, but no more than the sampler has
BATCH = 256  # default number of items at a time


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler.

    Attributes:
        kind: `diffusion`, or the name of another registered sampler. `mmps`, `dps` and `ambient` are those of other
            methods; choose them only to compare.
        steps: Number of steps from noise to a draw; the time of a draw is proportional to it. Lower it if E-steps take
            most of the time, raise it if draws look noisy.
        width: How much of the residual variance the draws of an E-step put back: 1 for all of it, 0 for none (plain
            DDPM, as in the paper). The residual variance is what the denoiser leaves unexplained; a second output of
            the network predicts it. For the final draws, with em.guard, the width is 1, or another value if that scores
            better. A width of 0 is kept, and so is any width for black boxes (corruptions that can only be simulated,
            such as a function of yours), where predictions cannot be scored. Change it only to reproduce the paper.
        options: Further arguments, for kinds that have them: `solver` and `iterations` of `mmps`, `strength` of `dps`
            and `ambient`.
    """

    kind: str = "diffusion"
    steps: int = 16
    width: float = 1.0
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS or not 0 <= self.width <= WIDEST:
            raise DiffemError(f"sampler: steps must be from 1 to {MOST_STEPS:,}, width from 0 to {WIDEST:g}")


class Sampler(nn.Module):
    """Draws x given y, in model units.

    Arguments:
        corruption: The corruption, in model units.
        shape: The shape of an item.
    """

    kind = ""

    def __init__(self, corruption: Corruption, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.corruption, self.shape = corruption, tuple(shape)

    def draw(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor | None = None) -> Tensor:
        """One draw per observation, shape (B, *shape).

        Arguments:
            y: Observations in model units, shape (B, *y shape), on :attr:`device`.
            params: Their parameters.
            seeds: One key per item (:func:`diffem.seeding.item_seeds`), shape (B,); they determine all random numbers.
            withheld: True where the observation must not be used, shape (B,); nowhere by default. Without its
                observation an item is drawn from the prior.
        """
        raise NotImplementedError

    def renoise(self, x: Tensor, y: Tensor, params: Params, seeds: Tensor) -> Tensor:
        """One draw per observation that may depend on an earlier draw x (B, *shape) from a similar sampler."""
        return self.draw(y, params, seeds)

    @property
    def mixture(self) -> Mixture | None:
        """The mixture that can be the reference of a denoiser trained from this start; None if there is none."""
        return None

    @property
    def device(self) -> torch.device:
        """The device on which it computes."""
        return torch.device("cpu")

    def footprint(self) -> int:
        """Approximate memory that drawing takes per item, in bytes."""
        d, mixture = math.prod(self.shape), self.mixture
        floats = 16 * d
        if mixture is not None:
            floats += mixture.components * (8 * d + 4 * mixture.rank**2)
        return 4 * floats

    @property
    def config(self) -> dict:
        """Values from which :meth:`rebuild` restores it, in addition to its tensors."""
        return {}

    @classmethod
    def rebuild(
        cls,
        config: dict,
        tensors: dict[str, Tensor],
        corruption: Corruption,
        shape: tuple[int, ...],
        network: Given | None = None,
    ) -> Sampler:
        """A sampler with this :attr:`config` and tensors of these shapes, whose values are loaded later."""
        return cls(corruption, shape)


SAMPLERS: dict[str, type[Sampler]] = {}


def register_sampler(kind: type[Sampler]) -> type[Sampler]:
    """Registers a class of samplers under its `kind`, for configurations and saved models. A decorator."""
    SAMPLERS[kind.kind] = kind
    return kind


def kind_of(name: str, where: str) -> type[Sampler]:
    """The class of samplers with that name; `where` is the setting or the file that an error names."""
    if name not in SAMPLERS:
        raise DiffemError(f"{where}: unknown sampler {name!r};{suggest(str(name), SAMPLERS)}; is its module imported?")
    return SAMPLERS[name]


def trained_kind(config: SamplerConfig) -> type[DiffusionSampler]:
    """The class of samplers that a configuration names; it must be trainable."""
    kind = kind_of(config.kind, "sampler.kind")
    if not issubclass(kind, DiffusionSampler):
        raise DiffemError(f"sampler.kind: {config.kind} has no network that could be trained; use diffusion")
    return kind


@register_sampler
class ObservationSampler(Sampler):
    """The corruption's own reconstruction of an observation (:meth:`Corruption.initial`): usually the observation
    itself, with the middle of the range where nothing was observed; or a uniform draw from
    :meth:`Corruption.interval`."""

    kind = "observation"

    def draw(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor | None = None) -> Tensor:
        x, end = self.corruption.interval(y, params)
        if tuple(x.shape[1:]) != self.shape:
            raise DiffemError(
                f"start.kind: observation: y of shape {tuple(x.shape[1:])} cannot stand for items of shape {self.shape}; "
                "give the corruption an initial(y, params)"
            )
        return x + (end - x) * seeding.uniform(seeds, self.shape)


@register_sampler
class MixtureSampler(Sampler):
    """The exact posterior under a mixture of Gaussians."""

    kind = "mixture"

    def __init__(self, corruption: Corruption, shape: tuple[int, ...], mixture: Mixture) -> None:
        super().__init__(corruption, shape)
        self.prior = mixture

    @property
    def mixture(self) -> Mixture:
        return self.prior

    @property
    def device(self) -> torch.device:
        return self.prior.mean.device

    @classmethod
    def rebuild(cls, config, tensors, corruption, shape, network=None) -> MixtureSampler:
        return cls(corruption, shape, _mixture(tensors, "prior.", corruption, shape))

    @torch.no_grad()
    def draw(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor | None = None) -> Tensor:
        likelihood = self.corruption.likelihood(y, params)
        posterior = self.prior.posterior(likelihood if withheld is None else likelihood.withheld(withheld))
        width = self.prior.rank + self.prior.features
        draw = posterior.draw(seeding.uniform(seeds), seeding.normal(seeds, (width,), stream=1))
        return self.corruption.possible(draw.view(-1, *self.shape).float())


@register_sampler
class DiffusionSampler(Sampler):
    """Reverse diffusion with a denoiser; see the module.

    Arguments:
        denoiser: In model units.
        sampler: See :class:`SamplerConfig`; `width` is w. Up to 1 it is the share of the residual variance that is put
            back; for larger values see the module.
    """

    kind = "diffusion"
    denoiser_class = Denoiser
    widens = True  # whether the width changes the draws
    algorithm: type | None = None  # the class of its runs, if not DiffEM

    def __init__(self, denoiser: Denoiser, sampler: SamplerConfig) -> None:
        super().__init__(denoiser.corruption, denoiser.shape)
        self.denoiser, self.settings, self.width = denoiser, sampler, sampler.width

    @classmethod
    def suits(cls, corruption: Corruption, sampler: SamplerConfig, denoiser: DenoiserConfig) -> None:
        """Raises a DiffemError if it does not support this corruption or these settings."""
        if sampler.options:
            raise DiffemError(f"sampler.options: {next(iter(sampler.options))}: {cls.kind} has no options")

    @classmethod
    def evaluations(cls, sampler: SamplerConfig, renoised: bool = False) -> int:
        """The cost of one draw in evaluations of the network; a derivative through the network counts as two more."""
        return (renoise_steps(sampler.steps) if renoised else sampler.steps) + 1

    @property
    def mixture(self) -> Mixture | None:
        return self.denoiser.reference if self.denoiser.precondition == "start" else None

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def config(self) -> dict:
        built_by = self.denoiser.built_by
        return {
            "denoiser": {**asdict(self.denoiser.config), "precondition": self.denoiser.precondition},
            "network": asdict(built_by) if isinstance(built_by, NetworkConfig) else None,
            "sampler": asdict(self.settings),
        }

    @classmethod
    def rebuild(cls, config, tensors, corruption, shape, network=None) -> DiffusionSampler:
        fields = config["network"]
        if fields is None and network is None:
            raise DiffemError("its network is not one of diffem's; give it with network=")
        if network is None:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            network = NetworkConfig(**plain)
            if max(network.depth, *network.blocks) > len(tensors):
                raise DiffemError(OTHER_WEIGHTS)
        of_denoiser = DenoiserConfig(**config["denoiser"])
        start = _mixture(tensors, "denoiser.reference.", corruption, shape)
        prefix = "denoiser.network."
        weights = {k.removeprefix(prefix): v.shape for k, v in tensors.items() if k.startswith(prefix)}
        denoiser = cls.denoiser_class(corruption, shape, of_denoiser, network, start, weights)
        return cls(denoiser, SamplerConfig(**config["sampler"]))

    def footprint(self) -> int:
        nothing = torch.zeros(1, *self.shape)
        y, params = self.corruption.observe(nothing, torch.Generator().manual_seed(0))
        y, params = y.to(self.device), {k: v.to(self.device) for k, v in params.items()}
        sigma = torch.ones(1, device=self.device)
        with torch.no_grad():
            evaluate = lambda: self.denoiser.predict(nothing.to(self.device), sigma, y, params)  # noqa: E731
            return super().footprint() + memory.of_draw(self.denoiser.network, evaluate)

    @property
    def sigmas(self) -> Tensor:
        """The noise levels, largest first, shape (steps + 1,)."""
        return self.denoiser.schedule.sigma(torch.linspace(1, 0, self.settings.steps + 1))

    @torch.no_grad()
    def draw(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor | None = None) -> Tensor:
        if withheld is None:
            withheld = torch.zeros(y.shape[:1], dtype=torch.bool, device=y.device)
        sigmas = self.sigmas.to(y)
        return self._reverse(sigmas[0] * seeding.normal(seeds, self.shape), sigmas, Query(y, params, withheld, seeds))

    @torch.no_grad()
    def renoise(self, x: Tensor, y: Tensor, params: Params, seeds: Tensor) -> Tensor:
        """Adds noise to earlier draws, up to a middle level, and removes it again. A draw of the right distribution stays one."""
        low, high = float(self.sigmas[-1]), min(float(self.sigmas[0]), MIDDLE)
        sigmas = torch.logspace(math.log10(high), math.log10(low), renoise_steps(self.settings.steps) + 1).to(y)
        query = Query(y, params, torch.zeros(y.shape[:1], dtype=torch.bool, device=y.device), seeds)
        return self._reverse(x + sigmas[0] * seeding.normal(seeds, self.shape), sigmas, query)

    def _reverse(self, x: Tensor, sigmas: Tensor, query: Query) -> Tensor:
        """Reverse diffusion of x (B, *shape), which has the first of the noise levels, down to none."""
        for k, sigma in enumerate(sigmas):
            after = sigmas[k + 1] if k + 1 < len(sigmas) else torch.zeros_like(sigma)
            tau = 1 - (after / sigma).square()
            clean = self.estimate(x, sigma, tau, query, stream=3 * k + 1).view(x.shape).to(x)
            x = x - tau * (x - clean) + after * tau.sqrt() * seeding.normal(query.seeds, self.shape, stream=3 * k + 3)
        return x

    def estimate(self, x: Tensor, sigma: Tensor, tau: Tensor, query: Query, stream: int) -> Tensor:
        """The clean item that a step moves towards, (B, *shape) or flat: the mean plus a draw of the residual variance.

        Arguments:
            x: Noisy items (B, *shape).
            sigma: Their noise level, a scalar.
            tau: The fraction of the way to the estimate that the step covers.
            query: The arguments of the draw.
            stream: The first of two unused random streams of the items.
        """
        mean, rest = self.parts(x, sigma, query, stream)
        return mean + rest

    def parts(self, x: Tensor, sigma: Tensor, query: Query, stream: int) -> tuple[Tensor, Tensor]:
        """The mean, and the draw of the residual variance that is added to it; both flat. Arguments as for
        :meth:`estimate`."""
        params = query.params if query.shown is None else query.shown
        posterior, f, v = self.denoiser.predict(x, sigma.expand(x.shape[:1]), query.y, params, query.withheld)
        mean = posterior.mean + posterior.scale(f)
        if not self.width:
            return mean, torch.zeros_like(mean)
        reference = self.denoiser.reference
        uniform = seeding.uniform(query.seeds, stream=stream)
        normal = seeding.normal(query.seeds, (reference.rank + reference.features,), stream=stream + 1)
        factor: Tensor | float = min(self.width, 1.0)
        if self.width > 1:
            if query.widest is None:
                query.widest = posterior.variance.amax(1, keepdim=True)
            factor = 1 + (self.width - 1) * posterior.variance / query.widest
        return mean, (v * factor).sqrt() * (posterior.draw(uniform, normal) - posterior.mean)


@dataclass
class Query:
    """The arguments of one call of :meth:`Sampler.draw`, and values computed once for all of its steps.

    Attributes:
        y: Observations (B, *y shape); `params` are their parameters, `withheld` is true where they must not be used
            (B,).
        seeds: Keys of the items (B,).
        widest: The largest variance of an entry at the first step, (B, 1).
        shown: The parameters that the network is shown, if they differ from `params`.
    """

    y: Tensor
    params: Params
    withheld: Tensor
    seeds: Tensor
    widest: Tensor | None = None
    shown: Params | None = None


def renoise_steps(steps: int) -> int:
    """How many steps renoising takes, where a draw takes `steps`."""
    return min(steps, max(RENOISE_STEPS, steps // 4))


def _mixture(tensors: dict[str, Tensor], prefix: str, corruption: Corruption, shape: tuple[int, ...]) -> Mixture:
    parts = [tensors[prefix + name] for name in Mixture.names]
    count, features = parts[1].shape
    wanted = {(count,), (count, features), (count, features, parts[2].shape[-1])}
    if not count or not all(v.is_floating_point() and v.shape in wanted for v in parts):
        raise DiffemError(OTHER_WEIGHTS)
    if math.prod(shape) != parts[1].shape[-1]:
        raise DiffemError(f"its items have shape {shape}, but its mixture has {parts[1].shape[-1]} features")
    return Mixture(*parts, basis=corruption.basis(shape))


def draw_from(sampler: Sampler, y: Tensor, params: Params, seeds: Tensor, batch: int = BATCH) -> Tensor:
    """Draws given observations in model units, (B, *shape), `batch` at a time; arguments and result are on the CPU."""
    found = []
    for rows in torch.arange(len(y)).split(batch):
        here = [v[rows].to(sampler.device) for v in (y, seeds, *params.values())]
        found.append(sampler.draw(here[0], dict(zip(params, here[2:], strict=True)), here[1]).cpu())
    return torch.cat(found)


def draw_many(
    sampler: Sampler, data: Dataset, rows: np.ndarray, n: int, seed: int, purpose: str = "user", batch: int = BATCH
) -> Tensor:
    """n draws, in antithetic pairs, for each of the observations `rows`, shape (n, len(rows), *shape)."""
    found = []
    for chunk in data.chunks(rows, batch):
        seeds = seeding.item_seeds(seed, 0, purpose, chunk)
        keys = (seeding.antithetic(seeds, j) for j in range(n))
        found.append(torch.stack([draw_from(sampler, *data.batch(chunk), key, batch) for key in keys]))
    return torch.cat(found, 1)


@torch.no_grad()
def sample_prior(sampler: Sampler, seeds: Tensor, batch: int = BATCH) -> Tensor:
    """One draw from the prior of a sampler for each of the keys, shape (len(seeds), *shape), on the CPU."""
    found = []
    for keys in seeds.split(batch):
        # Observations of the right shape. They are withheld, so their values do not matter.
        nothing = torch.zeros(len(keys), *sampler.shape)
        y, params = sampler.corruption.observe(nothing, torch.Generator().manual_seed(0))
        y, params = y.to(sampler.device), {k: v.to(sampler.device) for k, v in params.items()}
        withheld = torch.ones(len(keys), dtype=torch.bool, device=sampler.device)
        found.append(sampler.draw(y, params, keys.to(sampler.device), withheld).cpu())
    return torch.cat(found)


def prior_samples(sampler: Sampler, n: int, seed: int, batch: int = BATCH) -> Tensor:
    """The first n samples of a prior under a seed, shape (n, *shape)."""
    return sample_prior(sampler, seeding.item_seeds(seed, 0, "prior", range(n)), batch)
