"""The report of a run folder: pictures, and one self-contained HTML page.

Read from the run folder:

    metrics.jsonl     one JSON object per line, line 1 the start (iteration 0); needed
    config.yaml       shown unchanged
    start.json        the kind and parameters of the start
    diagnostics.json  the results of `diffem diagnose`
    pictures.npz      y, mask, mean, std, draws, start, clean, samples and range, in the units of y

Written to it: reconstructions.png, samples.png and report.html. Curves and pictures are embedded in the page as data
URIs, one version for light and one for dark mode, so that the page can be mailed and opened offline.
"""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffem import files, reading
from diffem.diagnostics.diagnose import p_words
from diffem.diagnostics.divergence import COMPARISONS
from diffem.diagnostics.scores import OVER_CONFIDENT, UNDER_CONFIDENT
from diffem.errors import DiffemError
from diffem.report import drawing
from diffem.report.drawing import ITEMS, Figure, Pictures, Row, finite, seen_entries, std_limit, uri
from diffem.watch import best_row, model_of, read_metrics, status, time_left

SCORES = {"crps": "CRPS", "energy_distance": "energy distance"}
SAMPLES_OF = {"reconstructions": "reconstructions, re-corrupted", "prior": "prior samples, re-corrupted"}
FREE, DENSEST = 2**26, 100  # pictures may take this many bytes, or this many for each byte that is stored
CLEAN = {"psnr": "PSNR of one draw [dB]", "energy_distance": "energy distance of the reconstructions"}


# Reading a run folder


@dataclass(frozen=True)
class Run:
    """The metrics of a run folder."""

    folder: Path
    rows: list[Row]

    @property
    def start(self) -> Row:
        """The start, scored on the same observations as the final model."""
        return {name: self.final.get(f"start_{name}", value) for name, value in self.rows[0].items()}

    @property
    def final(self) -> Row:
        """The row of the final model, or of the best one so far."""
        return best_row(self.rows)

    @property
    def chosen(self) -> int:
        """The iteration of the final model."""
        return model_of(self.final)

    @property
    def iterations(self) -> list[Row]:
        """The rows that are comparable: all but the last row of a finished run, which is scored on test
        observations."""
        return [row for row in self.rows if "final" not in row]

    @property
    def score_name(self) -> str:
        name = str(self.start.get("score_name") or "score")
        return SCORES.get(name, name.replace("_", " "))


def _load(folder: str | Path) -> Run:
    folder = Path(folder)
    if not folder.is_dir():
        raise DiffemError(f"{folder}: no such run folder")
    return Run(folder, read_metrics(folder))


def _load_pictures(folder: Path) -> dict[str, NDArray] | None:
    file = folder / "pictures.npz"
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            size, stored = sum(info.file_size for info in archive.infolist()), file.stat().st_size
        if size > max(FREE, DENSEST * stored):
            raise DiffemError(f"{file}: declares {size:,} bytes, but stores {stored:,}; not read")
        with np.load(file, allow_pickle=False) as archive:
            pictures = {name: archive[name] for name in archive.files}
    except DiffemError:
        raise
    except Exception as error:  # of many kinds: the headers in it are Python
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise DiffemError(f"{file}: cannot be read: {said}") from None
    for name in ("mean", "std", "draws"):
        if name not in pictures:
            raise DiffemError(f"{file}: lacks the array `{name}`")
    mean, std, draws = pictures["mean"], pictures["std"], pictures["draws"]
    if mean.ndim < 2 or 0 in draws.shape or std.shape != mean.shape or draws.shape[:1] + draws.shape[2:] != mean.shape:
        raise DiffemError(f"{file}: mean {mean.shape}, std {std.shape} and draws {draws.shape} do not fit each other")
    for name, item in (("start", mean.shape), ("clean", mean.shape), ("samples", (None, *mean.shape[1:]))):
        if name in pictures and pictures[name].shape[1:] != item[1:]:
            raise DiffemError(f"{file}: {name} has shape {pictures[name].shape}, items have {mean.shape[1:]}")
        if name in pictures and item[0] is not None and len(pictures[name]) != item[0]:
            raise DiffemError(f"{file}: {name} has {len(pictures[name])} items, mean has {item[0]}")
    if "y" in pictures:
        y = pictures["y"]
        if len(y) != len(mean):
            raise DiffemError(f"{file}: y has {len(y)} items, mean has {len(mean)}")
        if "mask" in pictures:
            try:
                np.broadcast_to(pictures["mask"], y.shape)
            except ValueError:
                raise DiffemError(f"{file}: the mask {pictures['mask'].shape} does not fit y {y.shape}") from None
    if "range" in pictures and pictures["range"].shape != (2,):
        raise DiffemError(f"{file}: range must hold [low, high], has shape {pictures['range'].shape}")
    return pictures


