"""diffem train"""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from diffem import config as configuration
from diffem import devices, distributed
from diffem.clean.datasets import make_observations
from diffem.clean.evaluation import against, check_reference
from diffem.cli.console import ProgressBar, say
from diffem.cli.diagnose import print_warnings, write_diagnostics
from diffem.cli.models import own_corruption, place_of
from diffem.cli.words import overrides
from diffem.data import Observations, open_array
from diffem.diagnostics.check import quick
from diffem.em import DiffEM
from diffem.errors import DiffemError, Stopped
from diffem.loop import TOGETHER, refuse_minutes
from diffem.report import page, pictures
from diffem.samplers import trained_kind
from diffem.tracking import track
from diffem.watch import time_left


def run(arguments: argparse.Namespace) -> None:
    settings = overrides(arguments.rest)
    if arguments.preset and (Path(arguments.preset) / "y.npy").exists():
        raise DiffemError(
            f"diffem train: {arguments.preset}: is a folder of observations: --observations {arguments.preset}"
        )
    config, place = configuration.load_config(arguments.preset, settings), place_of(arguments)
    refuse_minutes(arguments.checkpoint_minutes, "diffem train: --checkpoint-minutes")
    distributed.begin()
    devices.choose(arguments.device, arguments.precision)
    reference = None
    if arguments.reference:
        if not Path(arguments.reference).is_file():
            raise DiffemError(f"--reference: {arguments.reference}: no such file; it is a .npy of clean items")
        reference = open_array(Path(arguments.reference))
    if arguments.out is None and arguments.preset is None:
        raise DiffemError("diffem train: --out: give a run folder")
    out = Path(arguments.out or f"runs/{Path(arguments.preset).stem}")
    own, hooks = own_corruption(arguments), [] if reference is None else [against(reference)]
    if arguments.track:
        hooks.append(track(arguments.track, out))
    folder = Path(arguments.observations) if arguments.observations else out / "observations"
    if arguments.observations is None and not (folder / "y.npy").exists():
        if not config.data.source:
            raise DiffemError(
                "diffem train: --observations: give a folder of observations, or a preset that makes its own"
            )
        distributed.shared(lambda: make_observations(config, arguments.preset, folder, arguments.root, own))
    observations = Observations.load(folder, own)
    if not (arguments.force or (out / "config.yaml").exists()):
        _refuse_problems(observations)
    if reference is not None:  # now, not after the first iteration
        check_reference(reference, observations)
    bar = ProgressBar()
    em = (trained_kind(config.sampler).algorithm or DiffEM)(
        config,
        observations,
        out,
        hooks=hooks,
        progress=bar.update if distributed.first() else lambda progress: None,
        allow_unobserved=arguments.allow_unobserved,
        checkpoint_minutes=arguments.checkpoint_minutes,
        compile=arguments.compile,
        **place,
    )
    for row in until_stopped(em):
        if not distributed.first():
            continue
        bar.clear()
        ratio = "" if row["ratio"] is None else f", ratio {row['ratio']:.2f}"
        verdict = "best" if row["best"] else "accepted" if row["accepted"] else "refused"
        if row["loss"] is None:
            verdict = "start" if row["iteration"] == 0 else "final"
        new = row is em.rows[-1]  # not of an earlier process
        left = f"; {time_left(em.watch.left)}" if new and em.watch.left else ""
        say(
            f"iteration {row.get('final', row['iteration']):3d} {verdict:8s} {row['score_name']} {row['score']:.4f} +- {row['score_se']:.4f}{ratio} ({row['seconds']:.0f} s){left}"
            + ("" if row["iteration"] else "; scores are in units of half the range of the data")
        )
        if new:
            with contextlib.suppress(OSError):  # a full disk: it is written again at the end
                page.write(out)
    if not distributed.first():
        return
    if em.rows[-1].get("final") == 0:
        prior = "" if (out / "prior" / "config.json").exists() else ", and it has no prior"
        why = "no iteration was better than the start" if config.em.iterations else "no iteration was asked for"
        say(f"{why}: the start is what this run gives{prior}")
    pictures.save(out, observations, em.test, config.em.seed, folder / "clean.npy", **place)
    found = write_diagnostics(out, observations, False, **place)
    written = page.write(out)
    say(page.summary_table(out))
    print_warnings(found)
    say(f"report: {written}")


def _refuse_problems(observations: Observations) -> None:
    """Raises a DiffemError if the quick part of `diffem check` finds a problem."""
    if problems := quick(observations):
        more = f" (and {len(problems) - 1} more, see diffem check)" if len(problems) > 1 else ""
        first = problems[0]
        raise DiffemError(f"{observations.source}: {first.name}: {first.text}{more}; --force goes on all the same")


def until_stopped(em: DiffEM) -> Iterator[dict]:
    """The rows of a run. After SIGTERM or Ctrl-C the run saves before it ends; a second signal ends it at once."""

    def stop(number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        em.stop = lambda: _raise(Stopped(number))
        if not em.unsaved and (distributed.size() == 1 or em.state.step not in TOGETHER):  # else all stop together
            em.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield from em.iterate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(error: BaseException) -> NoReturn:
    raise error
