"""diffem push"""

from __future__ import annotations

import argparse

from diffem.cli.console import say
from diffem.cli.models import model


def run(arguments: argparse.Namespace) -> None:
    say(model(arguments, "posterior").push_to_hub(arguments.name, private=arguments.private))