def _load_diagnostics(run: Run) -> dict[str, Any] | None:
    """The diagnostics of the final models; None if those in the folder are of earlier models."""
    file = run.folder / "diagnostics.json"
    found = _read_json(file)
    if found is not None and not isinstance(found.get("warnings"), list):
        raise DiffemError(f"{file}: holds no `warnings`; run diffem diagnose again")
    return found if found and found.get("iteration") == run.chosen else None


def _read_json(file: Path) -> dict[str, Any] | None:
    text = _read_text(file)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DiffemError(f"{file}: is not JSON of a dictionary")
    return content


def _read_text(file: Path) -> str | None:
    try:
        return reading.read(file).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DiffemError(f"{file}: cannot be read: {error}") from None


@contextlib.contextmanager
def _reading(file: Path, remedy: str) -> Iterator[None]:
    """Turns errors about content that is not as diffem writes it into one line that names its file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DiffemError(f"{file}: is not what diffem writes ({what}); {remedy}") from error


# Numbers and words


def _decimals(run: Run) -> int:
    """The number of decimals that shows three digits of the score and one of every standard error."""
    decimals = 0
    for row in (run.start, run.final):
        if score := finite(row, "score"):
            decimals = max(decimals, 2 - math.floor(math.log10(abs(score))))
        for key in ("score_se", "start_delta_se"):
            if (error := finite(row, key)) and error > 0:
                decimals = max(decimals, -math.floor(math.log10(error)))
    return min(decimals, 6)


def _fixed(value: float | None, decimals: int, error: float | None = None) -> str:
    if value is None:
        return "–"
    text = f"{value:z.{decimals}f}"
    return text if error is None else f"{text} ± {error:.{decimals}f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _confidence(ratio: float) -> str:
    if ratio < OVER_CONFIDENT:
        return "over-confident, the draws vary too little"
    if ratio > UNDER_CONFIDENT:
        return "under-confident, the draws vary too much"
    return "honest uncertainty"


def _verdict(run: Run, diagnostics: Mapping[str, Any] | None = None) -> str:
    """In words: how the final model compares with the start, and the number of warnings (or the ratio, if there are no
    diagnostics)."""
    start, final, decimals = run.start, run.final, _decimals(run)
    score, start_score = finite(final, "score"), finite(start, "score")
    delta, error = finite(final, "start_delta"), finite(final, "start_delta_se")
    if len(run.rows) == 1:
        text = "Only the start has been scored so far; the start is saved."
    elif run.chosen == 0:
        text = "Nothing beat the start; the start is saved."
    else:
        if delta is None and score is not None and start_score is not None:
            delta, error = score - start_score, None
        if delta is None:
            relation = "is the best"
        elif delta + 2 * (error or 0) < 0:
            relation = "is better than the start on held-out observations"
        elif delta < 0:
            relation = "is not clearly better than the start on held-out observations"
        else:
            relation = "is no better than the start on held-out observations"
        scores = f"{_fixed(score, decimals)} against {_fixed(start_score, decimals)}"
        text = f"Iteration {run.chosen} {relation}: {run.score_name} {scores}"
        text += f" (difference {_fixed(delta, decimals, error)})." if delta is not None else "."
    if diagnostics is not None:
        count = len(diagnostics["warnings"])
        said = (
            f"with {count} warning{'s' * (count != 1)}:" if count else "and held-out observations show nothing wrong."
        )
        text = f"{text[:-1]}, {said}"
    elif (ratio := finite(final, "ratio")) is not None:
        text += f" Calibration ratio {ratio:.2f}: {_confidence(ratio)}."
    return text


def _table(run: Run) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Column headings; rows from observations alone; rows that needed clean data."""
    start, final, decimals = run.start, run.final, _decimals(run)
    models = [start, final] if run.chosen else [start]
    heads = ["start", f"iteration {run.chosen}"] if run.chosen else ["start"]
    rows = [
        [
            f"{run.score_name}, held out",
            *(_fixed(finite(m, "score"), decimals, finite(m, "score_se")) for m in models),
        ]
    ]
    if run.chosen:
        difference = _fixed(finite(final, "start_delta"), decimals, finite(final, "start_delta_se"))
        rows.append(["paired difference to the start", "–", difference])
    rows.append(["calibration ratio", *(_fixed(finite(m, "ratio"), 2) for m in models)])
    if any(finite(m, "width") is not None for m in models):
        rows.append(["width of the draws", *(_fixed(finite(m, "width"), 2) for m in models)])
    cleans = [m["clean"] if isinstance(m.get("clean"), dict) else {} for m in models]
    clean_rows = []
    for key in dict.fromkeys(key for clean in cleans for key in clean):
        values = [finite(clean, key) for clean in cleans]
        if any(value is not None for value in values):
            label = CLEAN.get(key, key.replace("_", " "))
            clean_rows.append(
                [label, *(("–" if v is None else f"{v:.2f}" if key == "psnr" else f"{v:.3g}") for v in values)]
            )
    return heads, rows, clean_rows


