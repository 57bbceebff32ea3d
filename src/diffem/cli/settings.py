"""diffem settings"""

from __future__ import annotations

import argparse
import json

from diffem.cli.console import say
from diffem.config import described


def run(arguments: argparse.Namespace) -> None:
    for name, default, words in described():
        say(f"--{name} {json.dumps(default)}\n    {words}")
