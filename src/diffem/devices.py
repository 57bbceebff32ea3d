"""The device and the precision of the networks' arithmetic."""

from __future__ import annotations

import torch

from diffem import distributed
from diffem.errors import DiffemError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose(device: str = "auto", precision: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of the networks' arithmetic (weights stay in float32).

    Arguments:
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`, ...
        precision: `auto` (bfloat16 on a CUDA GPU, float32 elsewhere), `float32` or `bfloat16`.

    Raises:
        DiffemError: If the device cannot be used, or the precision is unknown.
    """
    if device == "auto":
        device = distributed.device() if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # fails where there is no such device, and on `meta`
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DiffemError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from None
    if precision == "auto":
        precision = "bfloat16" if chosen.type == "cuda" else "float32"
    if precision not in PRECISIONS:
        raise DiffemError(f"--precision: must be auto, {', '.join(PRECISIONS)}, got {precision!r}")
    return chosen, PRECISIONS[precision]
