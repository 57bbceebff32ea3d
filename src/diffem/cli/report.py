"""diffem report"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffem.cli.console import say
from diffem.cli.models import refuse_foreign
from diffem.report import page


def run(arguments: argparse.Namespace) -> None:
    refuse_foreign(Path(arguments.run))
    say(str(page.write(Path(arguments.run))))
