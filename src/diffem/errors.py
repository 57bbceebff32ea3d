"""The one exception that users are meant to see: one line that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffemError(Exception):
    """Something that the user can put right. The command line prints it on one line and exits with status 2."""


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' if one of the known names is close, and the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"
