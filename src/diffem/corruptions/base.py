"""The interface of a corruption, and the black box that wraps any function.

Shapes: x is (B, *shape) with shape = (features,) or (channels, *spatial). Parameters are a dictionary of
tensors with the batch first, under the names of the files of an observation folder (mask, matrix, ...).
Noise is always a standard deviation in the units of y.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Likelihood

Params = dict[str, Tensor]
NOISE_FLOOR = 1e-3  # in model units, where data span about [-1, 1]: keeps likelihoods of noise-free data finite
SPREAD = 0.5  # the assumed standard deviation of such data; noise well above it hides them


class Corruption:
    """How clean becomes observed."""

    noise: float = 0.0

    @property
    def by_entry(self) -> bool:
        """Whether every entry of y tells of the same entry of x alone."""
        return False

    @property
    def config(self) -> dict[str, object]:
        """What rebuilds it: the name and the arguments."""
        return {"name": type(self).__name__}

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        """Parameters of n observations of items of `shape`; may be empty."""
        return {}

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        """One draw from Q(. | x, params), noise included."""
        raise NotImplementedError

    def observe(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Params]:
        """Observations of items x (B, *shape) with parameters of their own, and those."""
        params = self.draw(len(x), tuple(x.shape[1:]), generator)
        return self.apply(x, params, generator), params

    def thin(
        self, y: Tensor, params: Params, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Params], tuple[Tensor, Params]] | None:
        """Splits observations into two that are independent given x, or None where that cannot be done."""
        return None

    def seen(self, y: Tensor, params: Params) -> Tensor:
        """Which entries of y carry information: a boolean tensor that broadcasts against y."""
        return torch.ones((1,) * y.ndim, dtype=torch.bool, device=y.device)

    def compared(self, y: Tensor) -> Tensor:
        """The coefficients of y in an orthonormal basis that :meth:`seen` speaks of, in the shape of y; its entries."""
        return y

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        """What the network sees of an observation: y, and every parameter that fits its shape."""
        fitting = [p.to(y) for p in params.values() if p.shape[0] == y.shape[0] and p.shape[2:] == y.shape[2:]]
        return [y, *fitting]

    def measured(self, x: Tensor, params: Params) -> Tensor:
        """P x: of every item the part that its observation measured, shape (B, *shape).

        With y = A x + N(0, s^2), and c the spread of the data, P = A^T (A A^T + (s / c)^2 I)^-1 A: the mask of a mask, the row
        space of a projection, h^2 / (h^2 + (s / c)^2) at each frequency of a blur with gains h. The M-step trusts this part of
        a reconstruction most. Where nothing is known of A, as here, everything counts as measured: P = I.

        Arguments:
            x: Items in model units, shape (B, *shape).
            params: Parameters of the observations that were made of them.
        """
        return x

    def scaled(self, centre: float, half: float) -> Corruption:
        """The corruption that acts on (x - centre) / half and gives :meth:`scale_y` of what this one gives."""
        raise NotImplementedError

    def scale_y(self, y: Tensor, params: Params, centre: float, half: float) -> Tensor:
        """The observation in the units in which the clean data are (x - centre) / half."""
        return (y - centre) / half


class LinearCorruption(Corruption):
    """y = A x + N(0, noise^2) with A given by the parameters."""

    def __init__(self, noise: float) -> None:
        if not noise >= 0:
            raise DiffemError(f"{type(self).__name__}: noise must be a standard deviation >= 0, got {noise}")
        self.noise = float(noise)

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise, kept away from 0 for likelihoods."""
        return max(self.noise, NOISE_FLOOR)

    def forward(self, x: Tensor, params: Params) -> Tensor:
        """A x."""
        raise NotImplementedError

    def adjoint(self, y: Tensor, params: Params) -> Tensor:
        """A^T y."""
        raise NotImplementedError

    def likelihood(self, y: Tensor, params: Params) -> Likelihood:
        """p(y | x) of flattened items, for exact posteriors under Gaussian mixtures."""
        raise NotImplementedError

    def scaled(self, centre: float, half: float) -> LinearCorruption:
        other = copy.copy(self)
        other.noise = self.noise / half
        return other


class BlackBox(Corruption):
    """Any function x -> y: nothing is asked of it but that it can be called.

    Arguments:
        function: Takes a batch (B, *shape) in the units of the data, on the CPU, and returns as many observations.
            It may draw from the global generators of torch, numpy and random, which are seeded for the call.
        name: How the function is found again: 'package.module:function'.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str | None = None) -> None:
        self.function, self.path = function, name
        self.centre, self.half = 0.0, 1.0

    @property
    def config(self) -> dict[str, object]:
        return {"name": "BlackBox", "function": self.path}

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            try:
                y = torch.as_tensor(self.function((x * self.half + self.centre).cpu()))
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002
                random.setstate(python_state)
        if y.shape[0] != x.shape[0]:
            raise DiffemError(f"corruption {self.path}: gave {y.shape[0]} observations for {x.shape[0]} items")
        return (y.to(x) - self.centre) / self.half

    def scaled(self, centre: float, half: float) -> BlackBox:
        other = copy.copy(self)
        other.centre, other.half = centre, half
        return other
