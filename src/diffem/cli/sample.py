"""diffem sample"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from diffem import files
from diffem.cli.console import say
from diffem.cli.models import model, place_of, refuse_to_overwrite
from diffem.errors import DiffemError


def run(arguments: argparse.Namespace) -> None:
    if arguments.n < 1:
        raise DiffemError(f"diffem sample: --n: must be at least 1, got {arguments.n}")
    refuse_to_overwrite(Path(arguments.out), arguments)
    if (Path(arguments.run) / "metrics.jsonl").exists() and not (
        Path(arguments.run) / "prior" / "config.json"
    ).exists():
        raise DiffemError(
            f"{arguments.run}: has no prior: it is not finished, or no iteration was better than its start"
        )
    prior = model(arguments, "prior")
    Path(arguments.out).resolve().parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.save(stream, prior.generate(arguments.n, arguments.seed, place_of(arguments)["batch"]).numpy())
    files.replace(Path(arguments.out), stream.getvalue())
    say(f"{arguments.n} samples in {arguments.out}")
