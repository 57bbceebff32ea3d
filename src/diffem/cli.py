"""The command line: diffem check | corrupt | train | reconstruct | sample | evaluate | diagnose | report."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffem import __version__
from diffem.errors import DiffemError

if TYPE_CHECKING:
    from diffem.config import Config
    from diffem.corruptions import Corruption
    from diffem.observations import Observations
    from diffem.posteriors import PosteriorSampler

_TRAIN_HELP = """
examples:
  diffem train digits --out runs/digits            a benchmark that makes its own observations
  diffem train fashion-mask75 --root DATA          a preset on a data set in DATA
  diffem train --observations DIR --out RUN        your own observations
  diffem train digits --em.iterations 30           any setting: --section.field value

DIR holds y.npy, mask.npy (or matrix.npy) and corruption.yaml, e.g.
  name: RandomMask
  rate: 0.5
  noise: 0.01
Run the same command again to go on where a run was stopped.
"""


_CHECK_HELP = """
examples:
  diffem check DIR                       what stands in the way, before any training
  diffem check DIR digits                and how long a run takes on this machine
  diffem check DIR --em.iterations 30    the same with other settings: --section.field value

The exit status is 1 if there is a problem.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage
        raise DiffemError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="diffem", description="Learn from corrupted observations: a posterior sampler and a prior.")
    parser.add_argument("--version", action="version", version=f"diffem {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, **options)

    train = add(
        "train",
        "Train on observations, or on those of a benchmark preset.",
        epilog=_TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("preset", nargs="?", help="a preset's name or a YAML file")
    train.add_argument("--observations", metavar="DIR", help="folder of observations")
    train.add_argument("--corruption", metavar="MODULE:FUNCTION", help="a black box x -> y")
    train.add_argument("--root", metavar="DIR", help="where the clean data set of a benchmark preset lies")
    train.add_argument("--out", metavar="RUN", help="the run folder (default: runs/PRESET)")
    train.add_argument(
        "--reference", metavar="CLEAN", help="a .npy of clean items: distances are recorded, nothing else"
    )
    _add_device(train)
    train.add_argument("--allow-unobserved", action="store_true", help="go on although some entry is never observed")

    check = add(
        "check",
        "Say whether observations can be learned from, before any training.",
        epilog=_CHECK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("observations", metavar="OBSERVATIONS", help="folder of observations")
    check.add_argument(
        "preset", nargs="?", metavar="PRESET", help="a preset's name or a YAML file, to tell what a run costs"
    )
    check.add_argument("--corruption", metavar="MODULE:FUNCTION", help="a black box x -> y")

    corrupt = add("corrupt", "Make observations from clean data (for benchmarks).")
    corrupt.add_argument(
        "source", help="manifold, digits, fashion-mnist, cifar10, celeba, a .npy file or a folder of images"
    )
    corrupt.add_argument("--name", help="RandomMask, GaussianNoise, GaussianBlur or RandomProjection")
    corrupt.add_argument("--corruption", metavar="MODULE:FUNCTION", help="a black box x -> y instead")
    for argument in ("rate", "noise", "std"):
        corrupt.add_argument(f"--{argument}", type=float)
    for argument in ("rows", "block"):
        corrupt.add_argument(f"--{argument}", type=int)
    corrupt.add_argument("--root", metavar="DIR")
    corrupt.add_argument("--limit", type=int, metavar="N", help="at most the first N items")
    corrupt.add_argument("--seed", type=int, default=0)
    corrupt.add_argument(
        "--keep-clean", action="store_true", help="write clean.npy beside them, for evaluate and report"
    )
    corrupt.add_argument("--out", required=True, metavar="DIR")

    reconstruct = add("reconstruct", "Clean observations, also new ones, with a trained run.")
    reconstruct.add_argument("run")
    reconstruct.add_argument("--observations", required=True, metavar="DIR")
    reconstruct.add_argument("--draws", type=int, default=8, metavar="M")
    reconstruct.add_argument("--seed", type=int, default=0)
    _add_device(reconstruct)
    reconstruct.add_argument(
        "--out", required=True, metavar="DIR", help="gets draws.npy (N, M, ...), mean.npy, std.npy"
    )

    sample = add("sample", "Generate new clean data from the prior of a run.")
    sample.add_argument("run")
    sample.add_argument("--n", type=int, default=64)
    sample.add_argument("--seed", type=int, default=0)
    _add_device(sample)
    sample.add_argument("--out", required=True, metavar="FILE", help="a .npy file")

    evaluate = add("evaluate", "Compare a run with clean data.")
    evaluate.add_argument("run")
    evaluate.add_argument(
        "--reference", required=True, metavar="CLEAN", help="a .npy of clean items, row i for observation i"
    )
    evaluate.add_argument("--observations", metavar="DIR", help="what it was trained on (default: RUN/observations)")
    _add_device(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    diagnose = add("diagnose", "Say, from held-out observations alone, whether a run can be trusted.")
    diagnose.add_argument("run")
    diagnose.add_argument("--observations", metavar="DIR", help="what it was trained on (default: RUN/observations)")
    diagnose.add_argument("--corruption", metavar="MODULE:FUNCTION", help="the black box that it was trained with")
    diagnose.add_argument("--full", action="store_true", help="also whether posterior and prior fit each other; slower")
    _add_device(diagnose)
    diagnose.add_argument("--json", action="store_true", help="print JSON")

    report = add("report", "Write report.html of a run again.")
    report.add_argument("run")
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, mps, ...")
    parser.add_argument(
        "--precision", default="auto", help="auto (bfloat16 on a GPU, float32 elsewhere), float32, bfloat16"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is 0, 1 if a check finds a problem, or 2 after an error of the user's that is said
    on one line."""
    try:
        words, settings = _separate(sys.argv[1:] if argv is None else argv)
        arguments, rest = _parser().parse_known_args(words)
        rest = [*rest, *settings]
        if rest and arguments.command not in ("train", "check"):
            raise DiffemError(f"diffem {arguments.command}: unknown argument {rest[0]}")
        status = {
            "train": lambda: _train(arguments, rest),
            "check": lambda: _check(arguments, rest),
            "corrupt": lambda: _corrupt(arguments),
            "reconstruct": lambda: _reconstruct(arguments),
            "sample": lambda: _sample(arguments),
            "evaluate": lambda: _evaluate(arguments),
            "diagnose": lambda: _diagnose(arguments),
            "report": lambda: print(_report(Path(arguments.run))),
        }[arguments.command]()
    except DiffemError as error:
        print(f"diffem: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"diffem: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffem: stopped; run the same command to go on", file=sys.stderr)
        return 130
    return status or 0


def _separate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for argparse, and `--section.field value`, whose value it would take for the preset."""
    words, settings, left = [], [], list(argv)
    while left:
        word = left.pop(0)
        setting = word.startswith("--") and "." in word.partition("=")[0]
        (settings if setting else words).append(word)
        if setting and "=" not in word and left and not left[0].startswith("--"):
            settings.append(left.pop(0))
    return words, settings


def overrides(rest: Sequence[str], command: str = "train") -> list[tuple[str, str]]:
    pairs, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise DiffemError(f"diffem {command}: {word}: not understood; settings are written --section.field value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise DiffemError(f"diffem {command}: --{key}: needs a value")
            value = words.pop(0)
        pairs.append((key, value))
    return pairs


def _train(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from diffem import config as configuration
    from diffem import devices, pictures, report
    from diffem.corruptions import from_function_path
    from diffem.em import DiffEM
    from diffem.observations import Observations, open_array

    config = configuration.load(arguments.preset, overrides(rest))
    devices.choose(arguments.device, arguments.precision)
    reference = None
    if arguments.reference:
        if not Path(arguments.reference).is_file():
            raise DiffemError(f"--reference: {arguments.reference}: no such file; it is a .npy of clean items")
        reference = open_array(Path(arguments.reference))
    if arguments.out is None and arguments.preset is None:
        raise DiffemError("diffem train: --out: give a run folder")
    out = Path(arguments.out or f"runs/{Path(arguments.preset).stem}")
    box = from_function_path(arguments.corruption) if arguments.corruption else None
    folder = Path(arguments.observations) if arguments.observations else out / "observations"
    if arguments.observations is None and not (folder / "y.npy").exists():
        if not config.data.source:
            raise DiffemError(
                "diffem train: --observations: give a folder of observations, or a preset that makes its own"
            )
        make_observations(config, arguments.preset, folder, arguments.root, box)
    observations = Observations.load(folder, box)
    bar = ProgressBar()
    em = DiffEM(
        config,
        observations,
        out,
        allow_unobserved=arguments.allow_unobserved,
        progress=bar.update,
        reference=reference,
        device=arguments.device,
        precision=arguments.precision,
    )
    for row in em.iterate():
        bar.clear()
        ratio = "" if row["ratio"] is None else f", ratio {row['ratio']:.2f}"
        verdict = "best" if row["best"] else "accepted" if row["accepted"] else "refused"
        if row["loss"] is None:
            verdict = "start" if row["iteration"] == 0 else "final"
        print(
            f"iteration {row['iteration']:3d} {verdict:8s} {row['score_name']} {row['score']:.4f} +- {row['score_se']:.4f}{ratio} ({row['seconds']:.0f} s)",
            flush=True,
        )
    place = arguments.device, arguments.precision
    pictures.save(em.run, observations, em.test, config.em.seed, folder / "clean.npy", *place)
    found = _write_diagnostics(out, observations, False, *place)
    page = report.write(out)
    print(report.summary_table(out))
    _print_warnings(found)
    print(f"report: {page}")


def _check(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from diffem import config as configuration
    from diffem.corruptions import from_function_path
    from diffem.diagnostics.check import check
    from diffem.observations import Observations

    given = arguments.preset or rest
    config = configuration.load(arguments.preset, overrides(rest, "check")) if given else None
    box = from_function_path(arguments.corruption) if arguments.corruption else None
    findings = check(Observations.load(arguments.observations, box), config)
    for finding in findings:
        print(f"{finding.level:9s}{finding.name}: {finding.text}")
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    counts = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    print(counts if problems or warnings else "nothing stands in the way")
    return int(problems > 0)


def make_observations(
    config: Config, preset: str, folder: Path, root: str | None = None, corruption: Corruption | None = None
) -> None:
    """Writes the observations that a preset makes for itself, with the clean items beside them."""
    from diffem import datasets
    from diffem.corruptions import from_config

    data = config.data
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = corruption or from_config(data.corruption, f"{preset}: data.corruption")
    datasets.corrupt(data.source, made, folder, root, data.limit or None, config.em.seed, keep_clean=True)


class ProgressBar:
    """A progress bar with what is being done; silent where standard error is not a terminal."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def update(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        phase = what.split(":")[0]
        if self.bar is None or self.what != phase:
            self.clear()
            self.bar, self.what = tqdm(total=total, leave=False, disable=not sys.stderr.isatty()), phase
        self.bar.set_description_str(what, refresh=False)
        self.bar.update(done - self.bar.n)

    def clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _corrupt(arguments: argparse.Namespace) -> None:
    from diffem import datasets
    from diffem.corruptions import from_config, from_function_path

    if arguments.corruption:
        corruption = from_function_path(arguments.corruption)
    else:
        given = {k: getattr(arguments, k) for k in ("name", "rate", "noise", "std", "rows", "block")}
        corruption = from_config({k: v for k, v in given.items() if v is not None}, "diffem corrupt")
    made = datasets.corrupt(
        arguments.source,
        corruption,
        arguments.out,
        arguments.root,
        arguments.limit,
        arguments.seed,
        arguments.keep_clean,
    )
    print(f"{len(made)} observations of shape {tuple(made.y.shape[1:])} in {arguments.out}")


def _model(run: str, name: str, device: str = "auto", precision: str = "auto"):
    from diffem.posteriors import from_pretrained

    if not (Path(run) / "config.yaml").exists():
        raise DiffemError(f"{run}: is not a run folder (no config.yaml)")
    return from_pretrained(Path(run) / name, device=device, precision=precision)


def _observations(folder: str | Path, sampler: PosteriorSampler) -> Observations:
    """An observation folder; it never names a black box, which the sampler was trained for."""
    from diffem.corruptions import BlackBox
    from diffem.observations import Observations

    return Observations.load(folder, sampler.corruption if isinstance(sampler.corruption, BlackBox) else None)


def _reconstruct(arguments: argparse.Namespace) -> None:
    import numpy as np

    from diffem import files
    from diffem.posteriors import draw_many

    sampler = _model(arguments.run, "posterior", arguments.device, arguments.precision)
    observations = _observations(arguments.observations, sampler)
    if observations.shape != sampler.shape:
        raise DiffemError(
            f"{arguments.observations}: items of shape {observations.shape}, but {arguments.run} was trained on {sampler.shape}"
        )
    if arguments.draws < 1:
        raise DiffemError(f"diffem reconstruct: --draws: must be at least 1, got {arguments.draws}")
    out = Path(arguments.out)
    temporary = out.with_name(out.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    n = len(observations)

    def make(name: str, *extra: int) -> np.memmap:
        return files.make_array(temporary / f"{name}.npy", (n, *extra, *sampler.shape))

    draws, mean, std = make("draws", arguments.draws), make("mean"), make("std")
    for rows in observations.chunks(size=256):
        block = draw_many(sampler, observations, rows, arguments.draws, arguments.seed)
        draws[rows], mean[rows] = block.numpy(), block.mean(1).numpy()
        std[rows] = block.std(1, correction=min(1, arguments.draws - 1)).numpy()
    for array in (draws, mean, std):
        array.flush()
    out.mkdir(exist_ok=True)
    for name in ("draws", "mean", "std"):
        (temporary / f"{name}.npy").replace(out / f"{name}.npy")
    shutil.rmtree(temporary)
    print(f"{n} observations, {arguments.draws} draws each, in {out}")


def _sample(arguments: argparse.Namespace) -> None:
    import io

    import numpy as np

    from diffem import files
    from diffem.posteriors import sample_many

    prior = _model(arguments.run, "prior", arguments.device, arguments.precision)
    stream = io.BytesIO()
    np.save(stream, sample_many(prior, arguments.n, arguments.seed).numpy())
    files.replace(Path(arguments.out), stream.getvalue())
    print(f"{arguments.n} samples in {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from diffem.evaluation import as_text, evaluate

    folder = Path(arguments.observations or Path(arguments.run) / "observations")
    given = arguments.observations is not None or folder.exists()
    observations = _observations(folder, _model(arguments.run, "posterior", "cpu")) if given else None
    table = evaluate(arguments.run, arguments.reference, observations, arguments.device, arguments.precision)
    finite = {k: {name: v if math.isfinite(v) else None for name, v in column.items()} for k, column in table.items()}
    print(json.dumps(finite) if arguments.json else as_text(table))


def _diagnose(arguments: argparse.Namespace) -> None:
    from diffem.corruptions import BlackBox, from_function_path
    from diffem.observations import Observations

    run, box = Path(arguments.run), None
    if isinstance(_model(arguments.run, "posterior", "cpu").corruption, BlackBox):
        if not arguments.corruption:
            raise DiffemError("diffem diagnose: --corruption: the run is of a black box; give it as MODULE:FUNCTION")
        box = from_function_path(arguments.corruption)
    observations = Observations.load(arguments.observations or run / "observations", box)
    found = _write_diagnostics(run, observations, arguments.full, arguments.device, arguments.precision)
    page = _report(run)
    if arguments.json:
        print(json.dumps(found))
    else:
        _print_warnings(found)
        print(f"report: {page}")


def _write_diagnostics(run: Path, observations: Observations, full: bool, device: str, precision: str) -> dict:
    """Writes diagnostics.json into a run folder; returns what is in it."""
    from diffem import files
    from diffem.diagnostics import diagnose

    found = diagnose(run, observations, full, device, precision)
    files.replace(run / "diagnostics.json", json.dumps(found, indent=2, allow_nan=False).encode())
    return found


def _print_warnings(found: dict) -> None:
    """The warnings of diagnostics, or that there are none."""
    for text in found["warnings"] or ["nothing is wrong that held-out observations could show"]:
        print(f"{'warning' if found['warnings'] else 'diagnostics'}: {text}")


def _report(run: Path) -> Path:
    from diffem import report

    return report.write(run)


if __name__ == "__main__":
    raise SystemExit(main())
