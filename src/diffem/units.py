"""The units of models, in which data span about [-1, 1]. Everything a user gives or gets is in the units of y instead.

Units change once, at the border: where observations are read (:class:`diffem.data.Dataset`), where reconstructions are
written, and in :class:`diffem.posterior.Posterior`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Units:
    """x in the units of the data is (x - centre) / half in those of models."""

    centre: float = 0.0
    half: float = 1.0

    def scale(self, x: Any) -> Any:
        """From the units of the data to those of models: a tensor, an array, or a number."""
        return (x - self.centre) / self.half

    def restore(self, x: Any) -> Any:
        """Back again."""
        return x * self.half + self.centre
