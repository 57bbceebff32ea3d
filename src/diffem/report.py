"""The report of a run folder: pictures, and one HTML page that needs nothing else.

Read from the run folder:

    metrics.jsonl   one JSON object per line, line 1 the start (iteration 0); needed
    config.yaml     shown as it is
    start.json      what the start is made of
    pictures.npz    y, mask, mean, std, draws, start, clean, samples and range, in the units of y

Written to it: reconstructions.png, samples.png and report.html. Curves and pictures sit inside the page as data
URIs, each once for a light and once for a dark page, so that it can be mailed and opened without a network.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from diffem.errors import DiffemError

Row = dict[str, Any]
Pictures = Mapping[str, NDArray]
Tile = NDArray  # uint8, (height, width, 3)

ITEMS, DRAWS, SAMPLES = 8, 3, 64  # the most that a picture shows
LARGEST = 192  # pixels that one image of a grid may take; larger ones are averaged down
HEAVY = 1_000_000  # bytes; a larger picture is drawn for the light page only, and used on both
UNOBSERVED = (178, 198, 226)
OVER_CONFIDENT, UNDER_CONFIDENT = 0.75, 1.25
SCORES = {"crps": "CRPS", "energy_distance": "energy distance"}
CLEAN = {"psnr": "PSNR of one draw [dB]", "energy_distance": "energy distance of the reconstructions"}


@dataclass(frozen=True)
class Theme:
    page: str
    text: str
    muted: str
    grid: str
    main: str
    refused: str
    chosen: str


LIGHT = Theme("#ffffff", "#1f2328", "#8b949e", "#d8dee4", "#0969da", "#cf222e", "#bf5b04")
DARK = Theme("#161b22", "#e6edf3", "#7d8590", "#30363d", "#58a6ff", "#ff7b72", "#f2a33a")
THEMES = (LIGHT, DARK)


# Reading a run folder


@dataclass(frozen=True)
class Run:
    """What a run folder says about its models."""

    folder: Path
    rows: list[Row]

    @property
    def start(self) -> Row:
        return self.rows[0]

    @property
    def final(self) -> Row:
        """The model that the run ends with: the last accepted row, or else the start."""
        return next((row for row in reversed(self.rows) if row.get("accepted")), self.start)

    @property
    def score_name(self) -> str:
        name = str(self.start.get("score_name") or "score")
        return SCORES.get(name, name.replace("_", " "))


def _load(folder: str | Path) -> Run:
    folder = Path(folder)
    if not folder.is_dir():
        raise DiffemError(f"{folder}: no such run folder")
    file = folder / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        raise DiffemError(f"{file}: missing; is {folder} the folder of a run?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DiffemError(f"{file}: cannot be read: {error}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # A number that is not finite is as good as none: it would only break curves and tables.
            row = json.loads(line, parse_constant=lambda _: None)
        except json.JSONDecodeError:
            if number == len(lines) and not line.endswith("\n") and rows:
                break  # the run is writing it now, or was stopped while it did
            raise DiffemError(f"{file}: line {number} is not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("iteration"), int) or "score" not in row:
            raise DiffemError(f"{file}: line {number} needs at least an `iteration` and a `score`")
        rows.append(row)
    if not rows:
        raise DiffemError(f"{file}: holds no rows; the run has not scored its start yet")
    return Run(folder, rows)


def _load_pictures(folder: Path) -> dict[str, NDArray] | None:
    file = folder / "pictures.npz"
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            pictures = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DiffemError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
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


# Numbers and words


def _finite(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _decimals(run: Run) -> int:
    """Enough for three digits of the score and one of every standard error that is shown."""
    decimals = 0
    for row in (run.start, run.final):
        if score := _finite(row, "score"):
            decimals = max(decimals, 2 - math.floor(math.log10(abs(score))))
        for key in ("score_se", "start_delta_se"):
            if (error := _finite(row, key)) and error > 0:
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


def _verdict(run: Run) -> str:
    start, final, decimals = run.start, run.final, _decimals(run)
    score, start_score = _finite(final, "score"), _finite(start, "score")
    delta, error = _finite(final, "start_delta"), _finite(final, "start_delta_se")
    if len(run.rows) == 1:
        text = "Only the start has been scored so far; the start is saved."
    elif final is start:
        text = "Nothing beat the start; the start is saved."
    else:
        if delta is None and score is not None and start_score is not None:
            delta, error = score - start_score, None
        if delta is None:
            relation = "was accepted"
        elif delta + 2 * (error or 0) < 0:
            relation = "is better than the start on held-out observations"
        elif delta < 0:
            relation = "is not clearly better than the start on held-out observations"
        else:
            relation = "is no better than the start on held-out observations"
        scores = f"{_fixed(score, decimals)} against {_fixed(start_score, decimals)}"
        text = f"Iteration {final['iteration']} {relation}: {run.score_name} {scores}"
        text += f" (difference {_fixed(delta, decimals, error)})." if delta is not None else "."
    if (ratio := _finite(final, "ratio")) is not None:
        text += f" Calibration ratio {ratio:.2f}: {_confidence(ratio)}."
    return text


def _table(run: Run) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Column headings; rows from observations alone; rows that needed clean data."""
    start, final, decimals = run.start, run.final, _decimals(run)
    models = [start] if final is start else [start, final]
    heads = ["start"] if final is start else ["start", f"iteration {final['iteration']}"]
    rows = [
        [
            f"{run.score_name}, held out",
            *(_fixed(_finite(m, "score"), decimals, _finite(m, "score_se")) for m in models),
        ]
    ]
    if final is not start:
        difference = _fixed(_finite(final, "start_delta"), decimals, _finite(final, "start_delta_se"))
        rows.append(["paired difference to the start", "–", difference])
    rows.append(["calibration ratio", *(_fixed(_finite(m, "ratio"), 2) for m in models)])
    if any(_finite(m, "dispersion") is not None for m in models):
        rows.append(["E-step share of the residual variance", *(_fixed(_finite(m, "dispersion"), 2) for m in models)])
    cleans = [m["clean"] if isinstance(m.get("clean"), dict) else {} for m in models]
    clean_rows = []
    for key in dict.fromkeys(key for clean in cleans for key in clean):
        values = [_finite(clean, key) for clean in cleans]
        if any(value is not None for value in values):
            label = CLEAN.get(key, key.replace("_", " "))
            clean_rows.append(
                [label, *(("–" if v is None else f"{v:.2f}" if key == "psnr" else f"{v:.3g}") for v in values)]
            )
    return heads, rows, clean_rows


