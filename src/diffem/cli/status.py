"""diffem status"""

from __future__ import annotations

import argparse
import json

from diffem.cli.console import say
from diffem.watch import status


def run(arguments: argparse.Namespace) -> None:
    found = status(arguments.run)
    say(json.dumps(found.to_dict()) if arguments.json else str(found))
