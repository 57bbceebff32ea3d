"""Several processes that work on one run, as `torchrun` starts them: on one machine, or on several that share the run folder.

The first process writes; all of them read. Every process makes the same random draws, since these are keyed by the item and the
step, and works on its share of them: a part of each batch in the M-step, every n-th chunk of the observations in the E-step. What
must be decided once, the first process decides (:func:`shared`). With one process all of this does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from diffem.errors import DiffemError, ToldElsewhere

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # others wait while the first process fits a start; a process that dies is noticed at once


def begin() -> None:
    """Joins the other processes, if `torchrun` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        importlib.import_module("torch._dynamo")  # optimisers import it, and what it keeps of a group cannot be ended
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_end)


def _end() -> None:
    """Ends the threads that talk to the other processes: Python may abort if they still run when it exits."""
    with contextlib.suppress(RuntimeError, ValueError):  # others have died, or it was ended already
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def device() -> str:
    """The GPU of this process, where there are several."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if size() > 1 else "cuda"


def shared(make: Callable[[], T]) -> T:
    """What `make` returns in the first process; the others wait for it. It must be small, and a DiffemError is raised in all."""
    if size() == 1:
        return make()
    found: list[Any] = [None, None]
    own: Exception | None = None
    if first():
        try:
            found[0] = make()
        except (DiffemError, OSError) as error:  # of the file system: a full disk
            found[1], own = str(error), error
    with _alive():
        distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise ToldElsewhere(found[1]) if own is None else own
    return found[0]


def anyone(yes: bool) -> bool:
    """Whether it is true in some process."""
    if size() == 1:
        return yes
    with _alive():
        distributed.all_reduce(flag := torch.tensor(int(yes)), distributed.ReduceOp.MAX)
    return bool(flag)


def wait() -> None:
    """Returns when all processes are here."""
    anyone(False)


def gathered(mine: T) -> list[T]:
    """What every process has, in their order; in the first process, an empty list in the others."""
    if size() == 1:
        return [mine]
    found: list[Any] | None = [None] * size() if first() else None
    with _alive():
        distributed.gather_object(mine, found)
    return found or []


def add(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors of one dtype by their sums over all processes."""
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _alive():
        distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def share(n: int) -> slice:
    """Which of n items are this process's."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, distributed.DistBackendError) as error:
        raise DiffemError(
            "another process of this run has died; the same command goes on from the last checkpoint"
        ) from error
