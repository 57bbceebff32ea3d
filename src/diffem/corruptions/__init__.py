"""How clean data become observations: the channel Q(. | x), simulated.

- base.py: what a corruption is, and what more it may offer; the black box
- diagonal.py: masks, noise and blurs; projection.py: random projections
- registry.py: from a name to a corruption; :func:`register_corruption` adds your own
"""

from __future__ import annotations

from .base import BlackBox, Corruption, LinearCorruption, Observed, Params
from .diagonal import GaussianBlur, GaussianNoise, Mask, RandomMask
from .projection import RandomProjection
from .registry import REGISTRY, from_config, from_path, register_corruption

__all__ = [
    "REGISTRY",
    "BlackBox",
    "Corruption",
    "GaussianBlur",
    "GaussianNoise",
    "LinearCorruption",
    "Mask",
    "Observed",
    "Params",
    "RandomMask",
    "RandomProjection",
    "from_config",
    "from_path",
    "register_corruption",
]
