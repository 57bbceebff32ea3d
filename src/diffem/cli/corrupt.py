"""diffem corrupt"""

from __future__ import annotations

import argparse

from diffem.clean import datasets
from diffem.cli.console import say
from diffem.cli.models import own_corruption
from diffem.cli.words import options
from diffem.corruptions import Corruption, from_config
from diffem.errors import DiffemError


def run(arguments: argparse.Namespace) -> None:
    corruption, given = own_corruption(arguments), options(arguments.rest, "corrupt")
    if isinstance(corruption, Corruption):
        if given:
            raise DiffemError(f"diffem corrupt: --{next(iter(given))}: a function takes no arguments")
    else:
        name = arguments.name if corruption is None else corruption.__name__
        corruption = from_config({"name": name, **given}, "diffem corrupt")
    made = datasets.corrupt(
        arguments.source,
        corruption,
        arguments.out,
        arguments.root,
        arguments.limit,
        arguments.seed,
        arguments.keep_clean,
    )
    say(f"{len(made)} observations of shape {tuple(made.y.shape[1:])} in {arguments.out}")
