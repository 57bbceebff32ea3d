"""diffem import"""

from __future__ import annotations

import argparse

from diffem.cli.console import say
from diffem.cli.words import options
from diffem.corruptions import from_config
from diffem.data.readers.importing import import_files
from diffem.data.readers.source import Options
from diffem.errors import DiffemError


def run(arguments: argparse.Namespace) -> None:
    given = options(arguments.rest, "import")
    if given and arguments.name is None:
        raise DiffemError(
            f"diffem import: --{next(iter(given))}: unknown option; arguments of a corruption need --name"
        )
    corruption = from_config({"name": arguments.name, **given}, "diffem import") if arguments.name else None
    asked = Options(arguments.patch, arguments.hdu, arguments.slices, arguments.columns, arguments.axes)
    imported = import_files(arguments.source, arguments.out, asked, corruption, arguments.range, arguments.overwrite)
    if imported.left_out:
        say(f"left out: {', '.join(imported.left_out[:8])}{', ...' if len(imported.left_out) > 8 else ''}")
    say(f"{imported}, in {arguments.out}")
