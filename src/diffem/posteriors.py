r"""Posterior samplers q(x | y): what the E-step draws from, what is saved, what users call.

All take and return the units of y as stored. :class:`DiffusionPosterior` runs the reverse diffusion from
:math:`\sigma_t` to :math:`\sigma_s` in steps

.. math:: x_s = x_t - \tau (x_t - \hat x) + \sigma_s \sqrt\tau \, z \, , \qquad
    \tau = 1 - \sigma_s^2 / \sigma_t^2 \, , \qquad
    \hat x = d(x_t, \sigma_t, y) + \sqrt{w_t \, v} \, (r - m) \, .

With width :math:`w = 0` this is DDPM, the sampler of the paper, which loses variance at few steps. With :math:`w = 1` the
residual variance of the denoiser is put back: :math:`r` is a draw from the reference posterior, :math:`m` its mean, and
:math:`v(x_t, \sigma_t, y)` the share of its variance that the denoiser says it leaves unexplained
(:mod:`diffem.denoisers`; NPR-DPM, Bao et al., arXiv 2206.07309).

A network that errs is over-confident even so, and :math:`w > 1` puts back more, where there is room for error. With the
variances :math:`s_t^2` of the entries under the reference posterior,

.. math:: w_t = \min(w, 1) + \max(w - 1, 0) \, s_t^2 / \max s_T^2

for every entry: all of it for the least known one at the first step, T, and hardly any for what was observed, for what never
varies, and at low noise. The same factor everywhere would lay noise over these.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from diffem import devices, files, guidance, seeding
from diffem.corruptions import BlackBox, Corruption, LinearCorruption, Params, from_config
from diffem.denoisers import Denoiser, DenoiserConfig
from diffem.errors import DiffemError
from diffem.mixtures import Basis, Diagonal, Mixture
from diffem.networks import NetworkConfig
from diffem.observations import Observations

BATCH = 256  # items at a time, where a caller does not say


@dataclass(frozen=True)
class SamplerConfig:
    """The reverse diffusion.

    Attributes:
        steps: Number of steps.
        guidance: `none`: the network sees the observation; `mmps` or `dps`: it does not, and its mean is corrected
            (:mod:`diffem.guidance`).
        guidance_solver: Of `mmps`: `gmres` or `cg`.
        guidance_iterations: Of its solver.
        guidance_strength: zeta of `dps`.
    """

    steps: int = 16
    guidance: str = "none"
    guidance_solver: str = "gmres"
    guidance_iterations: int = 1
    guidance_strength: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance not in ("none", "mmps", "dps"):
            raise DiffemError(f"sampler.guidance: must be none, mmps or dps, got {self.guidance!r}")
        if self.guidance_solver not in ("gmres", "cg") or self.guidance_iterations < 1:
            raise DiffemError("sampler.guidance_solver: must be gmres or cg, with guidance_iterations at least 1")
        if self.steps < 1:
            raise DiffemError(f"sampler.steps: must be at least 1, got {self.steps}")

    def check(self, corruption: Corruption) -> None:
        """Refuses guidance through a corruption that has none to give."""
        if self.guidance != "none" and not isinstance(corruption, LinearCorruption):
            raise DiffemError(f"sampler.guidance: {self.guidance} needs a linear-Gaussian corruption; use none")

    @property
    def evaluations(self) -> int:
        """What one draw costs, in evaluations of the network; a derivative through it counts as two more."""
        derivatives = {"none": 0, "dps": 1, "mmps": self.guidance_iterations + 1}[self.guidance]
        return (self.steps + 1) * (1 + 2 * derivatives)


class PosteriorSampler:
    """Draws x given y.

    Arguments:
        corruption: The corruption, in the units of y.
        shape: The shape of a clean item.
        scaling: (centre, half): models see (x - centre) / half.
    """

    kind = ""

    def __init__(self, corruption: Corruption, shape: tuple[int, ...], scaling: tuple[float, float]) -> None:
        self.corruption, self.shape, self.scaling = corruption, tuple(shape), scaling
        self.model_corruption = corruption.scaled(*scaling)

    @torch.no_grad()
    def sample(self, y: Tensor, params: Params, seeds: Tensor) -> Tensor:
        """One draw per observation.

        Arguments:
            y: Observations, shape (B, *y shape).
            params: Their operator parameters.
            seeds: One key per item (:func:`diffem.seeding.item_seeds`), shape (B,).

        Returns:
            Draws of shape (B, *shape), in the units of y.
        """
        centre, half = self.scaling
        origin, y, params, seeds = y.device, *self._here(y, params, seeds)
        y = self.model_corruption.scale_y(y, params, centre, half)
        x = self._sample(y, params, seeds, torch.zeros(len(y), dtype=torch.bool, device=y.device))
        return (x * half + centre).to(origin)

    @torch.no_grad()
    def sample_prior(self, seeds: Tensor) -> Tensor:
        """One draw from the prior per seed, shape (B, *shape)."""
        centre, half = self.scaling
        # An observation of zeros with the right shape; it is withheld, so that its values do not matter.
        generator = torch.Generator().manual_seed(0)
        y, params = self.model_corruption.observe(torch.zeros(len(seeds), *self.shape), generator)
        origin, y, params, seeds = seeds.device, *self._here(y, params, seeds)
        x = self._sample(y, params, seeds, torch.ones(len(seeds), dtype=torch.bool, device=y.device))
        return (x * half + centre).to(origin)

    @property
    def device(self) -> torch.device:
        """Where it computes; what it is given may lie elsewhere, and draws are returned to there."""
        return torch.device("cpu")

    def _here(self, y: Tensor, params: Params, seeds: Tensor) -> tuple[Tensor, Params, Tensor]:
        return y.to(self.device), {k: v.to(self.device) for k, v in params.items()}, seeds.to(self.device)

    def _sample(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor) -> Tensor:
        raise NotImplementedError

    def _state(self) -> tuple[dict, dict[str, Tensor]]:
        return {}, {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and a model card; each file is replaced atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        extra, tensors = self._state()
        config = {
            "kind": self.kind,
            "corruption": self.corruption.config,
            "shape": list(self.shape),
            "scaling": list(self.scaling),
            **extra,
        }
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()} or {"empty": torch.zeros(1)}
        files.replace(folder / "model.safetensors", serialise(tensors))
        files.replace(folder / "config.json", json.dumps(config, indent=2).encode())
        files.replace(folder / "README.md", _CARD.format(**config).encode())


_CARD = """# diffem model: {kind}