def _divergence_table(diagnostics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Column headings, and a row for each comparison of samples with observations."""
    tables = diagnostics.get("divergence")
    if not tables:
        return None
    rows = [
        [label, *(f"{table[name]:.3g} ({p_words(table[name + '_p_value'])})" for table in tables.values())]
        for name, label in COMPARISONS.items()
    ]
    rows.append(["all of them (Bonferroni)", *(p_words(table["p_value"]) for table in tables.values())])
    return [SAMPLES_OF[name] for name in tables], rows


def _collapse_table(diagnostics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    numbers = diagnostics.get("collapse")
    if not numbers:
        return None
    rows = [
        [
            name.replace("_", " "),
            f"{row['value']:.2f} ± {row['error']:.2f}" + (" (warning)" if row["warning"] else ""),
            f"{row['healthy']:.2f}",
            row["meaning"],
        ]
        for name, row in numbers.items()
    ]
    return ["value", "if all is well", "what it is"], rows


def summary_table(run: str | Path) -> str:
    """The metrics of the start and of the final model of a run, as plain text for a terminal.

    Raises:
        DiffemError: If `run` is not the folder of a run.
    """
    heads, rows, clean_rows = _table(_load(run))
    lines = [["", *heads], *rows, *([f"{label} (clean data)", *values] for label, *values in clean_rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# The page


def _start_words(folder: Path) -> str | None:
    start = _read_json(folder / "start.json")
    if start is None:
        return None
    parts = [str(start.get("kind", "start")).replace("_", " ")]
    count = start.get("components")
    parts += [] if count is None else [f"{count} component" + "s" * (count != 1)]
    parts += [f"rank {start[key]}" for key in ("rank",) if start.get(key) is not None]
    return ", ".join(parts)


def _captions(pictures: Pictures) -> tuple[str, str]:
    dimensions = pictures["mean"].ndim - 1
    if dimensions >= 3:
        blank = " Pale blue was not observed." if "y" in pictures and not seen_entries(pictures).all() else ""
        part = drawing.shown(pictures["mean"].shape[1:])
        part = f" {part}" if part else ""
        return (
            f"One held-out observation per row, and what the models make of it.{part}{blank}"
            f" The standard deviation of the draws runs from 0 (black) to {std_limit(pictures):.3g} (bright).",
            "New items that the final model draws from its prior, without any observation.",
        )
    if dimensions == 2:
        return (
            "One held-out observation per row: the mean of the draws and a band of two standard deviations around it.",
            "New signals that the final model draws from its prior, without any observation.",
        )
    return (
        "Draws of the final model given held-out observations, over draws of the start for the same observations.",
        "New vectors that the final model draws from its prior, over draws of the start.",
    )


def _images(folder: Path, pictures: Pictures) -> list[Figure]:
    """The pictures of the run's items, which are also saved in its folder as PNG."""
    about = {
        "reconstructions": (
            "Reconstructions",
            f"Reconstructions of {min(len(pictures['mean']), ITEMS)} held-out observations",
        ),
        "samples": ("Samples from the prior", "Samples from the learned prior"),
    }
    captions = dict(zip(about, _captions(pictures), strict=True))
    images = []
    for name, drawn in drawing.draw(folder, pictures).items():
        if drawn:
            title, alt = about[name]
            versions = [uri(version, "image/png") for version in drawn]
            images.append({"name": name, "title": title, "caption": captions[name], "alt": alt, "versions": versions})
    return images


def _unfinished(folder: Path) -> str | None:
    """In words: how far a run is that is not finished; None if it is, or if its checkpoint is not there."""
    if not (folder / "checkpoint.safetensors").exists() or (now := status(folder)).step == "done":
        return None
    left = "" if now.seconds_left is None else f", {time_left(now.seconds_left)}"
    return f"This run is not finished: {now.finished} of {now.iterations} iterations are done{left}."


def _cost(run: Run, diagnostics: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    totals = {
        key: sum(finite(row, key) or 0.0 for row in run.rows)
        for key in ("seconds", "score_seconds", "examples", "network_evaluations")
    }
    file = run.folder / "prior.json"
    if (prior := _read_json(file)) is not None:
        with _reading(file, "remove it"):
            totals["seconds"] += prior["seconds"]
            totals["examples"] += prior["examples"]
            totals["network_evaluations"] += 3 * prior["examples"]
    refused = sum(not row.get("accepted") for row in run.rows[1:])
    seconds = finite(diagnostics or {}, "seconds")
    checked = [] if seconds is None else [("time of the diagnostics", _duration(seconds))]
    return [
        (
            "iterations",
            f"{sum(finite(row, 'loss') is not None for row in run.rows)}"
            + (f", {refused} of them refused" if refused else ""),
        ),
        ("time", _duration(totals["seconds"])),
        ("of it, scores of the iterations", _duration(totals["score_seconds"])),
        *checked,
        ("training examples", f"{totals['examples']:,.0f}"),
        ("network evaluations", f"{totals['network_evaluations']:,.0f}"),
    ]


def write(run: str | Path) -> Path:
    """Draws the pictures of a run folder and writes its report.html.

    Arguments:
        run: The run folder. Without pictures.npz the report has no pictures.

    Returns:
        The path of report.html.

    Raises:
        DiffemError: If `run` is not the folder of a run, or one of its files cannot be read.
    """
    import jinja2

    folder = Path(run)
    loaded, pictures = _load(folder), _load_pictures(folder)
    heads, rows, clean_rows = _table(loaded)
    diagnostics = _load_diagnostics(loaded)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        resources.files("diffem.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    warnings = [] if diagnostics is None else diagnostics["warnings"]
    with _reading(folder / "diagnostics.json", "run diffem diagnose again"):
        consistency = (diagnostics or {}).get("self_consistency")
        told = {
            "calibration": drawing.calibration(diagnostics or {}),
            "divergence": _divergence_table(diagnostics or {}),
            "consistency": None if consistency is None else p_words(consistency["p_value"]),
            "collapse": _collapse_table(diagnostics or {}),
        }
    with _reading(folder / "pictures.npz", "remove it"):
        images = [] if pictures is None else _images(folder, pictures)
    ratio = finite(loaded.final, "ratio")
    honest = ratio is None or OVER_CONFIDENT <= ratio <= UNDER_CONFIDENT
    with _reading(folder / "metrics.jsonl", "run the same command again"):
        page = template.render(
            name=folder.resolve().name,
            verdict=_verdict(loaded, diagnostics),
            unfinished=_unfinished(folder),
            warnings=warnings,
            good=loaded.chosen > 0 and honest and not warnings,
            heads=heads,
            rows=rows,
            clean_rows=clean_rows,
            start=_start_words(folder),
            curves=drawing.curves(loaded.iterations, loaded.chosen, loaded.score_name),
            **told,
            images=images,
            score_name=loaded.score_name,
            crps=loaded.score_name == "CRPS",
            cost=_cost(loaded, diagnostics),
            config=_read_text(folder / "config.yaml"),
        )
    file = folder / "report.html"
    files.replace(file, page.encode())
    return file
