"""diffem evaluate"""

from __future__ import annotations

import argparse
import json
import math

from diffem.clean.evaluation import as_text, evaluate
from diffem.cli.console import say
from diffem.cli.models import model, observations_of, place_of, trained_on


def run(arguments: argparse.Namespace) -> None:
    folder = trained_on(arguments)
    observations = None if folder is None else observations_of(folder, model(arguments, "posterior"), arguments)
    table = evaluate(arguments.run, arguments.reference, observations, **place_of(arguments))
    finite = {k: {name: v if math.isfinite(v) else None for name, v in column.items()} for k, column in table.items()}
    say(json.dumps(finite) if arguments.json else as_text(table))
