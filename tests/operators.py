"""What is true of every linear corruption."""

from __future__ import annotations

import torch

from diffem.corruptions import LinearCorruption, Params
from diffem.units import Units


def assert_same_in_model_units(corruption: LinearCorruption, x: torch.Tensor, params: Params, units: Units) -> None:
    """An observation is the same, whether it is made in the units of the data or in those of models."""
    y = corruption.apply(x, params, torch.Generator().manual_seed(4))
    scaled, of = corruption.scaled(units), corruption.scale_params(params, units)
    there = scaled.apply(units.scale(x), of, torch.Generator().manual_seed(4))
    torch.testing.assert_close(corruption.scale_y(y, params, units), there, rtol=0, atol=1e-12)
    torch.testing.assert_close(corruption.restore_y(there, params, units), y, rtol=0, atol=1e-12)
