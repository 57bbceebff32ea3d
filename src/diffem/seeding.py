r"""Random numbers that depend on what is drawn, never on how the work is split into batches or interrupted.

There are two tools:

* :func:`generator`: a :class:`torch.Generator` for one named step of the work, e.g. update 17 of the M-step of
  iteration 3. All random numbers of a training step come from it, so a resumed run draws the same.
* :func:`normal` and :func:`uniform`: numbers for single items, keyed by their global index. They are
  counter-based: number j of the stream with key k is the SplitMix64 hash of :math:`k + j \gamma`, so
  an item gets the same numbers in a batch of 7 and in one of 256, on the CPU and on a GPU.

The keys k and ~k (the complement of its bits) are antithetic: they give normal numbers z and -z, and uniform numbers u
and 1 - u. Several draws of one item come in such pairs, since errors that are odd in z cancel in their mean.

Reference:
    | Fast Splittable Pseudorandom Number Generators (Steele, Lea & Flood, 2014)
    | A new Monte Carlo technique: antithetic variates (Hammersley & Morton, 1956)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# The kinds of work that draw random numbers. Their order determines the numbers that a seed gives, so only append.
PURPOSES = {
    name: number
    for number, name in enumerate(
        ("init", "split", "data", "start", "m_step", "e_step", "score", "prior", "user", "end", "prior_step")
    )
}


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def fold(seed: int, *numbers: int) -> int:
    """A 64-bit key from a seed and any number of counters."""
    key = _mix((seed + _GAMMA) & _MASK)
    for number in numbers:
        key = _mix((key + (number + 1) * _GAMMA) & _MASK)
    return key


def generator(
    seed: int, iteration: int, purpose: str, step: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """The generator of one step of one purpose of one iteration."""
    return torch.Generator(device).manual_seed(fold(seed, iteration, PURPOSES[purpose], step) >> 1)


def integers(below: int, n: int, generator: torch.Generator) -> np.ndarray:
    """n integers from 0 to below - 1, for the CPU.

    A GPU is not waited for: its own numbers would be there only after all work that it still has to do. They come from a
    generator of the CPU instead, seeded with the state of the GPU's, which moves on.
    """
    if generator.device.type == "cuda":
        offset = generator.get_offset()
        generator.set_offset(offset + 4)  # the least by which it can
        generator = torch.Generator().manual_seed(fold(generator.initial_seed(), offset) >> 1)
    return torch.randint(below, (n,), generator=generator, device=generator.device).cpu().numpy()


@contextlib.contextmanager
def global_generators(
    device: str | torch.device, seed: int, iteration: int = 0, purpose: str = "init", step: int = 0
) -> Iterator[None]:
    """Within this context, torch's global generators are seeded like :func:`generator`; afterwards they are
    restored."""
    device = torch.device(device)
    key, on_cpu = fold(seed, iteration, PURPOSES[purpose], step) >> 1, device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        elif not on_cpu:
            torch.get_device_module(device).manual_seed(key)
        yield


def item_seeds(seed: int, iteration: int, purpose: str, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """One 64-bit key for each item, from its global index; shape (N,), int64."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    base = fold(seed, iteration, PURPOSES[purpose])
    return _hash(_signed(base) + (indices + 1) * _signed(_GAMMA))


def again(seeds: Tensor, number: int) -> Tensor:
    """Further keys of the same items, shape (N,), independent for each `number`; for 0 they are the seeds themselves.

    Those of antithetic keys are antithetic.
    """
    sign = seeds >> 63
    return _hash((seeds ^ sign) + _signed(fold(number))) ^ sign if number else seeds


def antithetic(seeds: Tensor, number: int) -> Tensor:
    """The keys of draw `number` of the same items, shape (N,): draws 0 and 1, 2 and 3, ... are antithetic pairs.

    Every draw has the right distribution, and different pairs are independent.
    """
    keys = again(seeds, number // 2)
    return ~keys if number % 2 else keys


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift; torch's is arithmetic


def _hash(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def _bits(seeds: Tensor, count: int, stream: int) -> Tensor:
    # Every stream has its own key; within a stream the counter runs over the numbers of the item. `seeds >> 63` is -1
    # for a negative key, else 0: antithetic keys give the same bits.
    keys = _hash((seeds ^ (seeds >> 63)) + _signed((stream + 1) * 0xD1342543DE82EF95 & _MASK))
    counters = torch.arange(1, count + 1, device=seeds.device) * _signed(_GAMMA)
    return _hash(keys[:, None] + counters)


def uniform(seeds: Tensor, shape: Sequence[int] = (), stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1): shape (N, *shape), float32, stream `stream` of each item.

    Arguments:
        seeds: Keys from :func:`item_seeds`, shape (N,).
        shape: The shape for one item.
        stream: Which of the item's independent streams, e.g. the step of the sampler.
    """
    bits = _bits(seeds, math.prod(shape), stream) ^ (seeds >> 63)[:, None]
    return (_shift(bits, 40).to(torch.float32) * 2.0**-24).view(seeds.shape[0], *shape)


def normal(seeds: Tensor, shape: Sequence[int] = (), stream: int = 0) -> Tensor:
    """Standard normal numbers: shape (N, *shape), float32; arguments as in :func:`uniform` (Box-Muller)."""
    count = math.prod(shape)
    bits = _bits(seeds, (count + 1) // 2, stream)
    first = (_shift(bits, 32).to(torch.float32) + 1) * 2.0**-32  # in (0, 1]
    angle = (bits & 0xFFFFFFFF).to(torch.float32) * (2 * math.pi * 2.0**-32)
    radius = (-2 * first.log()).sqrt()
    both = torch.cat((radius * angle.cos(), radius * angle.sin()), 1) * (1 + 2 * (seeds >> 63))[:, None]
    return both[:, :count].reshape(seeds.shape[0], *shape)
