"""What a corruption is, and what more it may offer.

A corruption needs one method: :meth:`Corruption.apply` draws observations of clean items. The others are capabilities, each used
where it is there. Shapes: x is (B, *shape) with shape = (features,) or (channels, *spatial). Parameters are a dictionary of
tensors with the batch first, under the names of the files of an observation folder (mask, matrix, ...). Noise is a standard
deviation in the units of y.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError
from diffem.mixtures import Basis, Likelihood
from diffem.units import Units

Params = dict[str, Tensor]
Observed = tuple[Tensor, Params]  # observations (B, *y shape), and their parameters


class Corruption:
    """How clean becomes observed.

    Attributes:
        noise: The standard deviation of the noise, where it is Gaussian: a number, one for each channel or column, or None if
            it is a parameter, noise.npy.
        linear: Whether y = A x + N(0, noise^2): then :meth:`forward` and :meth:`adjoint` are there.
        diagonal: Whether A is diagonal in an orthonormal basis that is the same for all observations.
        by_entry: Whether an entry of y depends on the same entry of x only.
        same_units: Whether y is in the units of x, as weighted means of its entries are.
        parameters: The names of its parameters, which stand beside y.npy as NAME.npy; None for any names.
        complex_items: Whether items are complex numbers where the observations are.
        instead: For parameters that it does not take, the name of a corruption that does.
        measured_parameters: Gives the parameters of new observations (:meth:`with_measured`); None for the formula :meth:`draw`.
    """

    noise: float | tuple[float, ...] | Tensor | None = 0.0
    linear = False
    diagonal = False
    by_entry = False
    same_units = True
    parameters: tuple[str, ...] | None = None
    complex_items = True
    instead: Mapping[str, str] = {}
    measured_parameters: Callable[[int, torch.Generator], Params] | None = None

    # --- what it is ----------------------------------------------------------------------------------

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        """Parameters of n observations of items of `shape`, by a formula; by default there are none."""
        return {}

    def new_parameters(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        """Parameters of n new observations: those of measured ones where they are known, else by the formula."""
        if self.measured_parameters is None:
            return self.draw(n, shape, generator)
        return self.measured_parameters(n, generator)

    def with_measured(self, parameters: Callable[[int, torch.Generator], Params]) -> Corruption:
        """The same corruption, whose new observations take their parameters from `parameters(n, generator)`."""
        other = copy.copy(self)
        other.measured_parameters = parameters
        return other

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        """One draw from Q(. | x, params), noise included; x (B, *shape) in the units of the data."""
        raise NotImplementedError

    def observe(self, x: Tensor, generator: torch.Generator) -> Observed:
        """Observations of items x (B, *shape) with parameters of their own, and those."""
        params = self.new_parameters(len(x), tuple(x.shape[1:]), generator)
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
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"name": name, **{k: v for k, v in plain.items() if isinstance(v, int | float | str | list)}}

    @property
    def law(self) -> dict[str, object]:
        """What a posterior is trained for: the config, but for what only says how parameters are drawn."""
        return self.config

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an item; `shape` is what the user said, or that of y.

        Raises:
            DiffemError: If the parameters are not those that it needs, naming the file.
        """
        return shape

    def rehearse(self, observations: tuple[int, ...], x: Tensor, params: Params) -> None:
        """Tries it on items x (B, *shape), with parameters of measured observations, before anything is trained.

        Raises:
            DiffemError: In one line, if it fails, or makes something else than `observations`, the shape of y without the batch.
        """
        name = self.config["name"] if self.config["name"] != "BlackBox" else self.config["function"]
        try:
            generator = torch.Generator().manual_seed(0)
            drawn = params or self.draw(len(x), tuple(x.shape[1:]), generator)
            y = self.apply(x, drawn, generator)
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

    def exact(self, shape: tuple[int, ...]) -> bool:
        """Whether :meth:`likelihood` is there, for items of `shape`."""
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
        return self.thins

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

    def initial(self, y: Tensor, params: Params) -> Tensor:
        """A first reconstruction of observations y (B, *y shape), in the units of y: shape (B, *shape). By default it is y."""
        return y

    def interval(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """The ends of where x lies, each (B, *shape), where y says no more than that: the start `observation` is drawn between them,
        uniformly. They may be infinite. By default both are :meth:`initial`.

        An item at the end of its interval makes the same observation again: EM that started there would stay there.
        """
        x = self.initial(y, params)
        return x, x

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

    def apart(self, shape: tuple[int, ...]) -> bool:
        """Whether the channels of an item of `shape` (its columns, if it is a vector) are observed apart from each other, so
        that each may have units of its own."""
        return False

    def scaled(self, units: Units) -> Corruption:
        """The same corruption of items in model units, whose observations are those of :meth:`scale_y`."""
        return Scaled(self, units)

    def scale_params(self, params: Params, units: Units) -> Params:
        """Parameters in model units."""
        return params

    def scale_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        """An observation in the units in which its item is in model units; its parameters are in those of the data."""
        return units.scale(y)

    def restore_y(self, y: Tensor, params: Params, units: Units) -> Tensor:
        """What :meth:`scale_y` was given."""
        return units.restore(y)


REGISTRY: dict[str, type[Corruption]] = {}
Kind = TypeVar("Kind", bound=type[Corruption])


def register_corruption(kind: Kind) -> Kind:
    """Registers a class under its name: folders and saved models may name it. A decorator."""
    REGISTRY[kind.__name__] = kind
    return kind


class Scaled(Corruption):
    """A corruption in model units. What it is asked for is done in the units of the data."""

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

    def with_measured(self, parameters: Callable[[int, torch.Generator], Params]) -> Corruption:
        other = super().with_measured(parameters)
        assert isinstance(other, Scaled)
        other.inner = self.inner.with_measured(parameters)
        return other

    def measured(self, x: Tensor, params: Params) -> Tensor:
        return self.inner.measured(x, params)

    def condition(self, y: Tensor, params: Params) -> list[Tensor]:
        return self.inner.condition(y, params)

    def initial(self, y: Tensor, params: Params) -> Tensor:
        return self.units.scale(self.inner.initial(self.inner.restore_y(y, params, self.units), params))

    def interval(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Those of the corruption; those of the range of the data where they are infinite."""
        ends = self.inner.interval(self.inner.restore_y(y, params, self.units), params)
        low, high = (self.units.scale(end) for end in ends)
        return torch.where(low.isinf(), high.clamp(max=-1), low), torch.where(high.isinf(), low.clamp(min=1), high)

    def seen(self, y: Tensor, params: Params) -> Tensor:
        return self.inner.seen(y, params)

    def compared(self, y: Tensor) -> Tensor:
        return self.inner.compared(y)

    def entries(self, y: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return self.inner.entries(y, params)
