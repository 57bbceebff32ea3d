"""The one exception that users are meant to see: one line that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class DiffemError(Exception):
    """Something that the user can put right. The command line prints it on one line and exits with status 2."""


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' if one of the known names is close, and the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def optional(module: str, extra: str) -> Any:
    """A module that only an extra of this package brings; without it one line that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise DiffemError(f"{name} is not installed: pip install 'diffem-torch[{extra}]'") from None
