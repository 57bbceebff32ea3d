"""diffem check"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffem import config as configuration
from diffem import files, memory, safe_yaml
from diffem.cli.console import say
from diffem.cli.models import own_corruption
from diffem.cli.words import overrides
from diffem.corruptions import from_config
from diffem.cost import forecast
from diffem.data import Observations
from diffem.data.observations import NO_ARGUMENTS, read_mapping
from diffem.diagnostics.check import Finding, Sample, check, estimated
from diffem.diagnostics.noise import described
from diffem.errors import DiffemError


def run(arguments: argparse.Namespace) -> int:
    if arguments.estimate:
        return _estimate(arguments)
    if arguments.write or arguments.overwrite:
        raise DiffemError("diffem check: --write and --overwrite: are for --estimate")
    config = configuration.load_config(arguments.preset, overrides(arguments.rest, "check"))
    observations = Observations.load(arguments.observations, own_corruption(arguments))
    findings = check(observations, config.em.seed)
    if arguments.preset or arguments.rest:
        try:
            findings.append(Finding("note", "cost", forecast(observations, config)))
        except memory.TooLarge as error:
            findings.append(Finding("problem", "memory", str(error)))
    for finding in findings:
        say(f"{finding.level:9s}{finding.name}: {finding.text}")
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    counts = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    say(counts if problems or warnings else "nothing stands in the way")
    return int(problems > 0)


def _estimate(arguments: argparse.Namespace) -> int:
    """Estimates the noise, and shows or writes the corresponding corruption.yaml."""
    folder = Path(arguments.observations)
    file = folder / "corruption.yaml"
    if arguments.corruption:
        raise DiffemError("diffem check: --estimate: is for corruptions that corruption.yaml names, not --corruption")
    if (folder / "noise.npy").exists():
        raise DiffemError(f"{folder}: noise.npy: says how large the noise is; there is nothing to estimate")
    if arguments.write and file.exists() and not arguments.overwrite:
        raise DiffemError(f"{file}: is there already; --overwrite replaces it")
    config = read_mapping(file)
    stated = {key: value for key, value in config.items() if key not in NO_ARGUMENTS}
    if stated.get("name", "PoissonGaussian") == "PoissonGaussian":  # the estimate decides which one it is
        stated = {"name": "GaussianNoise"}
    corruption = from_config({**stated, "noise": 0.0}, str(file))
    try:
        noise = estimated(Sample(Observations.load(folder, corruption)))
    except DiffemError as error:
        raise DiffemError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from None
    say(noise.text)
    try:
        text = safe_yaml.dump(described(config, noise)).decode()
    except DiffemError as error:
        raise DiffemError(f"{file}: {error}") from None
    say("\n".join(["corruption.yaml:", *(f"    {line}" for line in text.splitlines())]))
    if arguments.write:
        files.replace(file, text.encode())
        say(f"written: {file}")
    return 0
