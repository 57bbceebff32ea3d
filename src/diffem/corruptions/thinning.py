"""Observations with a mask of the entries of y, and which entries thinning hides.

If the data have masks, thinning hides the entries that other observations miss (gaps, stripes, channels), so that
scores are measured on gaps like those in the data. Otherwise it hides single entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Corruption, Observed, Params

HIDDEN = 0.3  # the approximate fraction of observed entries that thinning hides
TOO_FEW = 0.05  # if other masks would hide a smaller fraction than this, single entries are hidden instead
MOST_OTHERS = 32  # the most masks that are combined to hide a part of one observation
MASKS = 64  # sampled masks from which the number of masks to combine is computed


class Gaps:
    """Gaps like those of measured masks.

    Arguments:
        parameters: `parameters(n, generator)` draws n parameters of measured observations, including `mask`.
        others: The number of masks that are drawn for each observation.
        all_miss: Whether a gap is the set of entries that all of these masks miss, or that any of them misses.
    """

    def __init__(self, parameters: Callable[[int, torch.Generator], Params], others: int, all_miss: bool) -> None:
        self.parameters, self.others, self.all_miss = parameters, others, all_miss

    @classmethod
    def of(cls, parameters: Callable[[int, torch.Generator], Params]) -> Gaps | None:
        """Gaps that hide about :data:`HIDDEN` of the observed entries; None if the masks cannot do so."""
        generator = torch.Generator().manual_seed(0)
        masks = parameters(MASKS, generator).get("mask")
        if masks is None:
            return None
        masks = masks.bool()
        seen = masks & ~masks.all(0)  # entries that are never missing are never hidden, and need not be predicted
        missing = float((seen & ~masks.roll(1, 0)).sum() / seen.sum().clamp(min=1))
        if not 0 < missing < 1:
            return None
        # another mask misses a fraction q of the seen entries; all of k others miss q^k, any of k misses 1 - (1 - q)^k
        all_miss = missing >= HIDDEN
        k = math.log(HIDDEN) / math.log(missing) if all_miss else math.log1p(-HIDDEN) / math.log1p(-missing)
        gaps = cls(parameters, min(max(round(k), 1), MOST_OTHERS), all_miss)
        return gaps if (gaps.draw(MASKS, generator) & masks).sum() >= TOO_FEW * masks.sum() else None

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Gaps for n observations: true where entries are hidden."""
        missed = ~self.parameters(n, generator)["mask"].bool()
        for _ in range(self.others - 1):
            another = ~self.parameters(n, generator)["mask"].bool()
            missed = missed & another if self.all_miss else missed | another
        return missed


class Masked(Corruption):
    """A corruption with a mask of the entries of y, mask.npy (true = observed). Unobserved entries are 0.

    Attributes:
        gaps: Draws the entries that thinning hides, if masks were measured; None: single entries are hidden at random.
    """

    parameters: tuple[str, ...] | None = ("mask",)
    gaps: Gaps | None = None

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        if "mask" in params:
            refuse_unless_it_broadcasts("mask", params["mask"], y)
        return shape

    def seen(self, y: Tensor, params: Params) -> Tensor:
        return params["mask"].bool() if "mask" in params else super().seen(y, params)

    def shown(self, y: Tensor, params: Params) -> Tensor:
        """M y."""
        return y * self.seen(y, params)

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        """y, and 1 where it was observed, else 0."""
        return [y, self.seen(y, params).to(y).expand_as(y)]

    def thin(self, y: Tensor, params: Params, generator: torch.Generator) -> tuple[Observed, Observed] | None:
        everything = y if y.ndim == 2 else y[:, :1]  # features are masked separately, channels together
        mask = params["mask"].bool() if "mask" in params else torch.ones_like(everything, dtype=torch.bool)
        hide = self.gaps.draw(len(mask), generator) if self.gaps is not None else self.hidden(mask, generator)
        hide = hide.to(mask.device)
        kept, hidden = {**params, "mask": mask & ~hide}, {**params, "mask": mask & hide}
        return (self.shown(y, kept), kept), (self.shown(y, hidden), hidden)

    def hidden(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        """The entries that thinning hides if there are no :attr:`gaps`, in the shape of `mask`: single entries."""
        return torch.rand(mask.shape, generator=generator, device=generator.device) < HIDDEN

    def with_file_parameters(self, parameters: Callable[[int, torch.Generator], Params]) -> Masked:
        other = super().with_file_parameters(parameters)
        assert isinstance(other, Masked)
        other.gaps = Gaps.of(parameters)
        return other


def refuse_unless_it_broadcasts(name: str, value: np.ndarray, y: np.ndarray) -> None:
    """Raises a DiffemError if a parameter does not broadcast against the observations."""
    try:
        fits = np.broadcast_shapes(value.shape, y.shape) == y.shape
    except ValueError:
        fits = False
    if not fits:
        raise DiffemError(f"{name}.npy: shape {value.shape} does not broadcast against y's {y.shape}")
