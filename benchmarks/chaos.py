"""Chaos: a tiny run is ended at random moments, and must go on to bitwise the same weights.

    python benchmarks/chaos.py                                   # 200 times, half an hour on a busy core
    python benchmarks/chaos.py --ends 20 --out /tmp/chaos.json

A moment lies before or after every operation on a file, or at a piece of progress. There a run is ended by SIGKILL or by
SIGTERM; after SIGKILL its checkpoint may be damaged, too: a bit is flipped, or the end is missing. It is ended up to three
times before it may finish. Then its models, reconstructions and metrics must be those of a run that was left alone, and so
must the names of its files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from diffem.cli.train import until_stopped
from diffem.config import from_dict
from diffem.corruptions import RandomMask
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.errors import Stopped

WAYS = ("SIGKILL", "SIGTERM", "SIGKILL, a bit flipped", "SIGKILL, truncated")
SETTINGS = {
    "em": {"iterations": 3, "guard": True, "refresh": 0.5, "patience": 2},
    "m_step": {"steps": 5, "first_steps": 5, "batch": 16},
    "sampler": {"steps": 3},
    "start": {"components": [1], "ranks": [2], "iterations": 20},
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "prior": {"steps": 5, "sampler_steps": 4},
}


def observations() -> Observations:
    """Sixty items from a Gaussian of rank 2, masked."""
    generator, shape = torch.Generator().manual_seed(0), (1, 4, 4)
    x = torch.randn(60, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    x = (x + 0.1 * torch.randn(60, 16, generator=generator)).view(60, *shape)
    corruption = RandomMask(0.5, 0.05)
    params = corruption.draw(60, shape, generator)
    y = corruption.apply(x, params, generator).numpy()
    return Observations(y, corruption, {k: v.numpy() for k, v in params.items()})


def watch(event: Callable[[], None]) -> None:
    """Has `event` called before and after every operation on a file."""

    def watched(function: Callable) -> Callable:
        def call(*given, **named):
            event()
            result = function(*given, **named)
            event()
            return result

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (Path, "unlink"), (shutil, "rmtree")):
        setattr(module, name, watched(getattr(module, name)))


def run(out: Path, last: int, number: int) -> int:
    """A run that sends itself a signal at event `last`; returns how many events there were."""
    torch.set_num_threads(1)
    count = 0

    def event(*_given: object) -> None:
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), number)

    em = DiffEM(from_dict(SETTINGS), observations(), out, batch=16, checkpoint_minutes=0, progress=event)
    watch(event)
    for _row in until_stopped(em):
        pass
    return count


def child(out: Path, last: int = 0, number: int = signal.SIGKILL) -> tuple[int, int]:
    """Runs in a process of its own; returns its exit status, negative for a signal, and the number of its events."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            os.write(writer, str(run(out, last, number)).encode())
            status = 0
        except Stopped as stopped:
            status = 128 + stopped.signal
        except BaseException as error:
            print(f"{out}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with os.fdopen(reader) as stream:
        return status, int(stream.read() or 0)


def damage(file: Path, way: str, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    place = dice.randrange(len(content))
    if way.endswith("truncated"):
        del content[place:]
    else:
        content[place] ^= 1 << dice.randrange(8)
    file.unlink()  # it may be a second name of good.safetensors
    file.write_bytes(content)


def outcome(out: Path) -> dict[str, object]:
    """What must not depend on how often a run was ended."""
    found: dict[str, object] = {"files": sorted(str(p.relative_to(out)) for p in out.rglob("*"))}
    for name in ("posterior/model.safetensors", "prior/model.safetensors", "reconstructions.npy"):
        found[name] = (out / name).read_bytes()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]
    return found


def chaos(ends: int, seed: int, folder: Path) -> Iterator[dict]:
    """Ends runs `ends` times; after each run yields the numbers that benchmarks/results/chaos.json holds."""
    dice, began, counts, runs, damaged = random.Random(seed), time.monotonic(), Counter(), 0, 0
    wrong: list[str] = []
    status, events = child(folder / "whole")
    assert status == 0
    whole = outcome(folder / "whole")
    while sum(counts.values()) < ends:
        out, story = folder / str(runs), []
        runs += 1
        for _ in range(dice.randint(1, 3)):
            way, last = dice.choice(WAYS), dice.randint(1, events)
            number = signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL
            status, _ = child(out, last, number)
            story.append(f"{way} at {last}: {status}")
            if status == 0:  # fewer events were left
                break
            counts[way] += 1
            if "," in way and (out / "previous.safetensors").exists():
                damage(out / "checkpoint.safetensors", way, dice)
                damaged += 1
            if status not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                break
        if (status := child(out)[0]) != 0:
            wrong.append(f"run {runs}: status {status} after {story}")
        elif differs := [name for name, value in outcome(out).items() if value != whole[name]]:
            wrong.append(f"run {runs}: {', '.join(differs)} differ after {story}")
        shutil.rmtree(out)
        yield {
            "ends": sum(counts.values()),
            "ways": dict(sorted(counts.items())),
            "damaged_checkpoints": damaged,
            "runs": runs,
            "moments": events,
            "wrong": wrong,
            "seed": seed,
            "seconds": round(time.monotonic() - began),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ends", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chaos.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for found in chaos(arguments.ends, arguments.seed, Path(folder)):
            arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
