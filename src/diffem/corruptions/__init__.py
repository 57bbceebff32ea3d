"""How clean data become observations: the channel Q(. | x), simulated.

- base.py: the interface, and :func:`register_corruption`, which adds your own; blackbox.py: any function
- linear.py: all that follows from A and its adjoint; thinning.py: hides parts to be predicted; compose.py: chains
- diagonal.py: masks, noise and Gaussian blurs; blur.py: other kernels; resolution.py: binning and grayscale;
  fourier.py: k-space; radon.py: tomography; projection.py: random projections
- entrywise.py: photons, clipping, levels and other corruptions of single entries; jpeg.py: the codec; unknown.py: one
  of several
- physics.py: operators of deepinv
- registry.py: from a name in a file to a corruption
"""

from __future__ import annotations

from .base import REGISTRY, Corruption, Observed, Params, register_corruption
from .blackbox import BlackBox
from .blur import Blur, MotionBlur
from .compose import Compose
from .diagonal import GaussianBlur, GaussianNoise, Mask, RandomMask
from .entrywise import EntrywiseCorruption, Gamma, PoissonGaussian, Quantise, SaltAndPepper, Saturate, Speckle
from .fourier import Fourier
from .jpeg import JPEG
from .linear import LinearCorruption
from .physics import from_deepinv
from .projection import RandomProjection
from .radon import Radon
from .registry import from_config, from_path
from .resolution import Downsample, Grayscale
from .unknown import OneOf

__all__ = [
    "JPEG",
    "REGISTRY",
    "BlackBox",
    "Blur",
    "Compose",
    "Corruption",
    "Downsample",
    "EntrywiseCorruption",
    "Fourier",
    "Gamma",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "LinearCorruption",
    "Mask",
    "MotionBlur",
    "Observed",
    "OneOf",
    "Params",
    "PoissonGaussian",
    "Quantise",
    "Radon",
    "RandomMask",
    "RandomProjection",
    "SaltAndPepper",
    "Saturate",
    "Speckle",
    "from_config",
    "from_deepinv",
    "from_path",
    "register_corruption",
]
