"""How people's arrays lie, and how models see them: (N, features), or (N, channels, *spatial) of real numbers.

A layout is a word with one letter for each axis of y, as it was saved:

    N         the observations; always first
    C or F    channels, features, or columns
    D H W T   what lies beside each other: depth, height, width, time

`NF` are the rows of a table, `NTF` time series of several quantities, `NT` of one, `NHW` images of one channel, `NHWC` images with
their channels last, `NCDHW` volumes. Complex numbers become real channels: of channel c, channel 2 c is the real and 2 c + 1 the
imaginary part. What a user gets lies as what was given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

CHANNELS, PLACES = "CF", "DHWT"
LIKE_Y = ("mask", "noise")  # parameters that broadcast against y
USUAL = {2: "NF", 3: "NCT", 4: "NCHW", 5: "NCDHW"}  # as models see them
FEW = 4  # a lone (N, A, B) has A channels up to this many, and is images of one channel beyond


class Layout:
    """The layout of observations and of their items.

    Arguments:
        axes: Such a word.
        complex: Whether the values are complex numbers.

    Raises:
        DiffemError: If it is not such a word.
    """

    def __init__(self, axes: str, complex: bool = False) -> None:
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
        self.added = at is None  # an axis of one channel
        self.order = places if at is None else [at, *places]

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: str | None = None, complex: bool = False) -> Layout:
        """The layout of an array (N, ...): what the user says, or else what its number of axes suggests.

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
        """The layout of arrays with this many axes that models see as they are."""
        return cls(USUAL[axes])

    def of_items(self, shape: tuple[int, ...], complex: bool) -> Layout:
        """The layout of items that models see in `shape`: this one where they have as many axes, else the usual one."""
        same = len(shape) + 1 == len(self.axes) + self.added and not (self.added and shape[0] > 1 + complex)
        return Layout(self.axes if same else USUAL[len(shape) + 1], complex)

    @property
    def trivial(self) -> bool:
        """Whether models see the arrays as they are."""
        return not self.complex and not self.added and self.order == sorted(self.order)

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that models see, of an item of shape `of`."""
        shape = ([1] if self.added else []) + [of[i] for i in self.order]
        return (shape[0] * (1 + self.complex), *shape[1:])

    def users(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a user sees of an item that models see in `shape`."""
        return tuple(self.to_user(np.broadcast_to(np.float32(0), (1, *shape))).shape[1:])

    @property
    def config(self) -> list:
        """What rebuilds it, ready for JSON."""
        return [self.axes, self.complex]

    def like_y(self, name: str, array: Any) -> bool:
        """Whether a parameter lies like y: a mask, noise, or what is complex, too."""
        return array.ndim == len(self.axes) and (name in LIKE_Y or _is_complex(array))

    def observed(self, y: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Observations and their parameters, as models see them.

        Raises:
            DiffemError: If y has other axes.
        """
        if y.ndim != len(self.axes):
            raise DiffemError(f"y: has shape {tuple(y.shape)}, where the model's observations are {self.axes}")
        return self.to_model(y), {k: self.to_model(v) if self.like_y(k, v) else v for k, v in params.items()}

    @property
    def dtype(self) -> type:
        """Of items, as a user sees them."""
        return np.complex64 if self.complex else np.float32

    def to_model(self, x: Any) -> Any:
        """From the user's axes to those of models: an array or a tensor, whose last axes are those of an item."""
        lead = x.ndim - len(self.order)
        x = _permuted(x, [*range(lead), *(lead + i for i in self.order)])
        if self.added:
            x = x[(*(slice(None),) * lead, None)]
        if not self.complex:
            return x
        if not _is_complex(x):  # what is said of a number is said of both parts; one number for all channels stays one
            both = 1 if x.shape[lead] == 1 else 2
            return x.repeat_interleave(both, lead) if isinstance(x, Tensor) else x.repeat(both, lead)
        parts = (
            torch.stack([x.real, x.imag], lead + 1) if isinstance(x, Tensor) else np.stack([x.real, x.imag], lead + 1)
        )
        return parts.reshape(*x.shape[:lead], -1, *x.shape[lead + 1 :])

    def to_user(self, x: Any) -> Any:
        """Back again."""
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
    """An array (N, ...) as models see it, of which only the rows that are read are rearranged.

    Arguments:
        array: As the user gave it.
        layout: How it lies.
    """

    def __init__(self, array: np.ndarray, layout: Layout) -> None:
        self.array, self.layout = array, layout
        self.shape = (len(array), *layout.to_model(array[:1]).shape[1:])
        self.ndim, self.dtype = len(self.shape), np.empty(0, array.dtype).real.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.layout.to_model(self.array[rows])