Trained by diffem on observations corrupted by `{corruption}`; items of shape {shape}, no clean data.

    from diffem import from_pretrained
    draws = from_pretrained("THIS FOLDER").sample(y, params, seeds)
"""


class ObservationPosterior(PosteriorSampler):
    """The observation itself (what was not observed is the middle of the range)."""

    kind = "observation"

    def _sample(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor) -> Tensor:
        if tuple(y.shape[1:]) != self.shape:
            raise DiffemError(
                f"start.kind: observation: y of shape {tuple(y.shape[1:])} cannot stand for items of shape {self.shape}"
            )
        return y


class MixturePosterior(PosteriorSampler):
    """The exact posterior under a mixture of Gaussians in model units."""

    kind = "mixture"

    def __init__(self, corruption: LinearCorruption, shape, scaling, mixture: Mixture) -> None:
        super().__init__(corruption, shape, scaling)
        self.mixture = mixture

    @property
    def device(self) -> torch.device:
        return self.mixture.mean.device

    def _sample(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor) -> Tensor:
        assert isinstance(self.model_corruption, LinearCorruption)
        posterior = self.mixture.posterior(self.model_corruption.likelihood(y, params).withheld(withheld))
        width = self.mixture.rank + self.mixture.features
        draw = posterior.draw(seeding.uniform(seeds), seeding.normal(seeds, (width,), stream=1))
        return draw.view(-1, *self.shape).float()

    def _state(self) -> tuple[dict, dict[str, Tensor]]:
        return {}, self.mixture.tensors


class DiffusionPosterior(PosteriorSampler):
    """Reverse diffusion with a denoiser; see the module.

    Arguments:
        denoiser: In model units.
        width: w: up to 1 the share of the residual variance that is put back; beyond, see the module.
    """

    kind = "diffusion"

    def __init__(
        self,
        corruption: Corruption,
        shape: tuple[int, ...],
        scaling: tuple[float, float],
        denoiser: Denoiser,
        sampler: SamplerConfig,
        network: NetworkConfig,
        width: float = 1.0,
    ) -> None:
        super().__init__(corruption, shape, scaling)
        sampler.check(corruption)
        self.denoiser, self.sampler, self.network, self.width = denoiser, sampler, network, width

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.network.parameters()).device

    @property
    def sigmas(self) -> Tensor:
        """The sampler's noise levels, largest first, shape (steps + 1,)."""
        return self.denoiser.schedule.sigma(torch.linspace(1, 0, self.sampler.steps + 1))

    def _sample(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor) -> Tensor:
        sigmas, reference = self.sigmas.to(y), self.denoiser.reference
        x = sigmas[0] * seeding.normal(seeds, self.shape)
        guided = self.sampler.guidance != "none" and not bool(withheld.all())
        told, widest = self._told(y, params, seeds, withheld), None
        for k, sigma in enumerate(sigmas):
            after = sigmas[k + 1] if k + 1 < len(sigmas) else torch.zeros_like(sigma)
            tau = 1 - (after / sigma).square()
            if guided:
                clean = self._guided(x, sigma, tau, y, params, told)
            else:
                posterior, f, v = self.denoiser.predict(x, sigma.expand(len(x)), y, told, withheld)
                clean = posterior.mean + posterior.scale(f)
                if self.width > 0:
                    uniform = seeding.uniform(seeds, stream=3 * k + 1)
                    normal = seeding.normal(seeds, (reference.rank + reference.features,), stream=3 * k + 2)
                    factor: Tensor | float = min(self.width, 1.0)
                    if self.width > 1:
                        widest = posterior.variance.amax(1, keepdim=True) if widest is None else widest
                        factor = 1 + (self.width - 1) * posterior.variance / widest
                    clean = clean + (v * factor).sqrt() * (posterior.draw(uniform, normal) - posterior.mean)
            clean = clean.view(x.shape).to(x)
            x = x - tau * (x - clean) + after * tau.sqrt() * seeding.normal(seeds, self.shape, stream=3 * k + 3)
        return x

    def _told(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor) -> Params:
        """The operator parameters that the network is shown."""
        return params

    def _guided(self, x: Tensor, sigma: Tensor, tau: Tensor, y: Tensor, params: Params, told: Params) -> Tensor:
        corruption, config = self.model_corruption, self.sampler
        assert isinstance(corruption, LinearCorruption)
        withheld = torch.ones(len(x), dtype=torch.bool, device=x.device)

        def mean(x_t: Tensor) -> Tensor:
            return self.denoiser(x_t, sigma.expand(len(x_t)), y, told, withheld)

        if config.guidance == "dps":
            return guidance.dps(mean, x, y, params, corruption, config.guidance_strength, tau)
        return guidance.mmps(mean, x, sigma, y, params, corruption, config.guidance_solver, config.guidance_iterations)

    def _state(self) -> tuple[dict, dict[str, Tensor]]:
        config = {
            "denoiser": asdict(self.denoiser.config),
            "network": asdict(self.network),
            "sampler": asdict(self.sampler),
            "width": self.width,
        }
        tensors = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        if self.denoiser.precondition == "start":
            tensors |= {f"start.{k}": v for k, v in self.denoiser.reference.tensors.items()}
        return config, tensors


