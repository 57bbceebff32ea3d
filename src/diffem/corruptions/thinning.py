"""What thinning hides of an observation: what other observations miss, so that scores speak of gaps like those in the data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .base import Params

HIDDEN = 0.3  # about the fraction of the observed entries that thinning hides
TOO_FEW = 0.05  # if other masks would hide less than this, single entries are hidden instead
MOST_OTHERS = 32  # masks that hide a part of one observation
MASKS = 64  # masks by which it is decided how many others hide that fraction


class Gaps:
    """Gaps like those of measured masks.

    Arguments:
        parameters: Draws n parameters of measured observations, `mask` among them: `parameters(n, generator)`.
        others: How many masks are drawn for each observation.
        all_miss: Whether a gap is what all of them miss, or what any of them does.
    """

    def __init__(self, parameters: Callable[[int, torch.Generator], Params], others: int, all_miss: bool) -> None:
        self.parameters, self.others, self.all_miss = parameters, others, all_miss

    @classmethod
    def of(cls, parameters: Callable[[int, torch.Generator], Params]) -> Gaps | None:
        """Gaps that hide about :data:`HIDDEN` of what is observed; None if no masks do so."""
        generator = torch.Generator().manual_seed(0)
        masks = parameters(MASKS, generator).get("mask")
        if masks is None:
            return None
        masks = masks.bool()
        seen = masks & ~masks.all(0)  # what is never missing is never hidden, and need not be predicted
        missing = float((seen & ~masks.roll(1, 0)).sum() / seen.sum().clamp(min=1))
        if not 0 < missing < 1:
            return None
        # another mask misses a fraction q of what is seen; all of k others miss q^k, and any of them 1 - (1 - q)^k
        all_miss = missing >= HIDDEN
        k = math.log(HIDDEN) / math.log(missing) if all_miss else math.log1p(-HIDDEN) / math.log1p(-missing)
        gaps = cls(parameters, min(max(round(k), 1), MOST_OTHERS), all_miss)
        return gaps if (gaps.draw(MASKS, generator) & masks).sum() >= TOO_FEW * masks.sum() else None

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Gaps for n observations: true where they hide."""
        missed = ~self.parameters(n, generator)["mask"].bool()
        for _ in range(self.others - 1):
            another = ~self.parameters(n, generator)["mask"].bool()
            missed = missed & another if self.all_miss else missed | another
        return missed
