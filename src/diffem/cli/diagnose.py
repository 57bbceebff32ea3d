"""diffem diagnose"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from diffem import files
from diffem.cli.console import say
from diffem.cli.models import model, own_corruption, place_of, refuse_foreign, trained_on
from diffem.corruptions import BlackBox
from diffem.data import Observations
from diffem.diagnostics import diagnose
from diffem.errors import DiffemError
from diffem.report import page


def run(arguments: argparse.Namespace) -> None:
    run = Path(arguments.run)
    refuse_foreign(run)
    if isinstance(model(arguments, "posterior").corruption, BlackBox) and not arguments.corruption:
        raise DiffemError("diffem diagnose: --corruption: the run is of a black box; give it as MODULE:NAME")
    if (folder := trained_on(arguments)) is None:
        raise DiffemError(f"diffem diagnose: --observations: give the folder of observations that {run} was trained on")
    observations = Observations.load(folder, own_corruption(arguments))
    found = write_diagnostics(run, observations, arguments.full, **place_of(arguments))
    written = page.write(run)
    if arguments.json:
        say(json.dumps(found))
    else:
        print_warnings(found)
        say(f"report: {written}")


def write_diagnostics(run: Path, observations: Observations, full: bool, **place: Any) -> dict:
    """Writes diagnostics.json into a run folder; returns its content."""
    found = diagnose(run, observations, full, **place)
    files.replace(run / "diagnostics.json", json.dumps(found, indent=2, allow_nan=False).encode())
    return found


def print_warnings(found: dict) -> None:
    """Prints the warnings of the diagnostics, or that there are none."""
    for text in found["warnings"] or ["nothing is wrong that held-out observations could show"]:
        say(f"{'warning' if found['warnings'] else 'diagnostics'}: {text}")
