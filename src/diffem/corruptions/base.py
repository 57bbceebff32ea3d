"""What a corruption is, and what more it may offer.

A corruption needs one method: :meth:`Corruption.apply` draws observations of clean items. The others are capabilities, each used
where it is there. Shapes: x is (B, *shape) with shape = (features,) or (channels, *spatial). Parameters are a dictionary of
tensors with the batch first, under the names of the files of an observation folder (mask, matrix, ...). Noise is a standard
deviation in the units of y.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Basis, Likelihood
from diffem.units import Units

Params = dict[str, Tensor]
Observed = tuple[Tensor, Params]  # observations (B, *y shape), and their parameters
NOISE_FLOOR = 1e-3  # in model units: keeps likelihoods of noise-free data finite
SPREAD = 0.5  # the assumed standard deviation of data in model units; noise well above it hides them


class Corruption:
    """How clean becomes observed.

    Attributes:
        noise: The standard deviation of the noise, where it is Gaussian.
        linear: Whether y = A x + N(0, noise^2): then :meth:`forward` and :meth:`adjoint` are there.
        diagonal: Whether A is diagonal in an orthonormal basis that is the same for all observations.
        by_entry: Whether an entry of y depends on the same entry of x only.
        parameters: The names of its parameters, which stand beside y.npy as NAME.npy.
    """

    noise: float = 0.0
    linear = False
    diagonal = False
    by_entry = False
    parameters: tuple[str, ...] = ()

    # --- what it is ----------------------------------------------------------------------------------

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        """Parameters of n observations of items of `shape`; may be empty."""
        return {}

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        """One draw from Q(. | x, params), noise included; x (B, *shape) in the units of the data."""
        raise NotImplementedError

    def observe(self, x: Tensor, generator: torch.Generator) -> Observed:
        """Observations of items x (B, *shape) with parameters of their own, and those."""
        params = self.draw(len(x), tuple(x.shape[1:]), generator)
        return self.apply(x, params, generator), params

    @property
    def config(self) -> dict[str, object]:
        """What rebuilds it: its name, and its arguments, which are attributes of the same names."""
        name, arguments = type(self).__name__, inspect.signature(type(self)).parameters
        lost = [k for k in arguments if k not in vars(self)]
        if lost:
            raise DiffemError(
                f"corruption {name}: keep its argument {lost[0]} as self.{lost[0]}, or it cannot be saved"
            )
        values = {k: getattr(self, k) for k in arguments}
        return {"name": name, **{k: v for k, v in values.items() if isinstance(v, int | float | str)}}

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an item; `shape` is what the user said, or that of y.

        Raises:
            DiffemError: If the parameters are not those that it needs, naming the file.
        """
        return shape

    def rehearse(self, observations: tuple[int, ...], x: Tensor) -> None:
        """Tries it on items x (B, *shape), before anything is trained.

        Raises:
            DiffemError: In one line, if it fails, or makes something else than `observations`, the shape of y without the batch.
        """
        name = self.config["name"] if self.config["name"] != "BlackBox" else self.config["function"]
        try:
            y, params = self.observe(x, torch.Generator().manual_seed(0))
        except DiffemError:
            raise
        except Exception as error:
            raise DiffemError(f"corruption {name}: raised {type(error).__name__}: {error}") from error
        if not isinstance(y, Tensor) or not isinstance(params, dict):
            raise DiffemError(f"corruption {name}: gave {type(y).__name__} where a tensor is wanted")
        if tuple(y.shape) != (len(x), *observations):
            wanted = (len(x), *observations)
            raise DiffemError(f"corruption {name}: makes {tuple(y.shape)} of {len(x)} items, where y.npy has {wanted}")
        if y.is_complex() or not y.isfinite().all():
            raise DiffemError(f"corruption {name}: gave values that are not finite real numbers")

    # --- what it may offer ---------------------------------------------------------------------------

    def forward(self, x: Tensor, params: Params) -> Tensor:
        """A x."""
        raise NotImplementedError

    def adjoint(self, y: Tensor, params: Params) -> Tensor:
        """A^T y."""
        raise NotImplementedError

    def likelihood(self, y: Tensor, params: Params) -> Likelihood:
        """p(y | x) of flattened items, for exact posteriors under Gaussian mixtures."""
        raise NotImplementedError

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise, kept away from 0 for likelihoods."""
        return max(self.noise, NOISE_FLOOR)

    @property
    def exact(self) -> bool:
        """Whether :meth:`likelihood` is there."""
        return type(self).likelihood is not Corruption.likelihood

    def basis(self, shape: tuple[int, ...]) -> Basis | None:
        """The basis in which mixtures for items of `shape` are written; None for the entries."""
        return None

    def thin(self, y: Tensor, params: Params, generator: torch.Generator) -> tuple[Observed, Observed] | None:
        """Splits observations into two that are independent given x, or None where that cannot be done."""
        return None

    @property
    def thins(self) -> bool:
        """Whether :meth:`thin` is there."""
        return type(self).thin is not Corruption.thin

    @property
    def predictable(self) -> bool:
        """Whether a hidden part of an observation can be predicted from the rest."""
        return self.linear and self.thins

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

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        """What the network sees of an observation: y, and every parameter that fits its shape."""
        fitting = [p.to(y) for p in params.values() if p.shape[0] == y.shape[0] and p.shape[2:] == y.shape[2:]]
        return [y, *fitting]

    def seen(self, y: Tensor, params: Params) -> Tensor:
        """Which entries of y carry information: a boolean tensor that broadcasts against y."""
        return torch.ones((1,) * y.ndim, dtype=torch.bool, device=y.device)

    def compared(self, y: Tensor) -> Tensor:
        """y in the orthonormal basis in which its coefficients are independent, in the shape of y; y itself by default."""
        return y

    def entries(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Numbers by which observations with other parameters can be compared, and which of them were seen, both (B, d)."""
        return self.compared(y).flatten(1), self.seen(y, params).expand(y.shape).flatten(1)

    # --- units ---------------------------------------------------------------------------------------

    def scaled(self, units: Units) -> Corruption:
        """The same corruption of items in model units, whose observations are those of :meth:`scale_y`."""
        return Scaled(self, units)

    def scale_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        """An observation in the units in which its item is in model units."""
        return units.scale(y)

    def restore_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        """What :meth:`scale_y` was given."""
        return units.restore(y)


