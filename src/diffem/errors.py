"""The only exception meant for users: one line that says what is wrong and how to correct it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class DiffemError(Exception):
    """An error that the user can correct. The command line prints it on one line and exits with status 2."""


def suggest(name: str, known: Iterable[str]) -> str:
    """' did you mean ...?' if one of the known names is close, and the list of all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def optional(module: str, extra: str) -> Any:
    """Imports a module of an optional extra; if it is missing, the error says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing(module.partition(".")[0], extra) from None


def missing(package: str, extra: str) -> DiffemError:
    """The error that says which extra brings a package."""
    return DiffemError(f"{package} is not installed: pip install 'diffem-torch[{extra}]'")