def summary_table(run: str | Path) -> str:
    """The start and the final model of a run in figures, as plain text for a terminal.

    Raises:
        DiffemError: If `run` is not the folder of a run.
    """
    heads, rows, clean_rows = _table(_load(run))
    lines = [["", *heads], *rows, *([f"{label} (clean data)", *values] for label, *values in clean_rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# Pictures of images


def image_grid(
    file: str | Path | IO[bytes],
    rows: Sequence[Sequence[Tile | None]],
    headings: Sequence[str] = (),
    theme: Theme = LIGHT,
) -> None:
    """Saves a grid of images as a PNG; small ones are enlarged by a whole factor, so that pixels stay sharp.

    Arguments:
        file: Where to.
        rows: Rows of uint8 images (height, width, 3); None leaves a place empty. An image that is smaller than the
            largest is stretched to its size.
        headings: One per column, or none.
        theme: The colours of text and ground.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles = [tile for row in rows for tile in row if tile is not None]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    side, target = max(height, width), 88 if headings else 56
    if side > LARGEST:
        factor = LARGEST / side
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
    else:
        factor = math.ceil(target / side)
        height, width = height * factor, width * factor
    gap, top = 4, 24 if headings else 0
    font = ImageFont.load_default(13)
    cell = max([width, *(math.ceil(font.getlength(heading)) + 4 for heading in headings)])
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (gap + columns * (cell + gap), gap + top + len(rows) * (height + gap)), theme.page)
    pen = ImageDraw.Draw(grid)
    for column, heading in enumerate(headings):
        pen.text(
            (gap + column * (cell + gap) + cell // 2, gap + top // 2), heading, fill=theme.text, font=font, anchor="mm"
        )
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if tile is not None:
                how = Image.Resampling.BOX if max(tile.shape[:2]) > LARGEST else Image.Resampling.NEAREST
                image = Image.fromarray(np.ascontiguousarray(tile)).resize((width, height), how)
                grid.paste(image, (gap + j * (cell + gap) + (cell - width) // 2, gap + top + i * (height + gap)))
    grid.save(file, format="PNG", optimize=True)


def _plane(x: NDArray) -> NDArray:
    """One item as (1 or 3, height, width): the first channel of many, the middle slice of a volume."""
    while x.ndim > 3:
        x = x[:, x.shape[1] // 2]
    return x if len(x) in (1, 3) else x[:1]


def _tile(x: NDArray, low: float, high: float) -> Tile:
    x = np.nan_to_num(np.clip((_plane(x).astype(np.float64) - low) / (high - low), 0, 1))
    return np.broadcast_to(np.rint(255 * x).astype(np.uint8).transpose(1, 2, 0), (*x.shape[1:], 3))


def _observation_tile(y: NDArray, seen: NDArray, low: float, high: float) -> Tile:
    seen = _plane(seen)
    plane = np.where(seen, _plane(y), (low + high) / 2)
    tile = _tile(plane, low, high).copy()
    tile[~seen.any(axis=0)] = UNOBSERVED
    return tile


def _std_tile(std: NDArray, high: float) -> Tile:
    import matplotlib

    plane = np.nan_to_num(_plane(std).astype(np.float64)).mean(axis=0)
    return matplotlib.colormaps["magma"](np.clip(plane / high, 0, 1), bytes=True)[..., :3]


def _seen(pictures: Pictures) -> NDArray:
    """True where y was observed, in the shape of y."""
    seen = np.isfinite(pictures["y"])
    return seen & pictures["mask"].astype(bool) if "mask" in pictures else seen


def _limits(pictures: Pictures) -> tuple[float, float]:
    values = pictures["range"] if "range" in pictures else np.percentile(np.nan_to_num(pictures["draws"]), (0.5, 99.5))
    low, high = float(values[0]), float(values[-1])
    return (low, high) if low < high else (low - 1, low + 1)


def _std_limit(pictures: Pictures) -> float:
    top = max(float(np.nan_to_num(_plane(std)).mean(axis=0).max()) for std in pictures["std"][:ITEMS])
    return top if top > 0 else 1.0


def _image_columns(pictures: Pictures) -> dict[str, list[Tile]]:
    n, (low, high) = min(len(pictures["mean"]), ITEMS), _limits(pictures)
    dimensions = pictures["mean"].ndim

    def tiles(items: NDArray) -> list[Tile]:
        return [_tile(item, low, high) for item in items[:n]]

    columns: dict[str, list[Tile]] = {}
    if "y" in pictures and pictures["y"].ndim == dimensions:
        seen = _seen(pictures)
        columns["observation"] = [_observation_tile(pictures["y"][i], seen[i], low, high) for i in range(n)]
    if "start" in pictures:
        columns["start draw"] = tiles(pictures["start"])
    for k in range(min(DRAWS, pictures["draws"].shape[1])):
        columns[f"draw {k + 1}"] = tiles(pictures["draws"][:, k])
    columns["mean"] = tiles(pictures["mean"])
    columns["std. dev."] = [_std_tile(std, _std_limit(pictures)) for std in pictures["std"][:n]]
    if "clean" in pictures:
        columns["clean"] = tiles(pictures["clean"])
    return columns


# Figures by matplotlib


@contextlib.contextmanager
def _figure(
    file: str | Path | IO[bytes], theme: Theme, width: float, height: float, format: str = "png"
) -> Iterator[Any]:
    """A figure in the colours of a theme that is saved at the end; pyplot and its global state are left alone."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    style = {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": theme.text,
        "axes.prop_cycle": cycler(color=[theme.main, theme.chosen, theme.refused]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 10,
        "figure.facecolor": theme.page,
        "font.size": 10,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.labelcolor": theme.text,
        "savefig.facecolor": theme.page,
        "svg.hashsalt": "diffem",
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(file, format=format, dpi=120, metadata={"Date": None} if format == "svg" else None)


def _scatter(file: str | Path | IO[bytes], clouds: Mapping[str, NDArray], theme: Theme) -> None:
    """Clouds of vectors, (points, features), the first underneath: coordinate 1 against 2, and against 3."""
    features = next(iter(clouds.values())).shape[1]
    colours = {"start draws": theme.muted, "draws": theme.main, "samples": theme.main, "clean": theme.chosen}
    others = list(range(1, min(features, 3)))
    with _figure(file, theme, 4.2 * max(1, len(others)), 3.9) as figure:
        for axes, other in zip(np.ravel(figure.subplots(1, max(1, len(others)))), others or [None], strict=True):
            for name, points in clouds.items():
                points = points[np.isfinite(points).all(axis=1)][:4000]
                if not len(points):
                    continue
                if other is None:
                    axes.hist(
                        points[:, 0],
                        bins=30,
                        density=True,
                        histtype="step",
                        color=colours[name],
                        label=name,
                        linewidth=1.5,
                    )
                else:
                    size = 6 if len(points) > 500 else 14
                    axes.scatter(
                        points[:, 0], points[:, other], s=size, color=colours[name], alpha=0.6, linewidths=0, label=name
                    )
            axes.set_xlabel("coordinate 1")
            axes.set_ylabel("density" if other is None else f"coordinate {other + 1}")
        handles, labels = axes.get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=len(clouds), markerscale=2)
        for handle in legend.legend_handles:
            handle.set_alpha(1)


def _signals(file: str | Path | IO[bytes], pictures: Pictures, theme: Theme) -> None:
    """Signals (channels, length): the mean with a band of two standard deviations, one row per item."""
    mean, std = pictures["mean"], pictures["std"]
    n, channels, length = min(len(mean), 6), min(mean.shape[1], 3), mean.shape[2]
    time = np.arange(length)
    seen = _seen(pictures) if "y" in pictures and pictures["y"].shape[1:] == mean.shape[1:] else None
    with _figure(file, theme, max(7, 3.6 * channels), 0.5 + 1.5 * n) as figure:
        grid = figure.subplots(n, channels, squeeze=False, sharex=True)
        for i in range(n):
            for c in range(channels):
                axes, m, s = grid[i, c], mean[i, c], std[i, c]
                if "start" in pictures:
                    axes.plot(time, pictures["start"][i, c], color=theme.muted, linewidth=0.8, label="start draw")
                axes.fill_between(
                    time, m - 2 * s, m + 2 * s, color=theme.main, alpha=0.25, linewidth=0, label="mean ± 2 std. dev."
                )
                axes.plot(time, m, color=theme.main, linewidth=1.4, label="mean")
                if "clean" in pictures:
                    axes.plot(
                        time, pictures["clean"][i, c], color=theme.chosen, linewidth=1, linestyle="--", label="clean"
                    )
                if seen is not None:
                    where = seen[i, c]
                    axes.plot(
                        time[where], pictures["y"][i, c][where], ".", color=theme.text, markersize=4, label="observed"
                    )
                if i == 0 and channels > 1:
                    axes.set_title(f"channel {c + 1}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5)


def _signal_samples(file: str | Path | IO[bytes], samples: NDArray, theme: Theme) -> None:
    columns = min(len(samples), 3)
    k = min(len(samples) // columns * columns, 12)
    with _figure(file, theme, 8, 0.3 + 1.4 * k // columns) as figure:
        grid = figure.subplots(k // columns, columns, squeeze=False, sharex=True, sharey=True)
        for i, axes in enumerate(np.ravel(grid)):
            axes.plot(samples[i, :3].T, linewidth=1)


def _draw(folder: Path, pictures: Pictures) -> dict[str, list[bytes]]:
    """The pictures as PNG files in the run folder, and as bytes for each theme."""
    mean, samples = pictures["mean"], pictures.get("samples")
    dimensions = mean.ndim - 1
    if samples is not None and not len(samples):
        samples = None
    drawn: dict[str, list[bytes]] = {"reconstructions": [], "samples": []}
    flat = {"start draws": pictures["start"]} if "start" in pictures else {}
    clean = {"clean": pictures["clean"]} if "clean" in pictures else {}
    columns = _image_columns(pictures) if dimensions >= 3 else {}
    rows = list(zip(*columns.values(), strict=True))
    across = 16 if max(mean.shape[1:][-2:]) <= 64 else 8
    for theme in THEMES:
        first, second = io.BytesIO(), io.BytesIO()
        if dimensions >= 3:
            image_grid(first, rows, list(columns), theme)
            if samples is not None:
                tiles = [_tile(sample, *_limits(pictures)) for sample in samples[:SAMPLES]]
                image_grid(second, [tiles[k : k + across] for k in range(0, len(tiles), across)], (), theme)
        elif dimensions == 2:
            _signals(first, pictures, theme)
            if samples is not None:
                _signal_samples(second, samples, theme)
        else:
            draws = pictures["draws"]
            _scatter(first, {**flat, "draws": draws.reshape(-1, draws.shape[-1]), **clean}, theme)
            if samples is not None:
                _scatter(second, {**flat, "samples": samples, **clean}, theme)
        for name, picture in (("reconstructions", first.getvalue()), ("samples", second.getvalue())):
            if picture and (theme is LIGHT or len(picture) <= HEAVY):
                drawn[name].append(picture)
    for name, versions in drawn.items():
        if versions:
            (folder / f"{name}.png").write_bytes(versions[0])
    return drawn


# Curves


def _series(rows: Sequence[Row], *keys: str) -> tuple[list[Row], list[NDArray]]:
    """The rows that have a number for the first key, and the columns of all keys, 0 where there is none."""
    rows = [row for row in rows if _finite(row, keys[0]) is not None]
    return rows, [np.array([_finite(row, key) or 0.0 for row in rows]) for key in ("iteration", *keys)]


def _markers(axes: Any, run: Run, rows: Sequence[Row], x: NDArray, y: NDArray, theme: Theme) -> None:
    final = np.array([row is run.final for row in rows], dtype=bool)
    accepted = np.array([bool(row.get("accepted")) or row is run.start for row in rows], dtype=bool) & ~final
    refused = ~accepted & ~final
    axes.plot(x, y, color=theme.main, linewidth=1, alpha=0.6, zorder=2)
    if accepted.any():
        axes.plot(x[accepted], y[accepted], "o", color=theme.main, markersize=5, label="accepted")
    if refused.any():
        axes.plot(
            x[refused], y[refused], "o", color=theme.refused, markerfacecolor=theme.page, markersize=5, label="refused"
        )
    if final.any():
        axes.plot(x[final], y[final], "*", color=theme.chosen, markersize=13, label="saved")


def _curves(run: Run) -> list[dict[str, Any]]:
    """One curve per quantity that the run has: a caption, an alternative text and an SVG for each theme."""
    score = f"{run.score_name[:1].upper()}{run.score_name[1:]} of held-out observations, lower is better"
    band = f"{OVER_CONFIDENT} to {UNDER_CONFIDENT}, honest uncertainty"
    wanted = [
        (f"{score}; band: ± 2 standard errors", ("score", "score_se"), run.score_name),
        (f"Calibration ratio; shaded: {band}", ("ratio",), "calibration ratio"),
        ("Training loss per iteration", ("loss",), "loss"),
    ]
    curves = []
    for caption, keys, label in wanted:
        rows, (x, y, *error) = _series(run.rows, *keys)
        if not rows:
            continue
        versions = []
        for theme in THEMES:
            buffer = io.BytesIO()
            with _figure(buffer, theme, 4.2, 2.9, "svg") as figure:
                axes = figure.subplots()
                if error and len(rows) > 1:
                    axes.fill_between(x, y - 2 * error[0], y + 2 * error[0], color=theme.main, alpha=0.18, linewidth=0)
                elif error:
                    axes.errorbar(x, y, 2 * error[0], color=theme.main, capsize=4)
                if label == "calibration ratio":
                    axes.axhspan(OVER_CONFIDENT, UNDER_CONFIDENT, color=theme.main, alpha=0.12, linewidth=0)
                    axes.axhline(1, color=theme.muted, linewidth=0.8, linestyle="--")
                    axes.set_ylim(max(0, min(0.5, y.min() - 0.1)), max(1.5, y.max() + 0.1))
                _markers(axes, run, rows, x, y, theme)
                axes.set_xlabel("iteration (0: the start)" if x[0] == 0 else "iteration")
                axes.set_ylabel(label)
                axes.xaxis.get_major_locator().set_params(integer=True)
                if len(rows) == 1:
                    axes.set_xlim(x[0] - 1, x[0] + 1)
                    axes.set_xticks(x)
                figure.legend(loc="outside upper right", ncols=3)
            versions.append(_uri(buffer.getvalue(), "image/svg+xml"))
        decimals = _decimals(run) if keys[0] == "score" else 2
        ends = [
            f"{_fixed(_finite(row, keys[0]), decimals)} at iteration {row['iteration']}" for row in (rows[0], rows[-1])
        ]
        alt = f"Curve of the {label} from {ends[0]} to {ends[1]}"
        curves.append({"caption": caption, "alt": alt, "versions": versions})
    return curves


# The page


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DiffemError(f"{file}: cannot be read: {error}") from None


def _start_words(folder: Path) -> str | None:
    text = _read_text(folder / "start.json")
    if text is None:
        return None
    try:
        start = json.loads(text)
    except json.JSONDecodeError:
        raise DiffemError(f"{folder / 'start.json'}: is not JSON") from None
    if not isinstance(start, dict):
        return None
    parts = [str(start.get("kind", "start")).replace("_", " ")]
    count = start.get("components")
    parts += [] if count is None else [f"{count} component" + "s" * (count != 1)]
    parts += [f"rank {start[key]}" for key in ("rank",) if start.get(key) is not None]
    return ", ".join(parts)


def _captions(pictures: Pictures) -> tuple[str, str]:
    dimensions = pictures["mean"].ndim - 1
    if dimensions >= 3:
        blank = " Pale blue was not observed." if "y" in pictures and not _seen(pictures).all() else ""
        return (
            f"One held-out observation per row, and what the models make of it.{blank}"
            f" The standard deviation of the draws runs from 0 (black) to {_std_limit(pictures):.3g} (bright).",
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


def _cost(run: Run) -> list[tuple[str, str]]:
    totals = {
        key: sum(_finite(row, key) or 0.0 for row in run.rows) for key in ("seconds", "examples", "network_evaluations")
    }
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        prior = json.loads((run.folder / "prior.json").read_text())
        totals["seconds"] += prior["seconds"]
        totals["examples"] += prior["examples"]
        totals["network_evaluations"] += 3 * prior["examples"]
    refused = sum(not row.get("accepted") for row in run.rows[1:])
    return [
        (
            "iterations",
            f"{sum(_finite(row, 'loss') is not None for row in run.rows)}"
            + (f", {refused} of them refused" if refused else ""),
        ),
        ("time", _duration(totals["seconds"])),
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
        DiffemError: If `run` is not the folder of a run, or a file of it cannot be read.
    """
    import jinja2

    folder = Path(run)
    loaded, pictures = _load(folder), _load_pictures(folder)
    heads, rows, clean_rows = _table(loaded)
    images = []
    if pictures is not None:
        alts = {
            "reconstructions": f"Reconstructions of {min(len(pictures['mean']), ITEMS)} held-out observations",
            "samples": "Samples from the learned prior",
        }
        titles = {"reconstructions": "Reconstructions", "samples": "Samples from the prior"}
        captions = dict(zip(titles, _captions(pictures), strict=True))
        for name, versions in _draw(folder, pictures).items():
            if versions:
                uris = [_uri(version, "image/png") for version in versions]
                images.append(
                    {
                        "name": name,
                        "title": titles[name],
                        "caption": captions[name],
                        "alt": alts[name],
                        "versions": uris,
                    }
                )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        resources.files("diffem").joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    ratio = _finite(loaded.final, "ratio")
    page = template.render(
        name=folder.resolve().name,
        verdict=_verdict(loaded),
        good=loaded.final is not loaded.start and (ratio is None or OVER_CONFIDENT <= ratio <= UNDER_CONFIDENT),
        heads=heads,
        rows=rows,
        clean_rows=clean_rows,
        start=_start_words(folder),
        curves=_curves(loaded),
        images=images,
        score_name=loaded.score_name,
        crps=loaded.score_name == "CRPS",
        cost=_cost(loaded),
        config=_read_text(folder / "config.yaml"),
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file
