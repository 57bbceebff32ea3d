"""JPEG compression, simulated by the codec itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffem.errors import DiffemError

from .base import Corruption, Params, register_corruption
from .entrywise import CHECKED


@register_corruption
class JPEG(Corruption):
    """Images of 1 or 3 channels, with values from 0 to 255, that JPEG has compressed and decompressed.

    Arguments:
        quality: 1 to 95, or [least, largest]: then the quality differs between images, and is not known.
    """

    parameters = ()

    def __init__(self, quality: int | Sequence[int]) -> None:
        ends = list(quality) if isinstance(quality, Sequence) else [quality, quality]
        if len(ends) != 2 or any(q != int(q) for q in ends) or not 1 <= ends[0] <= ends[1] <= 95:
            raise DiffemError(f"JPEG: quality must be from 1 to 95, or [least, largest], got {quality}")
        self.low, self.high = (int(q) for q in ends)
        self.quality = self.low if self.low == self.high else (self.low, self.high)

    def check(self, y: np.ndarray, params: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
        some = np.asarray(y[:CHECKED], np.float64)
        wrong = some[(some != np.rint(some)) | (some < 0) | (some > 255)]
        if wrong.size:
            raise DiffemError(f"y.npy: holds {wrong[0]:g}; JPEG makes whole numbers from 0 to 255")
        return shape

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise DiffemError(f"JPEG: items must be images of 1 or 3 channels, got shape {tuple(x.shape[1:])}")
        drawn = torch.randint(self.low, self.high + 1, (len(x),), generator=generator, device=generator.device)
        pixels = x.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()
        found = [_compressed(image, quality) for image, quality in zip(pixels, drawn.tolist(), strict=True)]
        return torch.from_numpy(np.stack(found)).movedim(-1, 1).to(x)


def _compressed(image: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image  # here, so that `import diffem` is quick

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).reshape(image.shape)
