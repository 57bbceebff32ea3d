"""Any function x -> y."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Asked, Corruption, Params

GENERATORS = ("generator", "rng", "seed")  # an argument of such a name is no parameters


class BlackBox(Corruption):
    """Any function x -> y; it only has to be callable.

    Arguments:
        function: f(x), f(x, params) or f(x, params, generator): takes a batch x (B, *shape) in the units of the data,
            on the CPU, and the parameters of its observations by name, and returns B observations. It may draw from the
            generator, or from the global generators of torch, numpy and random, which are seeded for the call.
        name: Where the function is found: 'package.module:function'; by default the function's own name.
        clip: Items are clamped to (low, high) before the function is called, e.g. if it expects counts.

    Raises:
        DiffemError: From :meth:`apply`, in one line that names the function, if it raises, or does not return B
            observations of finite real numbers.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        name: str | None = None,
        clip: tuple[float, float] | None = None,
    ) -> None:
        self.function, self.path, self.clip = function, name or getattr(function, "__name__", "function"), clip
        places = _positional(function)
        self.arguments = max(sum(p.default is p.empty for p in places), 1)  # that it needs
        if not 1 <= self.arguments <= 3:
            raise DiffemError(
                f"corruption {self.path}: must be f(x), f(x, params) or f(x, params, generator), takes {self.arguments}"
            )
        if self.arguments == 2 and any(word in places[1].name for word in GENERATORS):
            raise DiffemError(
                f"corruption {self.path}: its second argument is given the parameters; write f(x, params, {places[1].name})"
            )
        self.parameters = () if self.arguments == 1 else None

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
                x_cpu = (x if self.clip is None else x.clamp(*self.clip)).cpu()
                asked = Asked({k: v.cpu() for k, v in params.items()}, self.path)
                given = x_cpu, asked, torch.Generator().manual_seed(seed)
                y = self.function(*given[: self.arguments])
            except DiffemError:
                raise
            except (Exception, SystemExit) as error:
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


def _positional(function: Callable) -> list[inspect.Parameter]:
    """The positional arguments of a function; none where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins
        return []
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
