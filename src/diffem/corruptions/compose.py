"""Linear corruptions one after the other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Corruption, Params, register_corruption
from .diagonal import Mask
from .linear import LinearCorruption


@register_corruption
class Compose(LinearCorruption):
    """y = M (A_k ... A_1 x + noise): each corruption of a chain is applied to the output of the one before it.

    Each takes its parameters from the files next to y.npy, e.g. kernel.npy. mask.npy is the mask of y, and noise is
    added to y only. In corruption.yaml:

        name: Compose
        chain:
          - {name: Blur}
          - {name: Downsample, factor: 2}
        noise: 0.1

    Arguments:
        chain: Linear corruptions without noise, in the order in which they are applied. A mask must be the last.
        noise: Standard deviation of the noise; see :class:`diffem.LinearCorruption`.

    Raises:
        DiffemError: If one of them is not linear, has noise, is a mask that is not the last, or shares a parameter with
            another.
    """

    def __init__(self, chain: Sequence[Corruption], noise: float | Sequence[float] | None = None) -> None:
        super().__init__(noise)
        self.chain: list[LinearCorruption] = []
        if not isinstance(chain, list | tuple) or not chain:
            raise DiffemError(f"Compose: chain must be a list of linear corruptions, got {chain!r}")
        for link in chain:
            name = link.config["name"] if isinstance(link, Corruption) else repr(link)
            if not isinstance(link, LinearCorruption):
                raise DiffemError(
                    f"Compose: chain: {name} is not linear with Gaussian noise; write the whole as one function"
                )
            if link.noise:
                raise DiffemError(
                    f"Compose: chain: {name} has noise {link.noise}; noise is added at the end: `noise` of Compose"
                )
            if isinstance(link, Mask) and link is not chain[-1]:
                raise DiffemError(
                    f"Compose: chain: {name} must be the last; mask.npy says which entries of y were observed"
                )
            link = copy.copy(link)
            link.noise = 0.0
            self.chain.append(link)
        own = [name for link in self.chain for name in self._own(link)]
        if len(set(own)) < len(own):
            twice = next(name for name in own if own.count(name) > 1)
            raise DiffemError(f"Compose: chain: two corruptions take {twice}.npy; make them one")
        self.parameters = (*own, "mask", "noise")
        self.same_units = all(link.same_units for link in self.chain)
        self.aligned = all(link.aligned for link in self.chain)

    @staticmethod
    def _own(link: LinearCorruption) -> list[str]:
        """The parameters of one corruption, without mask and noise, which belong to the whole chain."""
        return [name for name in link.parameters or () if name not in ("mask", "noise")]

    def _of(self, link: LinearCorruption, params: Mapping) -> dict:
        return {name: params[name] for name in self._own(link) if name in params}

    @property
    def config(self) -> dict[str, object]:
        return {**super().config, "chain": [link.config for link in self.chain]}

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        params, x = {}, torch.zeros(n, *shape)
        for link in self.chain:
            params |= link.draw(n, tuple(x.shape[1:]), generator)
            x = link.A(x, self._of(link, params))
        return params

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        super().check(y, params, shape)
        observed = tuple(y.shape[1:])
        said = shape != observed
        for link in reversed(self.chain):
            made = np.broadcast_to(np.float32(0), (len(y), *observed))
            own = self._of(link, params)
            if isinstance(link, Mask) and "mask" in params:
                own["mask"] = params["mask"]
            observed = link.check(made, own, shape if said and link is self.chain[0] else observed)
        return observed

    def apart(self, shape: tuple[int, ...]) -> bool:
        return all(link.apart(shape) for link in self.chain)

    def A(self, x: Tensor, params: Params) -> Tensor:
        for link in self.chain:
            x = link.A(x, self._of(link, params))
        return x

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        for link in reversed(self.chain):
            y = link.A_adjoint(y, self._of(link, params))
        return y
