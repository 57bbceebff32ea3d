"""Files of named tensors (safetensors) with a checksum: one that was truncated or altered is not taken for a model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from diffem import files, reading
from diffem.errors import DiffemError

LARGEST_HEADER = 2**24  # bytes: names of tensors, and the state of a run


class Damaged(DiffemError):
    """A file is not what was written."""


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The CRC-32 of names, shapes, types and values, and of a text: about one second for a gigabyte."""
    found = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def save(file: Path, tensors: Mapping[str, Tensor], text: str = "", keep: Path | None = None) -> None:
    """Replaces a file atomically; `text` is kept with the tensors, and the file that was there as `keep`."""
    # clones: tensors that share memory cannot be written
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    about = {"checksum": checksum(tensors, text), **({"diffem": text} if text else {})}
    files.replace(file, serialise(tensors, metadata=about), keep)


def load(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the text that was kept with them.

    Raises:
        Damaged: If the file is not complete, or differs from its checksum. Files of other programs have none.
    """
    try:
        with open(reading.regular(file), "rb") as stream:
            if int.from_bytes(stream.read(8), "little") > LARGEST_HEADER:
                raise ValueError(f"its header is larger than {LARGEST_HEADER:,} bytes")
        with safe_open(file, "pt") as stream:
            about = stream.metadata() or {}
            tensors = {k: stream.get_tensor(k) for k in stream.keys()}  # noqa: SIM118
        text = about.get("diffem", "")
        found = checksum(tensors, text)
    except (SafetensorError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise Damaged(f"{file}: is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if about.get("checksum", found) != found:
        raise Damaged(f"{file}: is damaged: its checksum is another one")
    return tensors, text
