"""Memory: how much is free, and how much a batch will take, estimated from one item."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diffem.errors import DiffemError

SHARE = 0.25  # fraction of the available memory for a batch of draws
MOST = 256  # items at a time: larger batches are no faster
UNKNOWN = 4 * 2**30  # bytes assumed free, where the system does not tell
NUMBERS = 2**25  # single-precision numbers in an array of many items: 128 MB
CURRENT, KEPT = 4, 8  # evaluating a network takes about 4 of its largest outputs at once, and an eighth of all


class TooLarge(DiffemError):
    """The requested work does not fit in memory."""


def available(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [UNKNOWN]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [1024 * int(lines["MemAvailable"].split()[0])]
        limit, used, stat = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = dict(line.split() for line in stat.splitlines())["inactive_file"]
        free.append(int(limit) - int(used) + int(cached))  # limit of a container; the file holds `max` if there is none
    except (OSError, KeyError, ValueError):
        pass
    return min(free)


def give_back() -> None:
    """Returns memory that is no longer used to the system: the C library of Linux would keep most of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def of_draw(network: nn.Module, evaluate: Callable[[], object]) -> int:
    """Bytes per item of evaluating a network without derivatives; `evaluate` evaluates it on one item."""
    sizes: list[int] = []
    leaves = [module for module in network.modules() if not [*module.children()]]

    def note(_module: nn.Module, _inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    return CURRENT * max(sizes, default=0) + sum(sizes) // KEPT


@contextlib.contextmanager
def of_update(network: nn.Module) -> Iterator[list[int]]:
    """Counts the bytes that are kept for derivatives, without the weights of the network. It yields a list of one
    entry, the count."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    seen: dict[int, int] = {}
    total = [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            total[0] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


def batch(item: int, device: torch.device) -> int:
    """How many items of `item` bytes are drawn at a time: the largest power of two that fits, at most :data:`MOST`."""
    fits = int(SHARE * available(device)) // max(item, 1)
    return min(MOST, 1 << max(fits, 1).bit_length() - 1)


def at_once(numbers: int, most: int, limit: int = NUMBERS) -> int:
    """How many items of `numbers` numbers each one array holds: at most `most`, and at most `limit` numbers in all."""
    return max(1, min(most, limit // max(numbers, 1)))


def words(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{max(size / 2**20, 1):.0f} MB"
