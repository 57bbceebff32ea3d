"""One of several corruptions, where it is not known which one was applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Corruption, Params, register_corruption


@register_corruption
class OneOf(Corruption):
    """One of several corruptions, with equal probabilities, was applied to each observation; which one is not known.

    This integrates over nuisance parameters, e.g. over blurs of several widths if the width is unknown. In
    corruption.yaml:

        name: OneOf
        chain:
          - {name: GaussianBlur, std: 0.5, noise: 1.0}
          - {name: GaussianBlur, std: 1.5, noise: 1.0}

    Arguments:
        chain: The corruptions; they must take the same parameters, and make observations of one shape.
    """

    def __init__(self, chain: Sequence[Corruption]) -> None:
        if not isinstance(chain, list | tuple) or len(chain) < 2 or not all(isinstance(c, Corruption) for c in chain):
            raise DiffemError(f"OneOf: chain must be a list of at least two corruptions, got {chain!r}")
        self.chain, self.by_entry = list(chain), all(c.by_entry for c in chain)
        self.parameters = chain[0].parameters
        if any(c.parameters != self.parameters for c in chain):
            raise DiffemError("OneOf: chain: the corruptions must take the same parameters")

    @property
    def config(self) -> dict[str, object]:
        return {"name": "OneOf", "chain": [c.config for c in self.chain]}

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        shapes = {c.check(y, params, shape) for c in self.chain}
        if len(shapes) > 1:
            raise DiffemError(f"OneOf: chain: they are of items of different shapes, {sorted(shapes)}")
        return shapes.pop()

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        return self.chain[0].draw(n, shape, generator)

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(self.chain), (len(x),), generator=generator, device=generator.device).to(x.device)
        made = torch.stack([c.apply(x, params, generator) for c in self.chain])
        return made[which, torch.arange(len(x), device=x.device)]

    def initial(self, y: Tensor, params: Params) -> Tensor:
        return torch.stack([c.initial(y, params) for c in self.chain]).mean(0)
