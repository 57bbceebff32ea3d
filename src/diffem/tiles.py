r"""Draws items larger than those a sampler was trained on, e.g. whole images after training on patches.

In the reverse diffusion of :mod:`diffem.samplers` the whole item is one noisy array :math:`x_t` with one noise. Only
the estimate of a step is made tile by tile. On each tile :math:`k` of a grid with half overlap, the sampler gives the
mean :math:`\mu_k` and a zero-mean draw :math:`\rho_k` with the remaining variance. They are blended with smooth windows
:math:`w_k`, which sum to one at every entry:

.. math:: \hat x = \sum_k w_k \, \mu_k + \sum_k \sqrt{w_k} \, \rho_k \, .

The :math:`\rho_k` are independent of each other, so that the square roots preserve the variance. At the next step all
tiles see the same :math:`x_s`, so that they agree where they overlap.

This is an approximation: a tile does not see entries outside of it, and the :math:`\rho_k` are correlated within a tile
only. Both matter little if entries half a tile apart are nearly independent.

Noise is keyed by item and place, the draws of a tile by item and tile, so that results do not depend on the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffem import seeding
from diffem.data.patches import Grid, Place
from diffem.denoiser import Denoiser, DenoiserConfig
from diffem.errors import DiffemError
from diffem.networks import Given
from diffem.samplers import DiffusionSampler, MixtureSampler, Query, Sampler, SamplerConfig

KEYS = 2**32  # keys of tiles begin here; smaller keys belong to the draws of an item


class Tiled(DiffusionSampler):
    """Reverse diffusion of large items; see the module docstring.

    Arguments:
        tile: The sampler for items of the size of a tile.
        shape: The shape of a large item, (channels, *spatial): as many channels, and no axis shorter than a tile's.
        batch: The number of tiles at a time.
    """

    kind = "tiled"

    def __init__(self, tile: DiffusionSampler, shape: tuple[int, ...], batch: int) -> None:
        super().__init__(tile.denoiser, tile.settings)
        self.tile, self.shape, self.width, self.batch = tile, tuple(shape), tile.width, batch
        size = tile.shape[1:]
        self.grid = Grid(self.shape[1:], size, [max(n // 2, 1) for n in size])
        self.windows = [_windows(*axis) for axis in zip(self.grid.starts, size, self.shape[1:], strict=True)]

    def estimate(self, x: Tensor, sigma: Tensor, tau: Tensor, query: Query, stream: int) -> Tensor:
        mean, rest = torch.zeros_like(x), torch.zeros_like(x)
        tiles = [(b, k) for b in range(len(x)) for k in range(len(self.grid.places))]
        for start in range(0, len(tiles), self.batch):
            some = tiles[start : start + self.batch]

            def cut(of: Tensor, some: list[tuple[int, int]] = some) -> Tensor:
                return torch.stack([self.grid.part(of[b], self.grid.places[k]) for b, k in some])

            keys = torch.cat([seeding.again(query.seeds[b : b + 1], KEYS + k) for b, k in some])
            withheld = query.withheld[[b for b, _ in some]]
            part = Query(cut(query.y), {name: cut(v) for name, v in query.params.items()}, withheld, keys)
            means, rests = (v.view(-1, *self.tile.shape).to(x) for v in self.tile.parts(cut(x), sigma, part, stream))
            for i, (b, k) in enumerate(some):
                place, window = (b, slice(None), *self.grid.places[k]), self._window(self.grid.places[k]).to(x)
                mean[place] += window * means[i]
                rest[place] += window.sqrt() * rests[i]
        return mean + rest

    def _window(self, place: Place) -> Tensor:
        window = torch.ones((), dtype=torch.float64)
        for axis, at in zip(self.windows, place, strict=True):
            window = window[..., None] * axis[at.start]
        return window


def tiled(sampler: Sampler, shape: tuple[int, ...], batch: int) -> Tiled:
    """A sampler of larger items, from a sampler of tiles; arguments as for :class:`Tiled`.

    Raises:
        DiffemError: If the sampler cannot draw items of that shape; the message says why.
    """
    ours = sampler.shape
    larger = len(shape) == len(ours) > 1 and shape[0] == ours[0] and all(map(int.__ge__, shape, ours))
    if not larger:
        raise DiffemError(f"items of shape {shape}, where the model's have {ours}")
    if not sampler.corruption.by_entry:
        raise DiffemError(
            f"items of shape {shape}, where the model's have {ours}; larger ones can be drawn only where an entry of y is made of one of x"
        )
    if isinstance(sampler, MixtureSampler):
        sampler = untrained(sampler)
    if not isinstance(sampler, DiffusionSampler) or type(sampler).estimate is not DiffusionSampler.estimate:
        raise DiffemError(f"items of shape {shape}, where the model's have {ours}; {sampler.kind} draws no larger ones")
    return Tiled(sampler, shape, batch)


def untrained(sampler: MixtureSampler) -> DiffusionSampler:
    """Reverse diffusion in which every step uses the exact posterior of a mixture."""
    nothing = Given(lambda channels, shape: _Nothing(shape))
    denoiser = Denoiser(sampler.corruption, sampler.shape, DenoiserConfig(), nothing, sampler.mixture.copied("cpu"))
    return DiffusionSampler(denoiser.to(sampler.device), SamplerConfig())


class _Nothing(nn.Module):
    """A network that makes no correction."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2 * self.shape[0], *self.shape[1:])


def _windows(starts: list[int], patch: int, size: int) -> dict[int, Tensor]:
    """The windows (patch,) of the places along one axis, {start: window}; at every entry they sum to one."""
    hill = torch.sin(math.pi * (torch.arange(patch, dtype=torch.float64) + 0.5) / patch).square()
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + patch] += hill
    return {start: hill / total[start : start + patch] for start in starts}
