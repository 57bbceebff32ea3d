"""The trained model that users call: draws of clean items given observations, in the units of y."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffem import __version__, devices, files, memory, reading, samplers, seeding, sharing, tensors
from diffem.corruptions import REGISTRY, BlackBox, Corruption, Params, from_config
from diffem.data import Dataset, Layout, Observations
from diffem.denoiser import Denoiser
from diffem.errors import DiffemError, suggest, unreadable
from diffem.networks import Given, Network
from diffem.samplers import Sampler
from diffem.tiles import tiled
from diffem.units import Units


class Posterior(nn.Module):
    """Draws x given y, in the units of y.

    Arguments:
        sampler: Draws in model units.
        corruption: The corruption, in the units of y.
        units: The conversion between the units of y and model units.
        trained_on: A checksum of the training observations, and the seed that decided which ones were held out.
        layout: The axes of observations, see :mod:`diffem.data.layout`; by default the layout of the model.
        item_layout: The axes of items, in the same way.
        scores: Its scores on test observations, if they are known, under the names of metrics.jsonl.
    """

    def __init__(
        self,
        sampler: Sampler,
        corruption: Corruption,
        units: Units,
        trained_on: dict | None = None,
        layout: Layout | None = None,
        item_layout: Layout | None = None,
        scores: dict | None = None,
    ) -> None:
        super().__init__()
        self.sampler, self.corruption, self.units, self.trained_on = sampler, corruption, units, trained_on
        self.layout, self.item_layout = layout, item_layout or Layout.usual(len(sampler.shape) + 1)
        self.scores = scores

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an item."""
        return self.sampler.shape

    @torch.no_grad()
    def sample(
        self,
        y: Tensor | np.ndarray,
        params: dict[str, Tensor] | dict[str, np.ndarray] | None = None,
        n: int = 1,
        generator: torch.Generator | None = None,
        seeds: Tensor | None = None,
        batch: int | None = None,
    ) -> Tensor | np.ndarray:
        """n draws for each observation, in pairs of opposite random numbers (diffem.seeding).

        Arguments:
            y: Observations, shape (B, ...), with the axes of the training observations; values where a mask is false do
                not matter. Images larger than the training images are drawn in tiles, see :mod:`diffem.tiles`.
            params: Their parameters by name, e.g. {"mask": mask}; a mask is true where y was observed.
            n: Draws for each observation.
            generator: Draws the keys of the items; by default torch's global generator.
            seeds: One key per item instead, (B,): equal keys give equal draws, in a batch of any size.
            batch: Observations at a time; by default as many as fit in memory, see :mod:`diffem.memory`.

        Returns:
            Shape (n, B, ...), in the units and the layout of y: a tensor, or an array if y is one.

        Raises:
            DiffemError: If y or the parameters do not fit the corruption.
        """
        if n < 1:
            raise DiffemError(f"n: must be at least 1, got {n}")
        if not isinstance(params, Mapping | None):
            raise DiffemError(f'params: must be named arrays, e.g. {{"mask": mask}}, got {type(params).__name__}')
        arrays = isinstance(y, np.ndarray)
        y, given = self.converted(torch.as_tensor(y), {k: torch.as_tensor(v) for k, v in (params or {}).items()})
        sampler, size = self._drawing(_observed_shape(self.corruption, self.shape, y, given), batch, "y: is of")
        if "mask" in given:
            y = torch.where(given["mask"], y, 0.0)
        if not y.isfinite().all():
            raise DiffemError(
                "y: holds what is not finite where it counts as observed; a mask is true where y was observed"
            )
        if seeds is None:
            base = torch.randint(2**62, (), generator=generator)
            seeds = seeding.item_seeds(int(base), 0, "user", range(len(y)))
        seeds = torch.as_tensor(seeds)
        if len(seeds) != len(y):
            raise DiffemError(f"seeds: {len(seeds)} of them, where y has {len(y)} rows")
        found = []
        for rows in torch.arange(len(y)).split(size):
            of_part = {k: v[rows].to(self.device) for k, v in given.items()}
            keys = seeds.cpu()[rows].to(self.device)
            found.append(self.drawn(sampler, y[rows].to(self.device), of_part, keys, n))
        x = torch.cat(found, 1).to(y.device)
        return x.numpy() if arrays else x

    def converted(self, y: Tensor, params: Params) -> tuple[Tensor, Params]:
        """Observations and their parameters in the layout and the dtypes of models."""
        if self.layout is not None:
            y, params = self.layout.observed(y, params)
        y = y.float()
        return y, {k: (v.bool() if k == "mask" else v.float()).to(y.device) for k, v in params.items()}

    def drawn(self, sampler: Sampler, y: Tensor, params: Params, seeds: Tensor, n: int = 1) -> Tensor:
        """n draws for each of some :meth:`converted` observations, shape (n, B, ...), in the units and axes of y."""
        y, params = self.corruption.scale_y(y, params, self.units), self.corruption.scale_params(params, self.units)
        return self._restored(torch.stack([sampler.draw(y, params, seeding.antithetic(seeds, j)) for j in range(n)]))

    def _drawing(self, shape: tuple[int, ...], batch: int | None, what: str) -> tuple[Sampler, int]:
        """The sampler for items of a shape, and the batch size that takes as much memory as `batch` items of the
        model's shape; `what` begins the error if there is no such sampler."""
        batch = batch or self.batch
        if shape == self.shape:
            return self.sampler, batch
        try:
            return tiled(self.sampler, shape, batch), max(1, batch * math.prod(self.shape) // math.prod(shape))
        except DiffemError as error:
            raise DiffemError(f"{what} {error}") from None

    def sample_prior(self, n: int, generator: torch.Generator | None = None, batch: int | None = None) -> Tensor:
        """n new items, without an observation, shape (n, ...), in the units and the layout of y.

        Arguments:
            n: How many items.
            generator: Draws their keys; by default torch's global generator.
            batch: Items at a time.
        """
        if n < 1:
            raise DiffemError(f"n: must be at least 1, got {n}")
        base = torch.randint(2**62, (), generator=generator)
        seeds = seeding.item_seeds(int(base), 0, "prior", range(n))
        return self._restored(samplers.sample_prior(self.sampler, seeds, batch or self.batch))

    def reconstruct(
        self, observations: Observations, rows: np.ndarray, n: int = 1, seed: int = 0, batch: int | None = None
    ) -> Tensor:
        """n draws for each of the observations `rows`, shape (n, len(rows), ...), in the units and the layout of y.

        They depend on the seed and on the row, not on the batch. Images larger than the training images are drawn in
        tiles.

        Raises:
            DiffemError: If the observations have another corruption than the training observations.
        """
        self.refuse_others(observations)
        data = Dataset(observations, self.units)
        sampler, size = self._drawing(observations.shape, batch, f"{observations.source}:")
        return self._restored(samplers.draw_many(sampler, data, rows, n, seed, batch=size))

    def generate(self, n: int, seed: int = 0, batch: int | None = None) -> Tensor:
        """The first n samples of the prior under a seed, shape (n, ...), in the units and the layout of y."""
        return self._restored(samplers.prior_samples(self.sampler, n, seed, batch or self.batch))

    def refuse_others(self, observations: Observations) -> None:
        """Raises a DiffemError if observations have another shape, corruption or layout than the training observations."""
        where, ours, theirs = observations.source, self.corruption.law, observations.corruption.law
        self._drawing(observations.shape, 1, f"{where}:")
        if ours["name"] != theirs["name"]:
            raise DiffemError(f"{where}: are of {theirs['name']}, but the model was trained for {ours['name']}")
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                said = "noise.npy" if name == "noise" else "none"
                raise DiffemError(
                    f"{where}: {name} {theirs.get(name, said)} of {theirs['name']}, but the model was trained for {ours.get(name, said)}; train on these, or use observations of that kind"
                )
        if self.layout is not None and self.layout.config != observations.layout.config:
            raise DiffemError(
                f"{where}: axes {observations.layout.axes}, but the model was trained on {self.layout.axes}"
            )

    def _restored(self, x: Tensor) -> Tensor:
        return self.item_layout.to_user(self.units.restore(x))

    @cached_property
    def batch(self) -> int:
        """The default number of items that are drawn at a time."""
        return memory.batch(self.sampler.footprint(), self.device)

    @property
    def device(self) -> torch.device:
        """The device on which it computes; draws are returned on the device of y."""
        return self.sampler.device

    def save_pretrained(self, folder: str | Path, scores: dict | None = None) -> None:
        """Writes config.json, model.safetensors and a model card; each file is replaced atomically.

        Arguments:
            folder: The folder; it is made if it does not exist.
            scores: Scores on test observations for the card: a row of metrics.jsonl; by default the known ones.
        """
        _save(self, Path(folder), sharing.chosen(scores) or self.scores)

    def push_to_hub(self, name: str, token: str | None = None, private: bool = False) -> str:
        """Uploads what :meth:`save_pretrained` writes to the Hugging Face Hub, and returns the address.

        Arguments:
            name: OWNER/NAME of the model there; it is made if it does not exist.
            token: A token that may write; by default that of `hf auth login`, or of HF_TOKEN.
            private: Whether a new one is private.
        """
        return sharing.push(self, name, token, private)

    def export(self, file: str | Path, y: Any = None, params: Any = None) -> int | None:
        """Writes a program of torch.export that draws without diffem; the module `diffem.program` says how it is used.

        Arguments:
            file: The file, NAME.pt2.
            y: A few observations as an example of the shapes, as for :meth:`sample`; by default simulated ones.
            params: Their parameters.

        Returns:
            The number of observations that the program takes at a time; None, as a rule: any number.

        Raises:
            DiffemError: If it cannot be traced.
        """
        from diffem import program  # torch.export takes a second to import

        return program.export(self, file, y, params)


def _observed_shape(
    corruption: Corruption, shape: tuple[int, ...], y: Tensor, params: dict[str, Tensor]
) -> tuple[int, ...]:
    """The shape of the items that were observed; `shape` is that of the model's items."""
    for name, value in params.items():
        known = corruption.parameters
        if known is not None and name not in known:
            raise DiffemError(f"params: {name}: is no parameter of {corruption.config['name']};{suggest(name, known)}")
        if value.shape[:1] != y.shape[:1]:
            raise DiffemError(f"{name}: has {len(value) if value.ndim else 0} rows where y has {len(y)}")
    shape = tuple(y.shape[1:]) if corruption.diagonal else shape
    return corruption.check(y.cpu().numpy(), {k: v.cpu().numpy() for k, v in params.items()}, shape)


def _save(posterior: Posterior, folder: Path, scores: dict | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sampler, layout = posterior.sampler, posterior.layout
    config = {
        "version": __version__,
        "kind": sampler.kind,
        "corruption": posterior.corruption.config,
        "shape": list(posterior.shape),
        "scaling": posterior.units.config,
        "trained_on": posterior.trained_on,
        "layout": None if layout is None else layout.config,
        "item_layout": posterior.item_layout.config,
        **({} if scores is None else {"scores": scores}),
        **sampler.config,
    }
    weights = dict(sampler.state_dict())
    if (measured := sampler.corruption.file_parameters) is not None:
        # of one observation: without them it could be neither built again nor sampled without an observation
        example = measured(1, torch.Generator().manual_seed(0))
        weights |= {f"{EXAMPLE}{name}": value for name, value in example.items()}
    tensors.save(folder / "model.safetensors", weights or {"empty": torch.zeros(1)})
    files.replace(folder / "config.json", json.dumps(config, indent=2).encode())
    files.replace(folder / "README.md", sharing.card(config).encode())


DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)  # of saved tensors
EXAMPLE = "example."  # prefix of tensors


def from_pretrained(
    folder: str | Path,
    corruption: Corruption | None = None,
    network: Network | None = None,
    device: str = "cpu",
    precision: str = "float32",
) -> Posterior:
    """Loads what :meth:`Posterior.save_pretrained` wrote; nothing is unpickled.

    Arguments:
        folder: The folder, or OWNER/NAME of a model on the Hugging Face Hub, if there is no such folder here.
        corruption: Used instead of the saved one; needed if that is not one of diffem's.
        network: The function that made the network, if it is not one of diffem's; see :class:`diffem.networks.Given`.
        device: Where it computes; see :func:`diffem.devices.choose`.
        precision: The arithmetic of its network; see :func:`diffem.devices.choose`.

    Raises:
        DiffemError: If the folder does not hold a complete model.
    """
    where, dtype = devices.choose(device, precision)
    if isinstance(folder, str) and sharing.elsewhere(folder):
        folder = sharing.pull(folder)
    folder = Path(folder)
    try:
        config = json.loads(reading.read(folder / "config.json"))
        weights, _ = tensors.load(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise DiffemError(f"{error.filename or folder}: missing; {folder} is not a saved model") from None
    except (ValueError, RecursionError) as error:
        raise DiffemError(f"{folder}: is not a complete saved model: {str(error).splitlines()[0]}") from None
    strange = f"{folder}: {unreadable(config.get('version') if isinstance(config, dict) else __version__)}"
    if wrong := next((k for k, v in weights.items() if v.dtype not in DTYPES), None):
        raise DiffemError(f"{folder / 'model.safetensors'}: {wrong}: holds {weights[wrong].dtype}, which no model has")
    if wrong := next((k for k, v in weights.items() if not v.isfinite().all()), None):
        raise DiffemError(f"{folder / 'model.safetensors'}: {wrong}: holds values that are not finite; train it again")
    try:
        units, shape = Units(*config["scaling"]), tuple(config["shape"])
        with np.errstate(over="ignore"):
            centre, half = (v.astype(np.float32) for v in (units.centre, units.half))
        fit = np.broadcast_shapes(centre.shape, half.shape, shape) == shape
        if not (fit and np.isfinite(centre).all() and np.isfinite(half).all() and (half > 0).all()):
            raise ValueError(f"scaling is {config['scaling']}")
        if (trained_on := config.get("trained_on")) is not None:
            trained_on = {"observations": str(trained_on["observations"]), "seed": int(trained_on["seed"])}
        layout, items = (None if config.get(k) is None else Layout(*config[k]) for k in ("layout", "item_layout"))
        scores = sharing.checked(config.get("scores"))
        corruption = _corruption(config["corruption"], corruption, shape)
        kind = samplers.kind_of(config["kind"], "config.json: kind")
        with seeding.global_generators("cpu", 0):  # initial weights are drawn, then overwritten
            own = None if network is None else Given(network)
            example = {k[len(EXAMPLE) :]: weights.pop(k) for k in [*weights] if k.startswith(EXAMPLE)}
            scaled = corruption.scaled(units)
            scaled = scaled.with_file_parameters(partial(_repeated, example)) if example else scaled
            sampler = kind.rebuild(config, weights, scaled, shape, own)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DiffemError(f"{strange}; train it again ({what})") from error
    except DiffemError as error:
        raise DiffemError(f"{folder}: {error}") from None
    weights.pop("empty", None)
    like = lambda found: {k: (v.shape, v.dtype) for k, v in found.items()}  # noqa: E731
    if like(weights) != like(sampler.state_dict()):
        raise DiffemError(f"{strange}; train it again")
    sampler.load_state_dict(weights)
    for module in sampler.modules():
        if isinstance(module, Denoiser):
            module.precision = dtype
    sampler.to(where).eval().requires_grad_(False)
    return Posterior(sampler, corruption, units, trained_on, layout, items, scores)


def _repeated(example: Params, n: int, generator: torch.Generator) -> Params:
    """The parameters of one observation, n times."""
    return {k: v.expand(n, *v.shape[1:]).to(generator.device) for k, v in example.items()}


def _corruption(saved: dict, given: Corruption | None, shape: tuple[int, ...]) -> Corruption:
    """The corruption of a saved model: the one that the caller gave, or else the registered one that the model
    names."""
    if given is None and saved["name"] == "BlackBox":
        return BlackBox(lambda x, params: x, saved.get("function"))  # draws only use its scaling of y
    if given is None and saved["name"] not in REGISTRY:
        raise DiffemError(f"its corruption {saved['name']} is not one of diffem's; give it with corruption=")
    if given is None:
        return from_config(saved, "config.json: corruption")
    # `saved` lacks arguments that do not fit in a file, such as arrays: the caller's corruption has them
    other = saved != given.config and saved["name"] in REGISTRY
    if other and from_config(saved).basis(shape) != given.basis(shape):
        raise DiffemError(f"its mixture is written for {saved}, not for {given.config}")
    return given
