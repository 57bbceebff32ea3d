"""The command line: diffem import | check | corrupt | train | status | reconstruct | sample | evaluate | diagnose | report | export |
push | settings."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffem import __version__
from diffem.errors import DiffemError, ToldElsewhere, printable

if TYPE_CHECKING:
    from diffem.config import Config
    from diffem.corruptions import Corruption
    from diffem.data import Observations
    from diffem.em import DiffEM, Progress
    from diffem.posterior import Posterior

_TRAIN_HELP = """
examples:
  diffem train digits --out runs/digits            a benchmark that makes its own observations
  diffem train fashion-mask75 --root DATA          a preset on a data set in DATA
  diffem train --observations DIR --out RUN        your own observations
  diffem train digits --em.iterations 30           any setting: --section.field value; `diffem settings` lists them

DIR holds y.npy, mask.npy (or matrix.npy) and corruption.yaml, e.g.
  name: RandomMask
  rate: 0.5
  noise: 0.01
SIGTERM or Ctrl-C: it saves and ends, usually within seconds, with status 143 or 130; a second one ends it at once.
Run the same command again to go on where a run was stopped, killed, or out of space.
Exit status: 0 finished; 2 an error, told in one line; 143 or 130 stopped by a signal.
"""


LONGEST = 1000  # letters of an error
_CHECK_HELP = """
examples:
  diffem check DIR                       what stands in the way, before any training
  diffem check DIR digits                and how long a run takes on this machine
  diffem check DIR --em.iterations 30    the same with other settings: --section.field value
  diffem check DIR --estimate            how large the noise is, where nobody told; --write writes corruption.yaml

The exit status is 1 if there is a problem.
"""

_IMPORT_HELP = """
examples:
  diffem import images/ --out DIR                      a folder of PNG, JPEG, TIFF (every page), FITS or NIfTI files
  diffem import images/ --patch 64 --out DIR           images of several sizes, cut into pieces of 64 x 64
  diffem import exposure.fits --hdu SCI,ERR,DQ --out DIR
  diffem import scans.h5:/kspace --out DIR             an array of an HDF5, Zarr or .npz file
  diffem import table.csv --columns age,income --out DIR
  diffem import images/ --out DIR --name GaussianNoise --noise 10

