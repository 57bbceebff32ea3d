"""diffem reconstruct"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np

from diffem import files, memory
from diffem.cli.console import say
from diffem.cli.models import facts, model, observations_of, place_of, refuse_to_overwrite
from diffem.data import Observations, evenly
from diffem.data.readers.exporting import Export
from diffem.errors import DiffemError
from diffem.posterior import Posterior

LOOKED_AT = 64  # observations whose values are compared with those of the training
NARROW, FAR = 0.02, 20.0  # model units: a narrower spread of all values, or a larger median of them, is of other units


def run(arguments: argparse.Namespace) -> None:
    place = place_of(arguments)
    posterior = model(arguments, "posterior")
    batch = place["batch"] or posterior.batch
    observations = observations_of(arguments.observations, posterior, arguments).images
    posterior.refuse_others(observations)
    _refuse_other_range(Path(arguments.run), observations)
    _warn_of_other_units(posterior, observations)
    if arguments.draws < 1:
        raise DiffemError(f"diffem reconstruct: --draws: must be at least 1, got {arguments.draws}")
    out, n = Path(arguments.out), len(observations)
    for mine in ("y.npy", "run.json"):
        if (out / mine).exists():
            raise DiffemError(f"diffem reconstruct: --out: {out} holds {mine}; give a folder of its own")
    for name in ("draws.npy", "mean.npy", "std.npy"):
        refuse_to_overwrite(out / name, arguments)
    export = None
    if arguments.kind is not None:
        export = Export(arguments.observations, arguments.kind, observations.shape, observations.range)
        for name in ("mean", "std", *(f"draw-{m + 1}" for m in range(arguments.draws))):
            refuse_to_overwrite(out / name, arguments)
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".diffem-", dir=out.resolve().parent))

    layout = posterior.item_layout

    def make(name: str, *extra: int, dtype: type = layout.dtype) -> np.memmap:
        return files.make_array(temporary / f"{name}.npy", (n, *extra, *layout.users(observations.shape)), dtype)

    try:
        draws, mean, std = make("draws", arguments.draws), make("mean"), make("std", dtype=np.float32)
        numbers = arguments.draws * math.prod(observations.shape)
        for rows in observations.chunks(size=memory.at_once(numbers, batch)):
            block = posterior.reconstruct(observations, rows, arguments.draws, arguments.seed, batch)
            draws[rows], mean[rows] = block.transpose(0, 1).numpy(), block.mean(0).numpy()
            # the errors of antithetic draws cancel in their mean: dividing by one draw less would give too much
            std[rows] = block.std(0, correction=0).numpy()
        for array in (draws, mean, std):
            array.flush()
        if export is not None:
            export.write(layout.to_model(mean), temporary / "mean")
            export.write(layout.to_model(std), temporary / "std", whole=False)
            for m in range(arguments.draws):
                export.write(layout.to_model(draws[:, m]), temporary / f"draw-{m + 1}")
        for file in [file for file in temporary.rglob("*") if file.is_file()]:
            target = out / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(temporary)
    say(f"{n} observations, {arguments.draws} draws each, in {out}")


def _warn_of_other_units(posterior: Posterior, observations: Observations) -> None:
    """Warns if the values are hundreds of times smaller or larger than those of the training."""
    y, params = observations.batch(evenly(np.arange(len(observations)), LOOKED_AT))
    if y.shape[1:] != observations.shape:
        return
    seen = posterior.corruption.seen(y, params).expand_as(y)
    z = posterior.corruption.scale_y(y, params, posterior.units)[seen]
    if len(z) and (z.max() - z.min() < NARROW or z.abs().median() > FAR):
        units, values = posterior.units, y[seen]
        low, high = (units.centre - units.half).min(), (units.centre + units.half).max()
        say(
            f"warning: {observations.source}: its values are {values.min():.4g} to {values.max():.4g}, where the model was trained for {low:.4g} to {high:.4g}; are they in the same units?"
        )


def _refuse_other_range(run: Path, observations: Observations) -> None:
    trained = facts(run).get("range")
    stated = None if observations.range is None else list(observations.range)
    if stated and trained and stated != trained:
        raise DiffemError(f"{observations.source}: range: {stated}, but {run} was trained on {trained}")