class Scaled(Corruption):
    """A corruption in model units. What it is asked for is done in the units of the data."""

    def __init__(self, inner: Corruption, units: Units) -> None:
        self.inner, self.units = inner, units
        self.noise, self.by_entry = inner.noise / units.half, inner.by_entry

    @property
    def config(self) -> dict[str, object]:
        return self.inner.config

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        return self.inner.draw(n, shape, generator)

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        y = self.inner.apply(self.units.restore(x), params, generator)
        return self.inner.scale_y(y, params, self.units)

    @property
    def thins(self) -> bool:
        return self.inner.thins

    def thin(self, y: Tensor, params: Params, generator: torch.Generator) -> tuple[Observed, Observed] | None:
        split = self.inner.thin(self.inner.restore_y(y, params, self.units), params, generator)
        if split is None:
            return None
        (a, of_a), (b, of_b) = split
        return (self.inner.scale_y(a, of_a, self.units), of_a), (self.inner.scale_y(b, of_b, self.units), of_b)

    def measured(self, x: Tensor, params: Params) -> Tensor:
        return self.inner.measured(x, params)

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        return self.inner.condition(y, params)

    def seen(self, y: Tensor, params: Params) -> Tensor:
        return self.inner.seen(y, params)

    def compared(self, y: Tensor) -> Tensor:
        return self.inner.compared(y)

    def entries(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return self.inner.entries(y, params)


class LinearCorruption(Corruption):
    """y = A x + N(0, noise^2) with A given by the parameters.

    Arguments:
        noise: The standard deviation of the noise.
    """

    linear = True

    def __init__(self, noise: float) -> None:
        if not noise >= 0:
            raise DiffemError(f"{type(self).__name__}: noise must be a standard deviation >= 0, got {noise}")
        self.noise = float(noise)

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        y = self.forward(x, params)
        return y + self.noise * torch.randn(y.shape, generator=generator, device=generator.device).to(y)

    def scaled(self, units: Units) -> LinearCorruption:
        other = copy.copy(self)
        other.noise = self.noise / units.half
        return other

    def scale_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        middle = torch.full_like(self.adjoint(y, params), units.centre)
        return (y - self.forward(middle, params)) / units.half

    def restore_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        middle = torch.full_like(self.adjoint(y, params), units.centre)
        return y * units.half + self.forward(middle, params)


class BlackBox(Corruption):
    """Any function x -> y: nothing is asked of it but that it can be called.

    Arguments:
        function: Takes a batch (B, *shape) in the units of the data, on the CPU, and returns as many observations.
            It may draw from the global generators of torch, numpy and random, which are seeded for the call.
        name: How the function is found again: 'package.module:function'; its own name by default.
        clip: Draws are clamped to (low, high) before the function sees them, e.g. one that takes counts.

    Raises:
        DiffemError: On :meth:`apply`, in one line that names the function, if it raises, or returns what are not as many
            finite real numbers.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        name: str | None = None,
        clip: tuple[float, float] | None = None,
    ) -> None:
        self.function, self.path, self.clip = function, name or getattr(function, "__name__", "function"), clip

    @property
    def config(self) -> dict[str, object]:
        clipped = {} if self.clip is None else {"clip": list(self.clip)}
        return {"name": "BlackBox", "function": self.path, **clipped}

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            try:
                y = self.function((x if self.clip is None else x.clamp(*self.clip)).cpu())
            except Exception as error:
                raise DiffemError(f"corruption {self.path}: raised {type(error).__name__}: {error}") from error
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002
                random.setstate(python_state)
        return self._checked(y, len(x)).to(x)

    def _checked(self, y: object, n: int) -> Tensor:
        try:
            made = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError):
            raise DiffemError(f"corruption {self.path}: gave {type(y).__name__}, not an array of numbers") from None
        if made.ndim < 1 or len(made) != n:
            given = len(made) if made.ndim else 1
            raise DiffemError(f"corruption {self.path}: gave {given} observations for {n} items")
        if made.is_complex():
            raise DiffemError(f"corruption {self.path}: gave complex values; give real and imaginary parts as channels")
        if not made.isfinite().all():
            raise DiffemError(f"corruption {self.path}: gave values that are not finite")
        return made
