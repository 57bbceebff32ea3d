"""Words of the command line that argparse does not know: settings, and the arguments of a corruption."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from diffem.config import Config
from diffem.errors import DiffemError


def overrides(rest: Sequence[str], command: str = "train") -> list[tuple[str, str]]:
    """Parses settings, `--section.field value`."""
    for word in rest:  # first, since argparse may have taken the value of an unknown option for something else
        if word.startswith("--") and "." not in (key := word[2:].partition("=")[0]):
            raise DiffemError(f"diffem {command}: --{key}: unknown option;{_meant(key)}")
    return list(options(rest, command, "settings are written --section.field value").items())


def options(rest: Sequence[str], command: str, otherwise: str = "options are written --name value") -> dict[str, str]:
    """Parses words `--name value` or `--name=value`."""
    found, words = {}, list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise DiffemError(f"diffem {command}: {word}: not understood; {otherwise}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise DiffemError(f"diffem {command}: --{key}: needs a value")
            value = words.pop(0)
        found[key] = value
    return found


def _meant(name: str) -> str:
    """A hint at the settings that an unknown option may mean."""
    settings = [f"{section}.{field}" for section, fields in Config().to_dict().items() for field in fields]
    exact = [setting for setting in settings if setting.endswith(f".{name.replace('-', '_')}")]
    close = exact or difflib.get_close_matches(name, settings, n=3, cutoff=0.7)
    return f" did you mean --{' or --'.join(close)}?" if close else " settings are written --section.field value"
