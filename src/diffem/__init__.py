"""diffem: a posterior sampler and a prior from corrupted observations alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffem.config import Config, load_config
    from diffem.corruptions import (
        JPEG,
        BlackBox,
        Blur,
        Compose,
        Corruption,
        Downsample,
        EntrywiseCorruption,
        Fourier,
        Gamma,
        GaussianBlur,
        GaussianNoise,
        Grayscale,
        LinearCorruption,
        Mask,
        MotionBlur,
        OneOf,
        PoissonGaussian,
        Quantise,
        Radon,
        RandomMask,
        RandomProjection,
        SaltAndPepper,
        Saturate,
        Speckle,
        from_deepinv,
        register_corruption,
    )
    from diffem.data import Observations
    from diffem.em import DiffEM
    from diffem.errors import DiffemError
    from diffem.posterior import Posterior, from_pretrained
    from diffem.samplers import DiffusionSampler, register_sampler
    from diffem.tables import DiffEMImputer
    from diffem.tracking import track

__version__ = "0.1.0"
__all__ = [
    "JPEG",
    "BlackBox",
    "Blur",
    "Compose",
    "Config",
    "Corruption",
    "DiffEM",
    "DiffEMImputer",
    "DiffemError",
    "DiffusionSampler",
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
    "Observations",
    "OneOf",
    "PoissonGaussian",
    "Posterior",
    "Quantise",
    "Radon",
    "RandomMask",
    "RandomProjection",
    "SaltAndPepper",
    "Saturate",
    "Speckle",
    "from_deepinv",
    "from_pretrained",
    "load_config",
    "register_corruption",
    "register_sampler",
    "track",
]
_HOME = {
    "config": ("Config", "load_config"),
    "data": ("Observations",),
    "em": ("DiffEM",),
    "errors": ("DiffemError",),
    "posterior": ("Posterior", "from_pretrained"),
    "samplers": ("DiffusionSampler", "register_sampler"),
    "tables": ("DiffEMImputer",),
    "tracking": ("track",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import diffem` is quick.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"diffem.{_MODULE.get(name, 'corruptions')}"), name)
    raise AttributeError(f"module 'diffem' has no attribute {name!r}")