Without --name fill in DIR/corruption.yaml; `diffem check DIR` says what is missing.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # an error of one line instead of the usage text
        raise DiffemError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="diffem", description="Learn from corrupted observations: a posterior sampler and a prior.")
    parser.add_argument("--version", action="version", version=f"diffem {__version__}")
    commands = parser.add_subparsers(dest="command", parser_class=_Parser)

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
    _add_corruption(train)
    train.add_argument("--root", metavar="DIR", help="where the clean data set of a benchmark preset lies")
    train.add_argument("--out", metavar="RUN", help="the run folder (default: runs/PRESET)")
    train.add_argument(
        "--reference", metavar="CLEAN", help="a .npy of clean items: distances are recorded, nothing else"
    )
    _add_device(train)
    train.add_argument(
        "--compile",
        action="store_true",
        help="translate the network by torch.compile: minutes at the start, then faster updates and draws",
    )
    train.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=5.0,
        metavar="M",
        help="at most so much work is lost when the run is killed",
    )
    train.add_argument(
        "--track", metavar="TRACKER", help="also write the numbers of every iteration for tensorboard or trackio"
    )
    train.add_argument("--force", action="store_true", help="go on although `diffem check` finds a problem")
    train.add_argument("--allow-unobserved", action="store_true", help="go on although some entry is never observed")

    imports = add(
        "import",
        "Write an observation folder from images, FITS, NIfTI, HDF5, Zarr, numpy arrays or tables.",
        epilog=_IMPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    imports.add_argument("source", metavar="SOURCE", help="a file, FILE:PATH of an array in it, or a folder of files")
    imports.add_argument("--out", required=True, metavar="DIR", help="the folder of observations to write")
    imports.add_argument("--name", help="a corruption, e.g. RandomMask; its arguments are options, too: --rate 0.5")
    imports.add_argument(
        "--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="of clean values (default: of 8- and 16-bit data)"
    )
    imports.add_argument("--patch", type=int, metavar="SIZE", help="cut images or volumes into pieces of this size")
    imports.add_argument("--hdu", metavar="SCIENCE[,ERROR[,QUALITY]]", help="extensions of FITS (default: SCI,ERR,DQ)")
    imports.add_argument("--slices", type=int, metavar="AXIS", help="slices of NIfTI volumes along axis 0, 1 or 2")
    imports.add_argument("--columns", metavar="A,B,...", help="columns of a table (default: all)")
    imports.add_argument("--axes", metavar="NHWC", help="how an array lies: N, C for channels, D H W T for places")
    imports.add_argument("--overwrite", action="store_true", help="replace an earlier import")

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
    _add_corruption(check)
    check.add_argument("--estimate", action="store_true", help="only estimate the noise, and show a corruption.yaml")
    check.add_argument("--write", action="store_true", help="with --estimate: write that corruption.yaml")
    check.add_argument("--overwrite", action="store_true", help="with --write: replace the one that is there")

    corrupt = add("corrupt", "Make observations from clean data (for benchmarks).")
    corrupt.add_argument(
        "source", help="manifold, digits, fashion-mnist, cifar10, celeba, a .npy file or a folder of images"
    )
    corrupt.add_argument("--name", help="a corruption, e.g. RandomMask; its arguments are options, too: --rate 0.5")
    _add_corruption(corrupt)
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
    _add_corruption(reconstruct)
    reconstruct.add_argument("--draws", type=int, default=8, metavar="M")
    reconstruct.add_argument("--seed", type=int, default=0)
    _add_device(reconstruct)
    reconstruct.add_argument(
        "--out", required=True, metavar="DIR", help="gets draws.npy (N, M, ...), mean.npy, std.npy"
    )
    reconstruct.add_argument(
        "--as", dest="kind", metavar="FORMAT", help="also as tiff, png, fits, nifti or csv, named like imported files"
    )
    reconstruct.add_argument("--overwrite", action="store_true", help="replace what is there")

    sample = add("sample", "Generate new clean data from the prior of a run.")
    sample.add_argument("run")
    _add_corruption(sample)
    sample.add_argument("--n", type=int, default=64)
    sample.add_argument("--seed", type=int, default=0)
    _add_device(sample)
    sample.add_argument("--out", required=True, metavar="FILE", help="a .npy file")
    sample.add_argument("--overwrite", action="store_true", help="replace what is there")

    evaluate = add("evaluate", "Compare a run with clean data.")
    evaluate.add_argument("run")
    evaluate.add_argument(
        "--reference", required=True, metavar="CLEAN", help="a .npy of clean items, row i for observation i"
    )
    evaluate.add_argument(
        "--observations", metavar="DIR", help="what it was trained on (default: the folder that it read)"
    )
    _add_corruption(evaluate)
    _add_device(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    diagnose = add("diagnose", "Say, from held-out observations alone, whether a run can be trusted.")
    diagnose.add_argument("run")
    diagnose.add_argument(
        "--observations", metavar="DIR", help="what it was trained on (default: the folder that it read)"
    )
    _add_corruption(diagnose)
    diagnose.add_argument("--full", action="store_true", help="also whether posterior and prior fit each other; slower")
    _add_device(diagnose)
    diagnose.add_argument("--json", action="store_true", help="print JSON")

    export = add("export", "Write a program of torch.export that draws from the posterior of a run without diffem.")
    export.add_argument("run")
    export.add_argument(
        "--observations", metavar="DIR", help="for their shapes (default: the folder that the run read)"
    )
    _add_corruption(export)
    export.add_argument("--out", required=True, metavar="FILE", help="a .pt2 file")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(device="cpu", precision="float32")

    push = add("push", "Upload the posterior of a run, with a model card, to the Hugging Face Hub.")
    push.add_argument("run")
    push.add_argument("name", metavar="OWNER/NAME")
    _add_corruption(push)
    push.add_argument("--private", action="store_true", help="only its owner may see it, if it is new")
    push.set_defaults(device="cpu", precision="float32")

    add("settings", "List every setting of a run, with its default.")

    status = add("status", "Say how far a run is and how long it still takes, while it runs or afterwards.")
    status.add_argument("run")
    status.add_argument("--json", action="store_true", help="print JSON")

    report = add("report", "Write report.html of a run again.")
    report.add_argument("run")
    return parser


def _add_corruption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corruption",
        metavar="MODULE:NAME",
        help="yours: a function x -> y, a corruption, its class (arguments in corruption.yaml), or an operator of deepinv",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, mps, ...")
    parser.add_argument(
        "--precision", default="auto", help="auto (bfloat16 on a GPU, float32 elsewhere), float32, bfloat16"
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="observations at a time, wherever they are drawn (default: as fit in memory)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. The exit status is 0; 1 if a check finds a problem; 2 after a :class:`DiffemError` or an error of
    the file system, which is printed on one line; 143 after SIGTERM and 130 after Ctrl-C."""
    try:
        words, settings = _separate(sys.argv[1:] if argv is None else argv)
        parser = _parser()
        arguments, rest = parser.parse_known_args(words)
        rest = [*rest, *settings]
        if arguments.command is None:
            if rest:
                raise DiffemError(f"diffem: {rest[0]}: give a command first; diffem --help lists them")
            parser.print_help()
            return 0
        if arguments.command != "status":  # it answers at once, as --help does
            import diffem.rivals  # noqa: F401 - registers their samplers

        if rest and arguments.command not in ("train", "import", "check", "corrupt"):
            raise DiffemError(f"diffem {arguments.command}: unknown argument {rest[0]}")
        status = {
            "train": lambda: _train(arguments, rest),
            "import": lambda: _import(arguments, rest),
            "check": lambda: _check(arguments, rest),
            "corrupt": lambda: _corrupt(arguments, rest),
            "reconstruct": lambda: _reconstruct(arguments),
            "sample": lambda: _sample(arguments),
            "evaluate": lambda: _evaluate(arguments),
            "diagnose": lambda: _diagnose(arguments),
            "export": lambda: _export(arguments),
            "push": lambda: _push(arguments),
            "settings": _settings,
            "status": lambda: _status(arguments),
            "report": lambda: say(str(_report(Path(arguments.run)))),
        }[arguments.command]()
    except ToldElsewhere:
        return 2
    except DiffemError as error:
        _complain(str(error))
        return 2
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror or error}" if error.filename else str(error))
        return 2
    except Stopped as stopped:
        print("diffem: stopped, and saved; run the same command to go on", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("diffem: stopped; run the same command to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    return status or 0


class Stopped(BaseException):
    """A run was stopped by a signal, and has saved its state. No `except Exception` may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def _complain(text: str) -> None:
    """Prints an error on one line; names in it may come from files of strangers."""
    line = printable(" ".join(text.split()))
    sys.stderr.write(
        f"diffem: {line if len(line) <= LONGEST else f'{line[:LONGEST]} ...'}\n"
    )  # at once: of several processes


def say(text: str) -> None:
    """Prints a line; if the reader has gone (`| head`), prints nothing, and the work goes on."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _separate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for argparse, and separately `--section.field value`, whose value argparse would take for the
    preset."""
    words, settings, left = [], [], list(argv)
    while left:
        word = left.pop(0)
        setting = word.startswith("--") and "." in word.partition("=")[0]
        (settings if setting else words).append(word)
        if setting and "=" not in word and left and not left[0].startswith("--"):
            settings.append(left.pop(0))
    return words, settings


def overrides(rest: Sequence[str], command: str = "train") -> list[tuple[str, str]]:
    """Parses settings, `--section.field value`."""
    pairs = list(options(rest, command, "settings are written --section.field value").items())
    for key, _ in pairs:
        if "." not in key:
            raise DiffemError(f"diffem {command}: --{key}: unknown option;{_meant(key)}")
    return pairs


def options(rest: Sequence[str], command: str, otherwise: str = "options are written --name value") -> dict[str, str]:
    """Parses words `--name value` or `--name=value`."""
    found, words = {}, list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise DiffemError(f"diffem {command}: {word}: not understood; {otherwise}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise DiffemError(f"diffem {command}: --{key}: needs a value")
            value = words.pop(0)
        found[key] = value
    return found


def _meant(name: str) -> str:
    """A hint at the settings that an unknown option may mean."""
    from diffem.config import Config

    settings = [f"{section}.{field}" for section, fields in Config().to_dict().items() for field in fields]
    exact = [setting for setting in settings if setting.endswith(f".{name.replace('-', '_')}")]
    close = exact or difflib.get_close_matches(name, settings, n=3, cutoff=0.5)
    return f" did you mean --{' or --'.join(close)}?" if close else " settings are written --section.field value"


def _train(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from diffem import config as configuration
    from diffem import devices, distributed
    from diffem.clean.evaluation import against, check_reference
    from diffem.data import Observations, open_array
    from diffem.em import DiffEM
    from diffem.report import page, pictures
    from diffem.samplers import trained_kind
    from diffem.tracking import track
    from diffem.watch import time_left

    config, place = configuration.load_config(arguments.preset, overrides(rest)), _place(arguments)
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
    own, hooks = _own(arguments), [] if reference is None else [against(reference)]
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
    for row in _until_stopped(em):
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
            f"iteration {row['iteration']:3d} {verdict:8s} {row['score_name']} {row['score']:.4f} +- {row['score_se']:.4f}{ratio} ({row['seconds']:.0f} s){left}"
            + ("" if row["iteration"] else "; scores are in units of half the range of the data")
        )
        if new:
            with contextlib.suppress(OSError):  # a full disk: it is written again at the end
                page.write(out)
    if not distributed.first():
        return
    if not (out / "prior" / "config.json").exists():
        say("no iteration was better than the start: the start is what this run gives, and it has no prior")
    pictures.save(out, observations, em.test, config.em.seed, folder / "clean.npy", **place)
    found = _write_diagnostics(out, observations, False, **place)
    written = page.write(out)
    say(page.summary_table(out))
    _print_warnings(found)
    say(f"report: {written}")


def _refuse_problems(observations: Observations) -> None:
    """Raises a DiffemError if the quick part of `diffem check` finds a problem."""
    from diffem.diagnostics.check import quick

    if problems := quick(observations):
        more = f" (and {len(problems) - 1} more, see diffem check)" if len(problems) > 1 else ""
        first = problems[0]
        raise DiffemError(f"{observations.source}: {first.name}: {first.text}{more}; --force goes on all the same")


def _until_stopped(em: DiffEM) -> Iterator[dict]:
    """The rows of a run. After SIGTERM or Ctrl-C the run saves before it ends; a second signal ends it at once."""

    from diffem import distributed
    from diffem.em import TOGETHER

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


def _place(arguments: argparse.Namespace) -> dict[str, Any]:
    """Device, precision and batch size."""
    if arguments.batch is not None and arguments.batch < 1:
        raise DiffemError(f"diffem {arguments.command}: --batch: must be at least 1, got {arguments.batch}")
    return {"device": arguments.device, "precision": arguments.precision, "batch": arguments.batch}


def _settings() -> None:
    from diffem.config import described

    for name, default, words in described():
        say(f"--{name} {json.dumps(default)}\n    {words}")


def _import(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from diffem.corruptions import from_config
    from diffem.data.readers.importing import import_files
    from diffem.data.readers.source import Options

    given = options(rest, "import")
    if given and arguments.name is None:
        raise DiffemError(
            f"diffem import: --{next(iter(given))}: unknown option; arguments of a corruption need --name"
        )
    corruption = from_config({"name": arguments.name, **given}, "diffem import") if arguments.name else None
    asked = Options(arguments.patch, arguments.hdu, arguments.slices, arguments.columns, arguments.axes)
    imported = import_files(arguments.source, arguments.out, asked, corruption, arguments.range, arguments.overwrite)
    if imported.left_out:
        say(f"left out: {', '.join(imported.left_out[:8])}{', ...' if len(imported.left_out) > 8 else ''}")
    say(f"{imported}, in {arguments.out}")


def _check(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from diffem import config as configuration
    from diffem import memory
    from diffem.cost import forecast
    from diffem.data import Observations
    from diffem.diagnostics.check import Finding, check

    if arguments.estimate:
        return _estimate(arguments)
    if arguments.write or arguments.overwrite:
        raise DiffemError("diffem check: --write and --overwrite: are for --estimate")
    config = configuration.load_config(arguments.preset, overrides(rest, "check"))
    observations = Observations.load(arguments.observations, _own(arguments))
    findings = check(observations, config.em.seed)
    if arguments.preset or rest:
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
    from diffem import files, safe_yaml
    from diffem.corruptions import from_config
    from diffem.data import Observations
    from diffem.data.observations import NO_ARGUMENTS, read_mapping
    from diffem.diagnostics.check import Sample, estimated
    from diffem.diagnostics.noise import described

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


def make_observations(
    config: Config,
    preset: str,
    folder: Path,
    root: str | None = None,
    own: Corruption | type[Corruption] | None = None,
) -> None:
    """Writes the observations that a preset makes from clean data, together with the clean items."""
    from diffem.clean import datasets
    from diffem.corruptions import from_config

    data = config.data
    folder.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(own, type):
        raise DiffemError(f"--corruption {own.__name__}: give a function, or the class a folder of observations")
    corruption = own or from_config(data.corruption, f"{preset}: data.corruption")
    datasets.corrupt(data.source, corruption, folder, root, data.limit or None, config.em.seed, keep_clean=True)


class ProgressBar:
    """A progress bar with the current step, and the time left of the run; silent if standard error is not a terminal."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def update(self, progress: Progress) -> None:
        from tqdm import tqdm

        from diffem.watch import time_left

        what = f"iteration {progress.iteration}, {progress.step}"
        if self.bar is None or self.what != what:
            self.clear()
            self.bar, self.what = tqdm(total=progress.total, leave=False, disable=not sys.stderr.isatty()), what
        loss = "" if progress.loss is None else f": loss {progress.loss:.3f}"
        left = "" if progress.left is None else f"; run: {time_left(progress.left)}"
        self.bar.set_description_str(what + loss + left, refresh=False)
        self.bar.update(progress.done - self.bar.n)

    def clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _corrupt(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from diffem.clean import datasets
    from diffem.corruptions import Corruption, from_config

    corruption, given = _own(arguments), options(rest, "corrupt")
    if isinstance(corruption, Corruption):
        if given:
            raise DiffemError(f"diffem corrupt: --{next(iter(given))}: a function takes no arguments")
    else:
        name = arguments.name if corruption is None else corruption.__name__
        corruption = from_config({"name": name, **given}, "diffem corrupt")
    made = datasets.corrupt(
        arguments.source,
        corruption,
        arguments.out,
        arguments.root,
        arguments.limit,
        arguments.seed,
        arguments.keep_clean,
    )
    say(f"{len(made)} observations of shape {tuple(made.y.shape[1:])} in {arguments.out}")


def _own(arguments: argparse.Namespace) -> Corruption | type[Corruption] | None:
    """The user's own corruption, if one is named."""
    from diffem.corruptions import from_path

    return from_path(arguments.corruption) if arguments.corruption else None


def _model(arguments: argparse.Namespace, name: str) -> Posterior:
    """A model of the run that the arguments name."""
    from diffem.posterior import from_pretrained

    if not (Path(arguments.run) / "config.yaml").exists():
        raise DiffemError(f"{arguments.run}: is not a run folder (no config.yaml)")
    own = _own(arguments)  # importing it registers a class
    given = None if isinstance(own, type) else own
    return from_pretrained(Path(arguments.run) / name, given, device=arguments.device, precision=arguments.precision)


def _observations(folder: str | Path, posterior: Posterior, arguments: argparse.Namespace) -> Observations:
    """The observations of a folder. The folder never names a black box, which is taken from the posterior."""
    from diffem.corruptions import BlackBox
    from diffem.data import Observations

    box = posterior.corruption if isinstance(posterior.corruption, BlackBox) else None
    return Observations.load(folder, _own(arguments) or box)


def _reconstruct(arguments: argparse.Namespace) -> None:
    import numpy as np

    from diffem import files, memory
    from diffem.data.readers.exporting import Export

    place = _place(arguments)
    posterior = _model(arguments, "posterior")
    batch = place["batch"] or posterior.batch
    observations = _observations(arguments.observations, posterior, arguments).images
    posterior.refuse_others(observations)
    _refuse_other_range(Path(arguments.run), observations)
    if arguments.draws < 1:
        raise DiffemError(f"diffem reconstruct: --draws: must be at least 1, got {arguments.draws}")
    out, n = Path(arguments.out), len(observations)
    for name in ("draws.npy", "mean.npy", "std.npy"):
        _refuse_to_overwrite(out / name, arguments)
    export = None
    if arguments.kind is not None:
        export = Export(arguments.observations, arguments.kind, observations.shape, observations.range)
        for name in ("mean", "std", *(f"draw-{m + 1}" for m in range(arguments.draws))):
            _refuse_to_overwrite(out / name, arguments)
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
            std[rows] = block.std(0, correction=min(1, arguments.draws - 1)).numpy()
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


def _facts(run: Path) -> dict:
    """The facts that a run recorded about its training observations; empty if it is not a run."""
    from diffem.run import read_config

    return read_config(run)["facts"] if (run / "config.yaml").exists() else {}


def _refuse_other_range(run: Path, observations: Observations) -> None:
    trained = _facts(run).get("range")
    stated = None if observations.range is None else list(observations.range)
    if stated and trained and stated != trained:
        raise DiffemError(f"{observations.source}: range: {stated}, but {run} was trained on {trained}")


def _refuse_to_overwrite(file: Path, arguments: argparse.Namespace) -> None:
    if file.exists() and not arguments.overwrite:
        raise DiffemError(f"diffem {arguments.command}: --out: {file} is there already; --overwrite replaces it")


def _export(arguments: argparse.Namespace) -> None:
    from diffem.program import users

    _refuse_to_overwrite(Path(arguments.out), arguments)
    posterior, folder = _model(arguments, "posterior"), _trained_on(arguments)
    example: tuple[Any, Any] = (None, None)
    if folder is not None:
        observations = _observations(folder, posterior, arguments)
        example = users(posterior.layout, *observations.batch(range(min(3, len(observations)))))
    size = posterior.export(arguments.out, *example)
    say(f"{arguments.out}: a program for {'any number of' if size is None else size} observations at a time")


def _push(arguments: argparse.Namespace) -> None:
    say(_model(arguments, "posterior").push_to_hub(arguments.name, private=arguments.private))


def _status(arguments: argparse.Namespace) -> None:
    from diffem.watch import status

    found = status(arguments.run)
    say(json.dumps(found.to_dict()) if arguments.json else str(found))


def _sample(arguments: argparse.Namespace) -> None:
    import io

    import numpy as np

    from diffem import files

    if arguments.n < 1:
        raise DiffemError(f"diffem sample: --n: must be at least 1, got {arguments.n}")
    _refuse_to_overwrite(Path(arguments.out), arguments)
    if (Path(arguments.run) / "metrics.jsonl").exists() and not (
        Path(arguments.run) / "prior" / "config.json"
    ).exists():
        raise DiffemError(
            f"{arguments.run}: has no prior: it is not finished, or no iteration was better than its start"
        )
    prior = _model(arguments, "prior")
    Path(arguments.out).resolve().parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.save(stream, prior.generate(arguments.n, arguments.seed, _place(arguments)["batch"]).numpy())
    files.replace(Path(arguments.out), stream.getvalue())
    say(f"{arguments.n} samples in {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from diffem.clean.evaluation import as_text, evaluate

    folder = _trained_on(arguments)
    observations = None if folder is None else _observations(folder, _model(arguments, "posterior"), arguments)
    table = evaluate(arguments.run, arguments.reference, observations, **_place(arguments))
    finite = {k: {name: v if math.isfinite(v) else None for name, v in column.items()} for k, column in table.items()}
    say(json.dumps(finite) if arguments.json else as_text(table))


def _trained_on(arguments: argparse.Namespace) -> Path | None:
    """The observation folder that the arguments name, or else the one that the run read, if it still exists."""
    if arguments.observations:
        return Path(arguments.observations)
    run = Path(arguments.run)
    places = run / "observations", Path(_facts(run).get("source", ""))
    return next((place for place in places if (place / "y.npy").exists()), None)


def _diagnose(arguments: argparse.Namespace) -> None:
    from diffem.corruptions import BlackBox
    from diffem.data import Observations

    run = Path(arguments.run)
    _refuse_foreign(run)
    if isinstance(_model(arguments, "posterior").corruption, BlackBox) and not arguments.corruption:
        raise DiffemError("diffem diagnose: --corruption: the run is of a black box; give it as MODULE:NAME")
    if (folder := _trained_on(arguments)) is None:
        raise DiffemError(f"diffem diagnose: --observations: give the folder of observations that {run} was trained on")
    observations = Observations.load(folder, _own(arguments))
    found = _write_diagnostics(run, observations, arguments.full, **_place(arguments))
    page = _report(run)
    if arguments.json:
        say(json.dumps(found))
    else:
        _print_warnings(found)
        say(f"report: {page}")


def _write_diagnostics(run: Path, observations: Observations, full: bool, **place: Any) -> dict:
    """Writes diagnostics.json into a run folder; returns its content."""
    from diffem import files
    from diffem.diagnostics import diagnose

    found = diagnose(run, observations, full, **place)
    files.replace(run / "diagnostics.json", json.dumps(found, indent=2, allow_nan=False).encode())
    return found


def _print_warnings(found: dict) -> None:
    """Prints the warnings of the diagnostics, or that there are none."""
    for text in found["warnings"] or ["nothing is wrong that held-out observations could show"]:
        say(f"{'warning' if found['warnings'] else 'diagnostics'}: {text}")


def _report(run: Path) -> Path:
    from diffem.report import page

    _refuse_foreign(run)
    return page.write(run)


def _refuse_foreign(run: Path) -> None:
    """Refuses to write into a folder that no run made."""
    if run.is_dir() and not (run / "run.json").exists():
        raise DiffemError(f"{run}: is not a run folder (no run.json); nothing is written there")


if __name__ == "__main__":
    raise SystemExit(main())
