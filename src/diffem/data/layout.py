"""Converts users' arrays to the layout of models, real numbers (N, features) or (N, channels, *spatial), and back.

A layout is a word with one letter for each axis of y, as it was saved:

    N         the observations; always first
    C or F    channels, features, or columns
    D H W T   places: depth, height, width, time

`NF` means rows of a table, `NTF` time series of several quantities, `NT` of one, `NHW` images of one channel, `NHWC`
images with channels last, `NCDHW` volumes. Complex numbers become pairs of real channels: channel c becomes
channels 2 c (real part) and 2 c + 1 (imaginary part). Results are returned in the layout of the input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

CHANNELS, PLACES = "CF", "DHWT"
LIKE_Y = ("mask", "noise")  # parameters that broadcast against y
USUAL = {2: "NF", 3: "NCT", 4: "NCHW", 5: "NCDHW"}  # the layouts of models, by number of axes
FEW = 4  # (N, A, B) without a stated layout: A channels if A is at most this, else images of one channel


class Layout:
    """The layout of observations and of their items.

    Arguments:
        axes: The word; see the module docstring.
        complex: Whether the values are complex numbers.

    Raises:
        DiffemError: If `axes` is not such a word.
    """

    def __init__(self, axes: str, complex: bool = False) -> None:
        if not isinstance(complex, bool):
            raise DiffemError(f"axes: whether values are complex must be true or false, got {complex!r}")
        letters = str(axes).upper()
        known = set("N" + CHANNELS + PLACES)
        channels = [c for c in letters if c in CHANNELS]
        if letters[:1] != "N" or len(letters) < 2 or set(letters) - known or len(set(letters)) < len(letters):
            raise DiffemError(
                f"axes: must be N and then, once each, C or F for channels and D, H, W, T for places, e.g. NHWC, NTF, NF, got {axes!r}"
            )
        if len(channels) > 1:
            raise DiffemError(f"axes: {axes}: C and F are both channels; name one of them")
        self.axes, self.complex = letters, complex
        at = letters.find(channels[0]) - 1 if channels else None
        places = [i for i, letter in enumerate(letters[1:]) if letter in PLACES]
        self.added = at is None  # models get an additional axis of one channel
        self.order = places if at is None else [at, *places]

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: str | None = None, complex: bool = False) -> Layout:
        """The layout of an array (N, ...): that stated by the user, else guessed from its shape.

        Raises:
            DiffemError: If there are more or fewer axes than letters.
        """
        if axes is None:
            images = len(shape) == 3 and shape[1] > FEW
            if len(shape) not in USUAL:
                raise DiffemError(f"y.npy: shape {shape} has {len(shape)} axes; say what they are, e.g. `axes: NCHW`")
            axes = "NHW" if images else USUAL[len(shape)]
        layout = cls(axes, complex)
        if len(layout.axes) != len(shape):
            raise DiffemError(f"axes: {axes} has {len(layout.axes)} letters where y.npy has {len(shape)} axes, {shape}")
        return layout

    @classmethod
    def usual(cls, axes: int) -> Layout:
        """The layout of models, for arrays with this many axes."""
        return cls(USUAL[axes])

    def of_items(self, shape: tuple[int, ...], complex: bool) -> Layout:
        """The layout of items that have `shape` in models: this one if they have as many axes, else that of models."""
        same = len(shape) + 1 == len(self.axes) + self.added and not (self.added and shape[0] > 1 + complex)
        return Layout(self.axes if same else USUAL[len(shape) + 1], complex)

    @property
    def trivial(self) -> bool:
        """Whether the layout is that of models, so that arrays need no conversion."""
        return not self.complex and not self.added and self.order == sorted(self.order)

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in models of an item of shape `of`."""
        shape = ([1] if self.added else []) + [of[i] for i in self.order]
        return (shape[0] * (1 + self.complex), *shape[1:])

    def users(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, in this layout, of an item that has `shape` in models."""
        return tuple(self.to_user(np.broadcast_to(np.float32(0), (1, *shape))).shape[1:])

    @property
    def config(self) -> list:
        """The arguments that rebuild it, ready for JSON."""
        return [self.axes, self.complex]

    def like_y(self, name: str, array: Any) -> bool:
        """Whether a parameter has the layout of y: it has as many axes, and is mask, noise, or complex."""
        return array.ndim == len(self.axes) and (name in LIKE_Y or _is_complex(array))

    def observed(self, y: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Observations and their parameters, in the layout of models.

        Raises:
            DiffemError: If y has a different number of axes.
        """
        if y.ndim != len(self.axes):
            raise DiffemError(f"y: has shape {tuple(y.shape)}, where the model's observations are {self.axes}")
        return self.to_model(y), {k: self.to_model(v) if self.like_y(k, v) else v for k, v in params.items()}

    @property
    def dtype(self) -> type:
        """The dtype of items in this layout."""
        return np.complex64 if self.complex else np.float32

    def to_model(self, x: Any) -> Any:
        """Converts an array or tensor, whose last axes are those of an item, from this layout to that of models."""
        lead = x.ndim - len(self.order)
        x = _permuted(x, [*range(lead), *(lead + i for i in self.order)])
        if self.added:
            x = x[(*(slice(None),) * lead, None)]
        if not self.complex:
            return x
        if not _is_complex(x):  # e.g. a mask: holds for both parts of a number; an axis of one channel stays one
            both = 1 if x.shape[lead] == 1 else 2
            return x.repeat_interleave(both, lead) if isinstance(x, Tensor) else x.repeat(both, lead)
        parts = (
            torch.stack([x.real, x.imag], lead + 1) if isinstance(x, Tensor) else np.stack([x.real, x.imag], lead + 1)
        )
        return parts.reshape(*x.shape[:lead], -1, *x.shape[lead + 1 :])

    def to_user(self, x: Any) -> Any:
        """The inverse of :meth:`to_model`."""
        lead = x.ndim - len(self.order) - self.added
        if self.complex:
            pairs = x.reshape(*x.shape[:lead], -1, 2, *x.shape[lead + 1 :])
            real, imaginary = (pairs[(*(slice(None),) * (lead + 1), k)] for k in (0, 1))
            x = torch.complex(real, imaginary) if isinstance(x, Tensor) else real + 1j * imaginary
        if self.added:
            x = x[(*(slice(None),) * lead, 0)]
        back = np.argsort(self.order).tolist()
        return _permuted(x, [*range(lead), *(lead + i for i in back)])


def _is_complex(x: Any) -> bool:
    return x.is_complex() if isinstance(x, Tensor) else x.dtype.kind == "c"


def _permuted(x: Any, order: list[int]) -> Any:
    return x.permute(order) if isinstance(x, Tensor) else x.transpose(order)


class Seen:
    """A view of an array (N, ...) in the layout of models; only the rows that are read are converted.

    Arguments:
        array: The user's array.
        layout: Its layout.
    """

    def __init__(self, array: np.ndarray, layout: Layout) -> None:
        self.array, self.layout = array, layout
        self.shape = (len(array), *layout.to_model(array[:1]).shape[1:])
        self.ndim, self.dtype = len(self.shape), np.empty(0, array.dtype).real.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.layout.to_model(self.array[rows])