def from_pretrained(
    folder: str | Path, corruption: Corruption | None = None, device: str = "cpu", precision: str = "float32"
) -> PosteriorSampler:
    """Loads what :meth:`PosteriorSampler.save_pretrained` wrote; nothing is unpickled.

    Arguments:
        folder: The folder.
        corruption: Used instead of the saved one; a black box whose function is needed again must be given.
        device: Where it computes; see :func:`diffem.devices.choose`.
        precision: How precisely its network does; likewise.

    Raises:
        DiffemError: If the folder does not hold a whole model.
    """
    folder = Path(folder)
    where, dtype = devices.choose(device, precision)
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors", str(where))
    except FileNotFoundError as error:
        raise DiffemError(f"{error.filename or folder}: missing; {folder} is not a saved model") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DiffemError(f"{folder}: is not a complete saved model: {str(error).splitlines()[0]}") from None
    stored = config["corruption"]
    untold = stored["name"] == "BlackBox"
    saved = _Untold(stored.get("function")) if untold else from_config(stored, str(folder))
    corruption = corruption or saved
    shape, scaling = tuple(config["shape"]), tuple(config["scaling"])
    if config["kind"] == "observation":
        return ObservationPosterior(corruption, shape, scaling)

    def mixture(prefix: str) -> Mixture:
        basis = likelihood_basis(corruption, shape)
        if basis != likelihood_basis(saved, shape):
            raise DiffemError(f"{folder}: its mixture is written for {stored}, not for {corruption.config}")
        return Mixture(*(tensors[prefix + n] for n in Mixture.names), basis=basis)

    if config["kind"] == "mixture":
        assert isinstance(corruption, LinearCorruption)
        return MixturePosterior(corruption, shape, scaling, mixture(""))
    start = mixture("start.") if "start.mean" in tensors else None
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["network"].items()}
    network = NetworkConfig(**fields)
    denoiser_class, sampler_class = Denoiser, DiffusionPosterior
    if config["kind"] == "ambient":
        from diffem.ambient import AmbientDenoiser as denoiser_class
        from diffem.ambient import AmbientPosterior as sampler_class
    other = DiffemError(f"{folder}: was saved by another version of diffem; train it again")
    try:
        denoiser_config, sampler = DenoiserConfig(**config["denoiser"]), SamplerConfig(**config["sampler"])
        width = float(config["width"])
    except (KeyError, TypeError, DiffemError):
        raise other from None
    denoiser = denoiser_class(corruption.scaled(*scaling), shape, denoiser_config, network, start)
    weights = {k[8:]: v for k, v in tensors.items() if k.startswith("network.")}
    if weights.keys() != denoiser.network.state_dict().keys():
        raise other
    try:
        denoiser.network.load_state_dict(weights)
    except RuntimeError:
        raise DiffemError(
            f"{folder}: its network was shown other observations than {corruption.config} makes"
        ) from None
    denoiser.precision = dtype
    denoiser.to(where).eval().requires_grad_(False)
    return sampler_class(corruption, shape, scaling, denoiser, sampler, network, width)


