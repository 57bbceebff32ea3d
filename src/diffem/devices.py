"""The device and the precision of the networks' arithmetic, and their translation by torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Collection

import torch
from torch import Tensor, nn

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


def put(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on another device. A GPU is not waited for: it takes the tensor from pinned memory in its turn."""
    if torch.device(device).type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


class Compiled:
    """A network that torch.compile translates when it is first called; where that fails it runs as it is.

    Arguments:
        network: Called with a list of tensors and one tensor (B,).
        sizes: The batch sizes B at which it is translated, each of them for itself: what is computed at one then does not
            depend on those that came before, so that a resumed run computes the same.
    """

    def __init__(self, network: nn.Module, sizes: Collection[int]) -> None:
        self.network, self.sizes = network, sizes
        self.translated = torch.compile(network, dynamic=False)

    def __call__(self, inputs: list[Tensor], level: Tensor) -> tuple[Tensor, Tensor]:
        if len(level) in self.sizes:
            try:
                return self.translated(inputs, level)
            except Exception as error:  # of a compiler; if it is one of the network, the network raises it again
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"diffem: --compile: goes on without it, since it fails: {reason}", file=sys.stderr)
                self.sizes = ()
        return self.network(inputs, level)
