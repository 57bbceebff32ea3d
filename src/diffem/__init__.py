"""diffem: a posterior sampler and a prior from corrupted observations alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffem.em import DiffEM
    from diffem.errors import DiffemError
    from diffem.observations import Observations
    from diffem.posteriors import from_pretrained

__version__ = "0.1.0"
__all__ = ["DiffEM", "DiffemError", "Observations", "from_pretrained"]

_HOME = {"DiffEM": "em", "DiffemError": "errors", "Observations": "observations", "from_pretrained": "posteriors"}


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `import diffem` is quick.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"diffem.{_HOME[name]}"), name)
    raise AttributeError(f"module 'diffem' has no attribute {name!r}")
