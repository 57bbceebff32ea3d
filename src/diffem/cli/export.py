"""diffem export"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffem.cli.console import say
from diffem.cli.models import model, observations_of, refuse_to_overwrite, trained_on
from diffem.program import users


def run(arguments: argparse.Namespace) -> None:
    refuse_to_overwrite(Path(arguments.out), arguments)
    posterior, folder = model(arguments, "posterior"), trained_on(arguments)
    example: tuple[Any, Any] = (None, None)
    if folder is not None:
        observations = observations_of(folder, posterior, arguments)
        example = users(posterior.layout, *observations.batch(range(min(3, len(observations)))))
    size = posterior.export(arguments.out, *example)
    say(f"{arguments.out}: a program for {'any number of' if size is None else size} observations at a time")
