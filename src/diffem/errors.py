"""The only exception meant for users: one line that says what is wrong and how to correct it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from diffem import __version__


class DiffemError(Exception):
    """An error that the user can correct. The command line prints it on one line and exits with status 2."""


class ToldElsewhere(DiffemError):
    """An error that another process of the run prints."""


def suggest(name: str, known: Iterable[str]) -> str:
    """' did you mean ...?' if one of the known names is close, and the list of all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def unreadable(version: object) -> str:
    """Words for what the present version cannot read, where `version` is noted in it."""
    if version == __version__:
        return "is damaged, or was changed by hand"
    known = isinstance(version, str) and 0 < len(version) < 32
    return (
        f"was saved by {f'diffem {version}' if known else 'another version of diffem'}, which {__version__} cannot read"
    )


def printable(text: str) -> str:
    """Text in which control characters, and those that hide or reorder others, are written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def optional(module: str, extra: str) -> Any:
    """Imports a module of an optional extra; if it is missing, the error says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing(module.partition(".")[0], extra) from None


def missing(package: str, extra: str) -> DiffemError:
    """The error that says which extra brings a package."""
    return DiffemError(f"{package} is not installed: pip install 'diffem-torch[{extra}]'")


class Stopped(BaseException):
    """A run was stopped by a signal, and has saved its state. No `except Exception` may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number