def draw_many(
    sampler: PosteriorSampler, observations: Observations, rows: np.ndarray, draws: int, seed: int, phase: str = "user"
) -> Tensor:
    """M draws for each of the observations `rows`, shape (len(rows), M, *shape), in the units of y."""
    out = []
    for chunk in observations.chunks(rows, BATCH):
        y, params = observations.batch(chunk)
        seeds = (seeding.item_seeds(seed, j, phase, chunk) for j in range(draws))
        out.append(torch.stack([sampler.sample(y, params, s) for s in seeds], 1))
    return torch.cat(out)


def sample_many(prior: PosteriorSampler, n: int, seed: int) -> Tensor:
    """The first n samples of a prior, shape (n, *shape), in the units of y."""
    chunks = torch.arange(n).split(BATCH)
    return torch.cat([prior.sample_prior(seeding.item_seeds(seed, 0, "prior", chunk)) for chunk in chunks])


class _Untold(BlackBox):
    """A black box whose function is not needed: models only ask it how y is scaled."""

    def __init__(self, path: str | None) -> None:
        super().__init__(lambda x: x, path)


def likelihood_basis(corruption: Corruption, shape: tuple[int, ...]) -> Basis | None:
    """The basis in which mixtures for this corruption are written."""
    if not isinstance(corruption, LinearCorruption) or corruption.config["name"] == "RandomProjection":
        return None
    likelihood = corruption.likelihood(torch.zeros(1, *shape), {})
    return likelihood.basis if isinstance(likelihood, Diagonal) else None


__all__ = ["DiffusionPosterior", "MixturePosterior", "ObservationPosterior", "PosteriorSampler", "from_pretrained"]
