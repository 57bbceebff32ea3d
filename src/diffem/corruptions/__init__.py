"""How clean data become observations: the channel Q(. | x), simulated.

A corruption needs two methods: :meth:`~diffem.corruptions.base.Corruption.draw` draws the parameters of
n observations (masks, matrices), and :meth:`~diffem.corruptions.base.Corruption.apply` draws the
observations given clean data and parameters. Linear-Gaussian ones offer more; each extra is used
where it is present.
"""

from __future__ import annotations

from .base import BlackBox, Corruption, LinearCorruption, Params
from .diagonal import GaussianBlur, GaussianNoise, RandomMask
from .projection import RandomProjection
from .registry import REGISTRY, from_config, from_function_path

__all__ = [
    "REGISTRY",
    "BlackBox",
    "Corruption",
    "GaussianBlur",
    "GaussianNoise",
    "LinearCorruption",
    "Params",
    "RandomMask",
    "RandomProjection",
    "from_config",
    "from_function_path",
]
