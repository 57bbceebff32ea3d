"""The arguments of every command. Nothing is imported here that takes time, so that --help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from diffem import __version__
from diffem.errors import DiffemError

_TRAIN_HELP = """
examples:
  diffem train digits --out runs/digits            a benchmark that makes its own observations
  diffem train fashion-mask75 --root DATA          a preset on a data set in DATA
  diffem train --observations DIR --out RUN        your own observations
  diffem train digits --em.iterations 30           any setting: --section.field value; `diffem settings` lists them

DIR holds y.npy, mask.npy (or matrix.npy) and corruption.yaml, e.g.
  name: Mask
  noise: 0.01
SIGTERM or Ctrl-C: it saves and ends, usually within seconds, with status 143 or 130; a second one ends it at once.
Run the same command again to go on where a run was stopped, killed, or out of space.
Exit status: 0 finished; 2 an error, told in one line; 143 or 130 stopped by a signal.
"""

_CHECK_HELP = """
examples:
  diffem check DIR                       what stands in the way, before any training
  diffem check DIR digits                and how long a run takes on this machine
  diffem check DIR --em.iterations 30    the same with other settings: --section.field value
  diffem check DIR --estimate            how large the noise is, if you do not know it; --write writes corruption.yaml

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
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # a missing letter must not start a run

    def error(self, message: str):  # an error of one line instead of the usage text
        raise DiffemError(f"{self.prog}: {message}")


def parser() -> argparse.ArgumentParser:
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
        help="minutes between checkpoints: the most work that a killed run loses (default: 5)",
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
    imports.add_argument("--name", help="a corruption, e.g. Mask; its arguments are options, too: --noise 0.01")
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
    corrupt.add_argument("--root", metavar="DIR", help="where the data set lies, if it is not built in")
    corrupt.add_argument("--limit", type=int, metavar="N", help="at most the first N items")
    corrupt.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default: 0)")
    corrupt.add_argument(
        "--keep-clean", action="store_true", help="write clean.npy beside them, for evaluate and report"
    )
    corrupt.add_argument("--out", required=True, metavar="DIR")

    reconstruct = add("reconstruct", "Clean observations, also new ones, with a trained run.")
    reconstruct.add_argument("run", metavar="RUN", help="the run folder")
    reconstruct.add_argument("--observations", required=True, metavar="DIR")
    _add_corruption(reconstruct)
    reconstruct.add_argument(
        "--draws",
        type=int,
        default=8,
        metavar="M",
        help="draws of each observation: 8 suffice for a mean, a standard deviation takes 32 or more (default: 8)",
    )
    reconstruct.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default: 0)")
    _add_device(reconstruct)
    reconstruct.add_argument(
        "--out", required=True, metavar="DIR", help="gets draws.npy (N, M, ...), mean.npy, std.npy"
    )
    reconstruct.add_argument(
        "--as", dest="kind", metavar="FORMAT", help="also as tiff, png, fits, nifti or csv, named like imported files"
    )
    reconstruct.add_argument("--overwrite", action="store_true", help="replace what is there")

    sample = add("sample", "Generate new clean data from the prior of a run.")
    sample.add_argument("run", metavar="RUN", help="the run folder")
    _add_corruption(sample)
    sample.add_argument("--n", type=int, default=64, metavar="N", help="how many items (default: 64)")
    sample.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default: 0)")
    _add_device(sample)
    sample.add_argument("--out", required=True, metavar="FILE", help="a .npy file")
    sample.add_argument("--overwrite", action="store_true", help="replace what is there")

    evaluate = add("evaluate", "Compare a run with clean data.")
    evaluate.add_argument("run", metavar="RUN", help="the run folder")
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
    diagnose.add_argument("run", metavar="RUN", help="the run folder")
    diagnose.add_argument(
        "--observations", metavar="DIR", help="what it was trained on (default: the folder that it read)"
    )
    _add_corruption(diagnose)
    diagnose.add_argument("--full", action="store_true", help="also whether posterior and prior fit each other; slower")
    _add_device(diagnose)
    diagnose.add_argument("--json", action="store_true", help="print JSON")

    export = add("export", "Write a program of torch.export that draws from the posterior of a run without diffem.")
    export.add_argument("run", metavar="RUN", help="the run folder")
    export.add_argument(
        "--observations", metavar="DIR", help="for their shapes (default: the folder that the run read)"
    )
    _add_corruption(export)
    export.add_argument("--out", required=True, metavar="FILE", help="a .pt2 file")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(device="cpu", precision="float32")

    push = add("push", "Upload the posterior of a run, with a model card, to the Hugging Face Hub.")
    push.add_argument("run", metavar="RUN", help="the run folder")
    push.add_argument("name", metavar="OWNER/NAME", help="the repository on the hub")
    _add_corruption(push)
    push.add_argument("--private", action="store_true", help="only its owner may see it, if it is new")
    push.set_defaults(device="cpu", precision="float32")

    add("settings", "List every setting of a run, with its default.")

    status = add("status", "Say how far a run is and how long it still takes, while it runs or afterwards.")
    status.add_argument("run", metavar="RUN", help="the run folder")
    status.add_argument("--json", action="store_true", help="print JSON")

    report = add("report", "Write report.html of a run again.")
    report.add_argument("run", metavar="RUN", help="the run folder")
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


def separate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
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
