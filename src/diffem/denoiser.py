r"""The denoiser: a reference posterior, corrected by a network.

With the noisy item :math:`x_t = x + \sigma_t z`, its observation :math:`y` and a *reference prior*
:math:`r(x)`, let :math:`m` be the mean of the reference posterior :math:`r(x \mid x_t, y)` and
:math:`S` a square root of its covariance. The denoiser is

.. math:: d(x_t, \sigma_t, y) = m + S \, f(x_t, \log \sigma_t, y, m, \ldots) \, ,

so that the network predicts a quantity of about unit variance, whatever the noise level and whatever
was observed. There are two references (`denoiser.precondition`):

* `plain`: N(0, I), and y is not used. Then :math:`m = x_t / (\sigma^2 + 1)`, :math:`S = \sigma /
  \sqrt{\sigma^2 + 1}`: the preconditioning of EDM with unit data variance.
* `start`: the mixture fitted to the observations. The untrained denoiser is then the posterior mean under the
  initial prior (exact, unless the corruption's likelihood is an approximation), and training only has to learn what a
  mixture cannot represent.

The denoiser is trained on reconstructions :math:`x` and their observations :math:`y'`, simulated or real (a part
of a real one is then hidden). The loss of an item is

.. math:: \frac{1}{\mathrm{tr} \, S S^T} \left\| W^{1/2} \left( x - d(x_t, \sigma_t, y') \right) \right\|^2
    \, , \qquad W = \lambda I + (1 - \lambda) P \, ,

where P x is the part of x that the real observation measured (:meth:`Corruption.measured`), and :math:`\lambda` is
`m_step.imputed_weight`. With :math:`\lambda = 1` and the plain reference, this is the loss of the DiffEM paper,
weighted by :math:`1 / \sigma^2 + 1`.

When y is withheld, the same network is the prior's denoiser.

A second head of the network predicts the squared error of the first, entry by entry, as the remaining share :math:`v`
of the reference posterior's variance,

.. math:: v(x_t, \sigma_t, y) \quad \text{trained by} \quad
    E \left[ \frac{e^T W e}{v} + w \log v \right] \, , \qquad e = S^{-1} (x - d) \, ,

where w is the diagonal of W. This loss is smallest at :math:`v = E[e^T W e \mid x_t, y] / w`. Samplers put this
variance back (:mod:`diffem.samplers`). Where :math:`S` is not diagonal (a blur, a projection), an item has one share,
the mean over its entries: scaling entries separately would leak variance from uncertain into observed directions.

References:
    | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
    | Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models (Bao et al., 2022)
    | DiffEM (Hosseintabar et al., 2025), arXiv 2510.12691
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from azula.noise import VESchedule
from torch import Tensor, nn

from diffem.corruptions import Corruption, Params
from diffem.devices import Compiled
from diffem.errors import DiffemError
from diffem.mixtures import Diagonal, ExactPosterior, Mixture
from diffem.networks import Given, NetworkConfig

OTHER_WEIGHTS = "its weights are not those of its network and its observations"
TIME_ALPHA = 3.0
HIGHEST = 1e6  # noise level: beyond it, single precision loses the data
LEAST = 0.001  # the lower bound of v, so that one outlier cannot dominate an update


def share(h: Tensor) -> Tensor:
    """exp(h) for h < 0, and 1 + h beyond: an exponential could explode on inputs unlike the training data."""
    return 1 + torch.nn.functional.elu(h)


@dataclass(frozen=True)
class DenoiserConfig:
    """Preconditioning and noise schedule. Noise levels are in model units (data about [-1, 1]).

    Attributes:
        precondition: What the network corrects (preconditioning): the exact posterior mean under a simple reference
            prior. `plain`: a standard Gaussian, without y, as in the paper; `start`: the mixture of the start, given y;
            `auto`: `start` where the start is a mixture, else `plain`. Change it only to reproduce the paper.
        sigma_min: The smallest noise level. Lower it if the noise of y, in units of half the range of the data, is
            smaller.
        sigma_max: The largest noise level, at which nothing of the data is left. Leave it.
        time_beta: Distribution of the noise levels at training: they grow exponentially with a time from 0 (sigma_min)
            to 1 (sigma_max), which has the density Beta(3, time_beta). Smaller values train high noise levels more. The
            paper has 3.
        observation_dropout: Fraction of training items whose observation is withheld from the network, so that it also
            learns the prior. Needed by prior.kind joint and by samplers of other methods; otherwise it may be 0.
    """

    precondition: str = "auto"
    sigma_min: float = 1e-2
    sigma_max: float = 1e1
    time_beta: float = 1.5
    observation_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.precondition not in ("auto", "plain", "start"):
            raise DiffemError(f"denoiser.precondition: must be auto, plain or start, got {self.precondition!r}")
        if not 0 < self.sigma_min < self.sigma_max <= HIGHEST:
            raise DiffemError(
                f"denoiser.sigma_min: must be > 0 and below denoiser.sigma_max, which is at most {HIGHEST:g}"
            )
        if not 0 < self.time_beta < math.inf:
            raise DiffemError(f"denoiser.time_beta: must be > 0, got {self.time_beta}")
        if not 0 <= self.observation_dropout <= 1:
            raise DiffemError(f"denoiser.observation_dropout: must be in [0, 1], got {self.observation_dropout}")


class Denoiser(nn.Module):
    """d(x_t, sigma, y) in model units.

    Arguments:
        corruption: The corruption in model units.
        shape: The shape of an item.
        config: See :class:`DenoiserConfig`.
        network: Builds the backbone: a :class:`diffem.networks.NetworkConfig` or :class:`diffem.networks.Given`.
        start: The mixture of the start, for `precondition: start`.
        weights: The expected shapes of the network's weights, by name; they are checked before memory is allocated.
    """

    def __init__(
        self,
        corruption: Corruption,
        shape: tuple[int, ...],
        config: DenoiserConfig,
        network: NetworkConfig | Given,
        start: Mixture | None = None,
        weights: dict[str, torch.Size] | None = None,
    ) -> None:
        super().__init__()
        self.corruption, self.shape, self.config, self.built_by = corruption, tuple(shape), config, network
        self.precision = torch.float32  # of the network's arithmetic; the reference posterior is always exact
        self.compiled: Compiled | None = None
        self.precondition = config.precondition
        if self.precondition == "auto":
            self.precondition = "plain" if start is None else "start"
        if self.precondition == "plain":
            self.reference = Mixture.standard(torch.Size(shape).numel())
        elif start is None:
            raise DiffemError("denoiser.precondition: start needs a Gaussian or mixture start (start.kind)")
        else:
            self.reference = start
        x = torch.zeros(1, *shape)
        y, params = corruption.observe(x, torch.Generator().manual_seed(0))
        self.schedule = VESchedule(config.sigma_min, config.sigma_max)
        with torch.no_grad():
            inputs = self._inputs(x, torch.ones(1), y, params, torch.zeros(1, dtype=torch.bool))[1]
        shapes = [tuple(v.shape[1:]) for v in inputs]
        if weights is not None:
            with torch.device("meta"):
                made = network.build(self.shape, shapes).state_dict()
            if {k: v.shape for k, v in made.items()} != weights:
                raise DiffemError(OTHER_WEIGHTS)
        self.network = network.build(self.shape, shapes)

    @property
    def device(self) -> torch.device:
        """The device on which it computes."""
        return self.reference.mean.device

    def with_network(self, network: nn.Module) -> Denoiser:
        """The same denoiser with another network; everything else is shared."""
        other = copy.copy(self)
        other._modules = {**self._modules, "network": network}
        if self.compiled is not None:
            other.compile_network(self.compiled.sizes)
        return other

    def compile_network(self, sizes: Collection[int]) -> None:
        """Has the network translated by torch.compile, for batches of these sizes."""
        self.compiled = Compiled(self.network, sizes)

    def posterior(self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor) -> ExactPosterior:
        """The reference posterior; arguments as in :meth:`predict`."""
        flat = x_t.flatten(1)
        if self.precondition == "plain" or not self.corruption.exact(self.shape):
            likelihood = Diagonal(flat, torch.zeros_like(flat))
        else:
            likelihood = self.corruption.likelihood(y, params).withheld(withheld)
        return self.reference.posterior(likelihood.given(flat, sigma[:, None]))

    def _inputs(
        self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor
    ) -> tuple[ExactPosterior, list[Tensor]]:
        posterior = self.posterior(x_t, sigma, y, params, withheld)
        level = sigma.view(-1, *(1,) * len(self.shape))
        given = (~withheld).to(x_t).view(-1, *(1,) * len(self.shape))
        inputs = [x_t * torch.rsqrt(1 + level.square())]
        if self.precondition != "plain":
            inputs += [posterior.mean.view(x_t.shape), posterior.spread.reshape(x_t.shape).to(x_t)]
        inputs += [v * given.view(-1, *(1,) * (v.ndim - 1)) for v in self.corruption.condition(y, params)]
        inputs += [given.expand(-1, 1, *self.shape[1:]) if len(self.shape) > 1 else given]
        return posterior, [v.to(x_t) for v in inputs]

    def predict(
        self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor | None = None
    ) -> tuple[ExactPosterior, Tensor, Tensor]:
        """The reference posterior, the network's correction f (B, d), and v (B, d), for flattened items.

        Arguments:
            x_t: Noisy items, shape (B, *shape).
            sigma: Their noise levels, shape (B,).
            y: Observations in model units, shape (B, *y shape).
            params: Operator parameters.
            withheld: True where the observation must not be used, shape (B,); nowhere by default.
        """
        if withheld is None:
            withheld = torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device)
        with torch.set_grad_enabled(x_t.requires_grad):  # guidance differentiates with respect to x_t
            posterior, inputs = self._inputs(x_t, sigma, y, params, withheld)
        with torch.autocast(x_t.device.type, self.precision, enabled=self.precision != torch.float32):
            f, h = (self.compiled or self.network)(inputs, sigma.log())
        v = LEAST + (1 - LEAST) * share(h.flatten(1).to(x_t))
        if not posterior.by_entry:
            v = v.mean(1, keepdim=True).expand_as(v)
        return posterior, f.flatten(1).to(x_t), v

    def forward(self, x_t: Tensor, sigma: Tensor, y: Tensor, params: Params, withheld: Tensor | None = None) -> Tensor:
        """E[x | x_t, y], shape (B, *shape); arguments as in :meth:`predict`."""
        posterior, f, _ = self.predict(x_t, sigma, y, params, withheld)
        return (posterior.mean + posterior.scale(f)).view(x_t.shape).to(x_t)

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        params: Params,
        generator: torch.Generator,
        dropout: float = 0.0,
        weigh: Callable[[Tensor], Tensor] | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """The denoising loss of a batch of items and their observations, in model units; a scalar.

        Its gradient also trains the variances; its value is the loss of the mean alone.

        Arguments:
            x: Items, shape (B, *shape).
            y: Their observations, shape (B, *y shape).
            params: Operator parameters.
            generator: Draws times, noise, and which observations are withheld.
            dropout: The fraction of the observations that is withheld.
            weigh: W, a symmetric linear map of (B, *shape), where B is the number of `rows`; the identity by default.
            rows: The part of the batch whose loss is returned; random numbers are drawn for the whole batch.
        """
        device = generator.device
        sigma = self.times(len(x), generator).to(x)
        noise = torch.randn(x.shape, generator=generator, device=device).to(x)
        withheld = torch.rand(len(x), generator=generator, device=device).to(x.device) < dropout
        signs = torch.randint(0, 2, x.shape, generator=generator, device=device).to(x) * 2 - 1 if weigh else None
        x, sigma, y, withheld = x[rows], sigma[rows], y[rows], withheld[rows]
        params = {k: p[rows] for k, p in params.items()}
        x_t = x + sigma.view(-1, *(1,) * (x.ndim - 1)) * noise[rows]
        posterior, f, v = self.predict(x_t, sigma, y, params, withheld)

        def product(a: Tensor, b: Tensor) -> Tensor:  # a W b, entry by entry
            return a * (b if weigh is None else weigh(b.view_as(x)).flatten(1))

        with torch.no_grad():
            target = posterior.whiten(x.flatten(1) - posterior.mean).to(x)
            left = posterior.variance.mean(1).to(x)
            if signs is None:
                weight = torch.ones_like(target)
            else:  # z W z with random signs z: the diagonal of W, or, averaged, an estimate of its trace
                weight = product(signs[rows].flatten(1), signs[rows].flatten(1))
        missed = target - f
        error = posterior.scale(missed).to(x)
        whitened = product(missed.detach(), missed.detach())
        entries = weigh is None or self.corruption.by_entry
        if not (posterior.by_entry and entries):  # else e_i (W e)_i may be negative
            whitened, weight = (a.mean(1, keepdim=True).expand_as(v) for a in (whitened, weight))
        of_variance = (whitened / v + weight * v.log()).mean()
        return (product(error, error).mean(1) / left).mean() + (of_variance - of_variance.detach())

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Noise levels to train at, shape (n,)."""
        # by inversion of the distribution function: torch's Beta takes no generator
        return self.schedule.sigma(_beta(n, TIME_ALPHA, self.config.time_beta, generator))


def _beta(n: int, alpha: float, beta: float, generator: torch.Generator) -> Tensor:
    device = torch.device("cpu") if generator.device.type == "mps" else generator.device  # mps has no float64
    grid = torch.linspace(0, 1, 4097, dtype=torch.float64, device=device)
    middle = (grid[1:] + grid[:-1]) / 2
    density = middle ** (alpha - 1) * (1 - middle) ** (beta - 1)
    cumulative = torch.cat((torch.zeros_like(grid[:1]), density.cumsum(0)))
    uniform = torch.rand(n, generator=generator, device=generator.device).to(device).double() * cumulative[-1]
    right = torch.searchsorted(cumulative, uniform, right=True).clamp(1, len(grid) - 1)
    low, high = cumulative[right - 1], cumulative[right]
    return grid[right - 1] + (uniform - low) / (high - low) * (grid[right] - grid[right - 1])
