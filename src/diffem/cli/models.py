"""What the commands on a trained run share: its models, the observations, and what may be overwritten."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffem.corruptions import BlackBox, Corruption, from_path
from diffem.data import Observations
from diffem.errors import DiffemError
from diffem.posterior import Posterior, from_pretrained
from diffem.run import read_config


def place_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Device, precision and batch size."""
    if arguments.batch is not None and arguments.batch < 1:
        raise DiffemError(f"diffem {arguments.command}: --batch: must be at least 1, got {arguments.batch}")
    return {"device": arguments.device, "precision": arguments.precision, "batch": arguments.batch}


def own_corruption(arguments: argparse.Namespace) -> Corruption | type[Corruption] | None:
    """The user's own corruption, if one is named."""
    return from_path(arguments.corruption) if arguments.corruption else None


def model(arguments: argparse.Namespace, name: str) -> Posterior:
    """A model of the run that the arguments name."""
    read_config(Path(arguments.run))  # refuses a folder that is not a run
    own = own_corruption(arguments)  # importing it registers a class
    given = None if isinstance(own, type) else own
    return from_pretrained(Path(arguments.run) / name, given, device=arguments.device, precision=arguments.precision)


def observations_of(folder: str | Path, posterior: Posterior, arguments: argparse.Namespace) -> Observations:
    """The observations of a folder. The folder never names a black box, which is taken from the posterior."""
    box = posterior.corruption if isinstance(posterior.corruption, BlackBox) else None
    return Observations.load(folder, own_corruption(arguments) or box)


def trained_on(arguments: argparse.Namespace) -> Path | None:
    """The observation folder that the arguments name, or else the one that the run read, if it still exists."""
    if arguments.observations:
        return Path(arguments.observations)
    run = Path(arguments.run)
    places = run / "observations", Path(facts(run).get("source", ""))
    return next((place for place in places if (place / "y.npy").exists()), None)


def facts(run: Path) -> dict:
    """The facts that a run recorded about its training observations; empty if it is not a run."""
    return read_config(run)["facts"] if (run / "config.yaml").exists() else {}


def refuse_to_overwrite(file: Path, arguments: argparse.Namespace) -> None:
    if file.exists() and not arguments.overwrite:
        raise DiffemError(f"diffem {arguments.command}: --out: {file} is there already; --overwrite replaces it")


def refuse_foreign(run: Path) -> None:
    """Refuses to write into a folder that no run made."""
    if run.is_dir() and not (run / "run.json").exists():
        raise DiffemError(f"{run}: is not a run folder (no run.json); nothing is written there")
