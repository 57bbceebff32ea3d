"""Operators of deepinv as corruptions (extra `physics`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Corruption, Observed, Params
from .blackbox import BlackBox
from .linear import LinearCorruption

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics, Physics
    from deepinv.physics.generator import PhysicsGenerator


def from_deepinv(physics: Physics, generator: PhysicsGenerator | None = None) -> Corruption:
    """A `deepinv.physics.Physics` as a corruption.

    A linear operator with Gaussian noise, or none, offers all that :class:`LinearCorruption` does. Any other is a function that can
    be called. Parameters of the operator are files beside y.npy, under their names in deepinv (`mask.npy`, `filter.npy`, ...).

    Arguments:
        physics: The operator, with its noise model.
        generator: Draws parameters for new observations where there are no files.
    """
    from deepinv.physics import GaussianNoise, LinearPhysics, ZeroNoise

    probe, noise = torch.linspace(-1, 1, 8).view(1, 8), physics.noise_model
    if (
        isinstance(physics, LinearPhysics)
        and isinstance(noise, GaussianNoise | ZeroNoise)
        and torch.equal(physics.sensor(probe), probe)
    ):
        levels = torch.as_tensor(getattr(noise, "sigma", 0.0)).flatten()
        if len(levels) != 1:
            raise DiffemError(
                f"corruption {_name(physics)}: give the noise of each item as noise.npy, not in its noise model"
            )
        return DeepinvLinear(physics, float(levels), generator)
    return DeepinvFunction(physics, generator)


class DeepinvLinear(LinearCorruption):
    """A linear operator of deepinv with Gaussian noise; see :func:`from_deepinv`.

    Arguments:
        physics: The operator.
        noise: The standard deviation of the noise; None if it is a parameter, noise.npy.
        generator: Draws parameters.
    """

    aligned = False

    def __init__(
        self, physics: LinearPhysics, noise: float | None = None, generator: PhysicsGenerator | None = None
    ) -> None:
        super().__init__(noise)
        self.physics, self.generator = physics.clone(), generator
        if hasattr(self.physics, "adjoint_via_backprop"):
            setattr(self.physics, "adjoint_via_backprop", True)  # noqa: B010 - else autograd, too, gives the approximate adjoint
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.parameters = tuple({"mask": 0, "noise": 0} | dict.fromkeys(_own(physics)))

    @property
    def config(self) -> dict[str, object]:
        stated = (
            {} if self.noise is None else {"noise": list(self.noise) if isinstance(self.noise, tuple) else self.noise}
        )
        return {"name": _name(self.physics), **stated}

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        return _drawn(self.generator, n, generator)

    def A(self, x: Tensor, params: Params) -> Tensor:
        return _called(self.physics, "A", x, params)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        # by autograd: not all adjoints of deepinv are exact
        shape = self.item_shape(tuple(y.shape[1:]))
        with torch.enable_grad():
            x = torch.zeros(len(y), *shape, dtype=y.dtype, device=y.device, requires_grad=True)
            image = self.A(x, params)
        return torch.autograd.grad(image, x, y, create_graph=y.requires_grad)[0]

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape not in self._shapes:
            self._shapes[shape] = tuple(_called(self.physics, "A_adjoint", torch.zeros(1, *shape), {}).shape[1:])
        return self._shapes[shape]

    def thin(self, y: Tensor, params: Params, generator: torch.Generator) -> tuple[Observed, Observed] | None:
        mask = _own(self.physics).get("mask")
        if "mask" not in params and mask is not None:  # the same for all observations
            params = {**params, "mask": mask.to(y).expand(len(y), *mask.shape[1:])}
        return super().thin(y, params, generator)

    def hidden(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        return super().hidden(mask[:, :1], generator)  # real and imaginary parts together


class DeepinvFunction(BlackBox):
    """Any operator of deepinv, with its noise; see :func:`from_deepinv`."""

    def __init__(
        self, physics: Physics, generator: PhysicsGenerator | None = None, clip: tuple[float, float] | None = None
    ) -> None:
        super().__init__(lambda x, params: _called(physics, "forward", x, params), _name(physics), clip)
        self.generator = generator
        self.parameters = tuple(_own(physics))

    def draw(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Params:
        return _drawn(self.generator, n, generator)


def _name(physics: Physics) -> str:
    return f"deepinv.{type(physics).__name__}"


def _own(physics: Physics) -> Mapping[str, Tensor | None]:
    """The parameters of an operator, by name; those of its noise are not. deepinv also calls singular values a mask."""
    found = {name: value for name, value in physics._buffers.items() if not name.startswith("_")}
    mask = found.get("mask")
    if mask is not None and (not mask.ndim or mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all())):
        del found["mask"]
    return found


def _called(physics: Physics, method: str, x: Tensor, params: Params) -> Tensor:
    """Calls a method with these parameters. deepinv keeps what it was given last, so that its own are put back."""
    physics = physics.to(x.device)
    before = {name: value for name, value in _own(physics).items() if name in params}
    given = {name: params[name].to(x if value is None else value) for name, value in before.items()}
    try:
        return getattr(physics, method)(x, **given)
    finally:
        for name, value in before.items():
            setattr(physics, name, value)


def _drawn(generator: PhysicsGenerator | None, n: int, ours: torch.Generator) -> Params:
    if generator is None:
        return {}
    seed = int(torch.randint(2**31, (), generator=ours, device=ours.device))
    drawn: dict[str, Any] = generator.step(batch_size=n, seed=seed)
    return {name: value.to(ours.device) for name, value in drawn.items() if isinstance(value, Tensor)}
