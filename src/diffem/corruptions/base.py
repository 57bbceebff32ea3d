"""The interface of corruptions: one required method, and optional ones.

A corruption needs one method: :meth:`Corruption.apply` draws observations of clean items. The others are capabilities,
each used if it is implemented. Shapes: x is (B, *shape) with shape = (features,) or (channels, *spatial). Parameters
are a dictionary of tensors with the batch first, named like the files of an observation folder (mask, matrix, ...).
Noise is given as a standard deviation in the units of y.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Basis, Diagonal, Likelihood, Rows
from diffem.units import Units

Params = dict[str, Tensor]
NOISE_FLOOR = 1e-3  # in model units: keeps likelihoods of noise-free data finite
Observed = tuple[Tensor, Params]  # observations (B, *y shape), and their parameters


class Asked(Params):
    """Parameters of a corruption, given to code of a user: one that is not there is named by its file."""

    def __init__(self, params: Params, corruption: object) -> None:
        super().__init__(params)
        self.corruption = corruption

    def __missing__(self, name: str) -> Tensor:
        raise DiffemError(f"{name}.npy: missing; corruption {self.corruption} asks for it")


class Corruption:
    """How clean items become observations.

    Attributes:
        noise: The standard deviation of Gaussian noise: a number, one for each channel or column, or None if it is a
            parameter (noise.npy).
        linear: Whether y = A x + N(0, noise^2): then :meth:`forward` and :meth:`adjoint` are implemented.
        diagonal: Whether A is diagonal in an orthonormal basis that is the same for all observations.
        by_entry: Whether an entry of y depends on the same entry of x only.
        same_units: Whether y has the units of x, as weighted means of entries of x have.
        parameters: The names of its parameters, stored as NAME.npy next to y.npy; None allows any names.
        complex_items: Whether items are complex if the observations are.
        instead: For parameters that it does not take, the name of a corruption that does.
        file_parameters: Draws parameters of new observations from measured ones (:meth:`with_file_parameters`); None: they
            come from the formula :meth:`draw`.
    """

    noise: float | tuple[float, ...] | Tensor | None = 0.0
    linear = False
    diagonal = False
    by_entry = False
    same_units = True
    parameters: tuple[str, ...] | None = None
    complex_items = True
    instead: Mapping[str, str] = {}
    file_parameters: Callable[[int, torch.Generator], Params] | None = None

    # --- definition ----------------------------------------------------------------------------------

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        """Parameters of n observations of items of `shape`, drawn by a formula; by default there are none."""
        return {}

    def new_parameters(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        """Parameters of n new observations: from measured observations if available, else by the formula."""
        if self.file_parameters is None:
            return self.draw(n, shape, generator)
        return self.file_parameters(n, generator)

    def with_file_parameters(self, parameters: Callable[[int, torch.Generator], Params]) -> Corruption:
        """A copy whose new observations take their parameters from `parameters(n, generator)`."""
        other = copy.copy(self)
        other.file_parameters = parameters
        return other

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        """One draw from Q(. | x, params), noise included; x (B, *shape) in the units of the data."""
        raise NotImplementedError

    def observe(self, x: Tensor, generator: torch.Generator) -> Observed:
        """Observations of items x (B, *shape) with newly drawn parameters, and these parameters."""
        params = self.new_parameters(len(x), tuple(x.shape[1:]), generator)
        return self.apply(x, params, generator), params

    @property
    def config(self) -> dict[str, object]:
        """Its name and its arguments, which are read from the attributes of the same names; they rebuild it."""
        name, arguments = type(self).__name__, inspect.signature(type(self)).parameters
        lost = [k for k in arguments if k not in vars(self)]
        if lost:
            raise DiffemError(
                f"corruption {name}: keep its argument {lost[0]} as self.{lost[0]}, or it cannot be saved"
            )
        values = {k: getattr(self, k) for k in arguments}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"name": name, **{k: v for k, v in plain.items() if isinstance(v, int | float | str | list)}}

    @property
    def law(self) -> dict[str, object]:
        """What a posterior is trained for: the config without arguments that only say how parameters are drawn."""
        return self.config

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Checks the parameters and returns the shape of an item; `shape` is that given by the user, or that of y.

        Raises:
            DiffemError: If parameters are missing or do not fit; the message names the file.
        """
        return shape

    def rehearse(self, observations: tuple[int, ...], x: Tensor, params: Params) -> None:
        """Tries it on items x (B, *shape), with parameters of measured observations, before anything is trained.

        Raises:
            DiffemError: In one line, if it fails, or makes y of another shape than `observations` (without the batch).
        """
        name = self.config["name"] if self.config["name"] != "BlackBox" else self.config["function"]
        try:
            generator = torch.Generator().manual_seed(0)
            drawn = params or self.draw(len(x), tuple(x.shape[1:]), generator)
            y = self.apply(x, Asked(drawn, name), generator)
        except DiffemError:
            raise
        except Exception as error:
            raise DiffemError(f"corruption {name}: raised {type(error).__name__}: {error}") from error
        if not isinstance(y, Tensor):
            raise DiffemError(f"corruption {name}: gave {type(y).__name__} where a tensor is wanted")
        if tuple(y.shape) != (len(x), *observations):
            wanted = (len(x), *observations)
            raise DiffemError(f"corruption {name}: makes {tuple(y.shape)} of {len(x)} items, where y.npy has {wanted}")
        if y.is_complex() or not y.isfinite().all():
            raise DiffemError(f"corruption {name}: gave values that are not finite real numbers")

    # --- optional capabilities -----------------------------------------------------------------------

    def forward(self, x: Tensor, params: Params) -> Tensor:
        """A x."""
        raise NotImplementedError

    def adjoint(self, y: Tensor, params: Params) -> Tensor:
        """A^T y."""
        raise NotImplementedError

    def likelihood(self, y: Tensor, params: Params) -> Likelihood:
        """p(y | x) as a function of flattened items, for posteriors under Gaussian mixtures. Some corruptions give a
        Gaussian approximation: starts use it, and so does the reference of the denoiser, which its network corrects."""
        raise NotImplementedError

    def exact(self, shape: tuple[int, ...]) -> bool:
        """Whether :meth:`likelihood` can be used for items of `shape`."""
        return type(self).likelihood is not Corruption.likelihood

    def basis(self, shape: tuple[int, ...]) -> Basis | None:
        """The basis in which mixtures for items of `shape` are written; None: the entries themselves."""
        return None

    def thin(self, y: Tensor, params: Params, generator: torch.Generator) -> tuple[Observed, Observed] | None:
        """Splits each observation into two that are independent given x; None if that cannot be done."""
        return None

    @property
    def thins(self) -> bool:
        """Whether :meth:`thin` is implemented."""
        return type(self).thin is not Corruption.thin

    @property
    def predictable(self) -> bool:
        """Whether a hidden part of an observation can be predicted from the rest."""
        return self.thins

    def measured(self, x: Tensor, params: Params) -> Tensor:
        """P x: the part of every item that its observation measured, shape (B, *shape).

        With y = A x + N(0, s^2), and c the spread of the data, P = A^T (A A^T + (s / c)^2 I)^-1 A. Without noise it is
        the mask of a mask, and the projector onto the row space of a projection; for a blur with gains h it is
        h^2 / (h^2 + (s / c)^2) at each frequency. The M-step trusts this part of a reconstruction most. By default A is
        unknown, and everything counts as measured: P = I.

        Arguments:
            x: Items in model units, shape (B, *shape).
            params: Parameters of the observations of these items.
        """
        return x

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        """The inputs of the network that describe an observation: y, and every parameter that fits its shape."""
        fitting = [p.to(y) for p in params.values() if p.shape[0] == y.shape[0] and p.shape[2:] == y.shape[2:]]
        return [y, *fitting]

    def initial(self, y: Tensor, params: Params) -> Tensor:
        """A first reconstruction of y (B, *y shape), in the units of y, shape (B, *shape); by default y itself."""
        return y

    def interval(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of x, each (B, *shape), for entries of which y tells no more than these bounds.

        The start `observation` is drawn uniformly between them. They may be infinite. By default both are
        :meth:`initial`. An item at a bound gives the same observation again: EM that started there would stay there.
        """
        x = self.initial(y, params)
        return x, x

    def possible(self, x: Tensor) -> Tensor:
        """The possible items nearest to x (B, *shape); negative intensities become 0, for example."""
        return x

    def seen(self, y: Tensor, params: Params) -> Tensor:
        """Which entries of y carry information: a boolean tensor that broadcasts against y."""
        return torch.ones((1,) * y.ndim, dtype=torch.bool, device=y.device)

    def compared(self, y: Tensor) -> Tensor:
        """The coefficients of y in an orthonormal basis in which they are independent, shaped like y; y by default."""
        return y

    def entries(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Values comparable across observations with different parameters, and which of them were seen, both (B, d)."""
        return self.compared(y).flatten(1), self.seen(y, params).expand(y.shape).flatten(1)

    # --- units ---------------------------------------------------------------------------------------

    def apart(self, shape: tuple[int, ...]) -> bool:
        """Whether the channels of an item of `shape` (columns, if it is a vector) are observed separately from each
        other, so that each may have units of its own."""
        return False

    def scaled(self, units: Units) -> Corruption:
        """The same corruption for items in model units; its observations are scaled by :meth:`scale_y`."""
        return Scaled(self, units)

    def scale_params(self, params: Params, units: Units) -> Params:
        """Parameters in model units."""
        return params

    def scale_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        """Observations scaled to match items in model units; y and its parameters are in the units of the data."""
        return units.scale(y)

    def restore_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        """The inverse of :meth:`scale_y`."""
        return units.restore(y)


LARGEST_ITEM = 2**28  # numbers in an item whose size a file only states, a gigabyte
REGISTRY: dict[str, type[Corruption]] = {}
Kind = TypeVar("Kind", bound=type[Corruption])


def register_corruption(kind: Kind) -> Kind:
    """A decorator that registers a class under its name, so that observation folders and saved models may name it."""
    REGISTRY[kind.__name__] = kind
    return kind


class Scaled(Corruption):
    """A corruption in model units, computed by the inner corruption in the units of the data."""

    def __init__(self, inner: Corruption, units: Units) -> None:
        self.inner, self.units, self.by_entry = inner, units, inner.by_entry

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

    def with_file_parameters(self, parameters: Callable[[int, torch.Generator], Params]) -> Corruption:
        other = super().with_file_parameters(parameters)
        assert isinstance(other, Scaled)
        other.inner = self.inner.with_file_parameters(parameters)
        return other

    def exact(self, shape: tuple[int, ...]) -> bool:
        return self.inner.exact(shape)

    def likelihood(self, y: Tensor, params: Params) -> Likelihood:
        units, given = self.units, self.inner.likelihood(self.inner.restore_y(y, params, self.units), params)
        if isinstance(given, Diagonal) and given.basis is None:
            z = units.scale(given.z.view(y.shape)).flatten(1)
            deviation = units.scale_spread(given.precision.rsqrt().view(y.shape)).flatten(1).clamp(min=NOISE_FLOOR)
            return replace(given, z=z, precision=deviation.square().reciprocal())
        if isinstance(given, Rows) and not units.centre.ndim:
            left = given.y - given.matrix.sum(-1) * float(units.centre)
            return replace(given, y=left, matrix=given.matrix * float(units.half))
        kind = type(self.inner).__name__
        raise DiffemError(
            f"{kind}: its likelihood must be Diagonal without a basis, or Rows of columns that share their units"
        )

    def possible(self, x: Tensor) -> Tensor:
        if type(self.inner).possible is Corruption.possible:
            return x  # without rounding
        return self.units.scale(self.inner.possible(self.units.restore(x)))

    def measured(self, x: Tensor, params: Params) -> Tensor:
        return self.inner.measured(x, params)

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        return self.inner.condition(y, params)

    def initial(self, y: Tensor, params: Params) -> Tensor:
        return self.units.scale(self.inner.initial(self.inner.restore_y(y, params, self.units), params))

    def interval(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """The bounds of the inner corruption; infinite ones are replaced by the ends of the range of the data."""
        ends = self.inner.interval(self.inner.restore_y(y, params, self.units), params)
        low, high = (self.units.scale(end) for end in ends)
        return torch.where(low.isinf(), high.clamp(max=-1), low), torch.where(high.isinf(), low.clamp(min=1), high)

    def seen(self, y: Tensor, params: Params) -> Tensor:
        return self.inner.seen(y, params)

    def compared(self, y: Tensor) -> Tensor:
        return self.inner.compared(y)

    def entries(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return self.inner.entries(y, params)
